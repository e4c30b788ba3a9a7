"""The floating-point operations of a step, counted from the operators that it dispatches.

FLOPs are 2 x multiply-adds of convolutions, matrix products and attention, by the formulas of
``torch.utils.flop_counter``; all else (norms, activations, losses, the optimizer) counts as
nothing, as there. They depend on shapes alone, so counting them needs no data.

One formula of torch is mended: for a convolution in groups its count of the weight's gradient
leaves the groups out, which makes a depthwise one ``groups`` times too dear.

What is recomputed is told from the rest of the backward by what runs it: a forward runs again
either with gradients enabled, which they are not while autograd runs backward formulas, or inside
of a module's ``forward``. A technique that recomputes by other ways says so, by
``memsave.recomputing``, in forward too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from memsave.recomputing import is_computed_again

__all__ = ["FlopCount", "Flops", "flops_of"]

_aten = torch.ops.aten


class Flops(NamedTuple):
    """FLOPs of a step: of its forward, of what ran a second time, and of all of it."""

    forward: int = 0
    recomputed: int = 0
    total: int = 0

    @property
    def recomputation_factor(self) -> float | None:
        """The step's FLOPs over those of a step that keeps everything; None where both are 0."""
        once = self.total - self.recomputed
        return self.total / once if once else None


def flops_of(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, result: Any) -> int:
    """Return the FLOPs of one call of an operator.

    ``packet`` is the operator without its overload, as ``torch.ops.aten.convolution``; ``args``,
    ``kwargs`` and ``result`` are its tensors or fake tensors. 0 for an operator without a formula.
    """
    if packet is _aten.convolution_backward:
        return _convolution_backward(args, result)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **(kwargs or {}), out_val=result))


def _convolution_backward(args: tuple[Any, ...], result: Any) -> int:
    """Count the gradients that the call computes; the weight's belongs to one group each."""
    formula = flop_registry[_aten.convolution_backward]
    groups, (of_input, of_weight, of_bias) = args[9], args[10]
    flops = 0
    if of_input:
        flops += int(formula(*args[:10], [True, False, of_bias], out_val=result))
    if of_weight:
        flops += int(formula(*args[:10], [False, True, of_bias], out_val=result)) // groups
    return flops


@dataclass(slots=True)
class FlopCount:
    """Adds up the FLOPs of one step, operator by operator.

    ``phase`` is the step's phase, ``"forward"``, ``"backward"`` or ``"optimizer"``: whoever marks
    the phases sets it. ``counted`` is the sum since ``start``.
    """

    phase: str = "forward"
    counted: Flops = field(default_factory=Flops)

    def start(self) -> None:
        """Forget what was counted: a step begins."""
        self.counted = Flops()

    def add(
        self,
        packet: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        result: Any,
        *,
        in_module: bool,
    ) -> None:
        """Count one call; ``in_module`` says whether a module's ``forward`` made it."""
        if packet not in flop_registry:
            return
        flops = flops_of(packet, args, kwargs, result)
        in_backward = self.phase == "backward"
        again = is_computed_again() or (in_backward and (in_module or torch.is_grad_enabled()))
        forward, recomputed, total = self.counted
        first = self.phase == "forward" and not again
        self.counted = Flops(forward + flops * first, recomputed + flops * again, total + flops)

    def repeat(self, since: Flops, times: int) -> None:
        """Count what has been added since ``since``, a former ``counted``, ``times`` more times."""
        self.counted = Flops(
            *(now + times * (now - then) for now, then in zip(self.counted, since, strict=True))
        )
