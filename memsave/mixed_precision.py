"""Mixed precision as one object: autocast around the forward, loss scaling where it is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memsave.errors import OptionError, UnknownNameError

__all__ = ["MixedPrecision", "Precision"]

Precision = Literal["fp32", "fp16", "bf16"]
_AUTOCAST_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


class MixedPrecision:
    """How a training step computes: ``"fp32"``, or ``"fp16"`` or ``"bf16"`` with fp32 weights.

    One scope for suites and scripts: the workloads of ``membench`` run through this very object.
    fp16 scales the loss (gradients below 6e-8 would be lost); bf16 has the range of fp32 and needs
    no scale. A step whose gradients overflowed in fp16 is skipped: weights and optimizer stay as
    they were, bit for bit, and the scale is halved; after ``growth_interval`` good steps in a row
    it is doubled::

        precision = MixedPrecision("fp16")
        with precision.forward():
            loss = criterion(model(image), labels)
        precision.backward(loss)
        precision.unscale(optimizer)  # only where gradients are clipped, and before they are
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        precision.step(optimizer)

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv:1710.03740.
    Memory: activations that convolutions and products keep take 2 bytes a value instead of 4. On
        top come half-precision copies of their weights, ``2 * weight.numel()`` bytes each, made
        once a scope: autocast keeps them, and those of biases, until ``forward``'s scope ends;
        the graph keeps the weights' until their backward. A float32 input of such an operator is
        kept as a copy in half precision. Weights, gradients and the optimizer's state stay
        float32, so nothing is saved there. The loss scale is 8 bytes.
    Exact: within the rounding of the type; the weights and their updates stay float32. The loss
        scale is a power of two, so it changes no bit of a gradient that stays in range.
    Errors: UnknownNameError for another precision; OptionError where the device has no autocast
        (torch would warn and compute in fp32), and for a scale or interval that cannot be.

    Args:
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        device_type: where the model is: ``"cuda"``, ``"cpu"``.
        initial_scale: the first loss scale; fp16 alone uses it.
        growth_interval: good steps in a row after which the loss scale is doubled.
    """

    def __init__(
        self,
        precision: Precision = "fp32",
        device_type: str = "cuda",
        *,
        initial_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        if precision not in get_args(Precision):
            raise UnknownNameError("precision", precision, get_args(Precision))
        if not initial_scale > 0 or growth_interval < 1:
            raise OptionError(
                "initial_scale must be more than 0 and growth_interval 1 or more, "
                f"got {initial_scale} and {growth_interval}"
            )
        if precision != "fp32":
            _require_autocast(precision, device_type)
        self.precision = precision
        self.device_type = device_type
        self.scaler: torch.amp.GradScaler | None = None
        if precision == "fp16":
            self.scaler = torch.amp.GradScaler(
                device_type, init_scale=initial_scale, growth_interval=growth_interval
            )

    def forward(self) -> AbstractContextManager[None]:
        """Return the scope of the forward pass and the loss: autocast, or nothing for fp32."""
        if self.precision == "fp32":
            return nullcontext()
        scope: Any = torch.autocast(self.device_type, dtype=_AUTOCAST_DTYPE[self.precision])
        return scope  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of ``loss``, scaled if this precision scales."""
        scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
        torch.autograd.backward(scaled)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the loss scale off the gradients, once a step: after ``backward``, for clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer`` step with unscaled gradients; not at all if they overflowed."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint file must hold: the loss scale's state, or nothing."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that ``state_dict`` gave; one of another precision is refused."""
        if bool(state) != (self.scaler is not None):
            raise OptionError(
                f"this state {'has a' if state else 'lacks the'} loss scale, but the precision "
                f"here is {self.precision}: only fp16 scales the loss"
            )
        if self.scaler is not None:
            self.scaler.load_state_dict(state)


def _require_autocast(precision: str, device_type: str) -> None:
    available = torch.amp.is_autocast_available(device_type)
    if device_type == "cuda" and torch.cuda.amp.common.amp_definitely_not_available():  # type: ignore[no-untyped-call]
        available = False
    if not available:
        raise OptionError(
            f"precision {precision} needs autocast on {device_type!r}, which is not available "
            "here: use fp32, or another device"
        )
