"""Checkpoints placed so that a network stays within a budget of bytes and recomputes least.

What each block keeps and costs is measured on fake tensors (``memsave/block_costs.py``) when the
first input of a shape comes; the placement is then computed (``memsave/placement.py``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memsave.block_costs import BlockCosts, measure_blocks
from memsave.checkpoint import _Checkpointed, _in_order, _run, checkpoint_block
from memsave.checkpoint_selective import _Selective
from memsave.errors import OptionError, RefusedError
from memsave.placement import Placement, Segment, least_peak, peak_of, place, trade_offs

__all__ = [
    "budget_bytes",
    "budget_choices",
    "check_budget",
    "checkpoint_budget",
    "is_budgeted",
    "plan_checkpoints",
]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_KEPT_PLANS = 64  # input shapes whose placement is remembered


def checkpoint_budget(
    model: nn.Module, budget: str | int | None = None, share: float | None = None
) -> nn.Module:
    """Recompute just as much of ``model`` as a budget of bytes asks for; return the same model.

    A ``nn.Sequential`` is cut into regions of one module or more; of another model the blocks
    that its ``checkpointable_blocks()`` names are recomputed or kept, one by one. The placement is
    computed anew for every shape, type and mode of inputs.

    Memory: what the forward of the model keeps, what backward makes again and about two gradients
        beside it, within ``budget``, at the least recomputation that there is. Not counted, since
        checkpoints change nothing there: parameters, their gradients, the optimizer's state, the
        inputs, the loss, convolution workspaces.
    Exact: as ``checkpoint_block``: results, gradients and statistics are the model's own.
    Errors: RefusedError for a model with checkpoints; OptionError for a budget that cannot be
        read, for a model without blocks, and at the
        first forward where no placement is within the budget: it says how much is needed.
        InputError for a region that starts by overwriting its input, as ``checkpoint_block``.

    Args:
        model: changed in place; its parameters and state-dict keys stay.
        budget: bytes, or text such as ``"2 GiB"``.
        share: in place of a budget, of what the model needs with nothing recomputed, 0 to 1. With
            neither the least peak that there is.
    """
    check_budget(budget, share)
    allowed = None if budget is None else budget_bytes(budget)
    names = _blocks(model)
    for part in (model, *(model.get_submodule(name) for name in names)):
        if is_budgeted(part) or isinstance(part, _Checkpointed | _Selective):
            raise RefusedError(
                f"{type(part).__name__} is checkpointed already: a budget decides by itself what "
                "is recomputed, so leave the other out"
            )
    planner = _Planner(names, allowed, share)
    if isinstance(model, nn.Sequential) and not hasattr(model, "checkpointable_blocks"):
        made: Any = _budgeted_class(type(model))  # type: ignore[arg-type]
        model.__class__ = made
        model.planner = planner  # type: ignore[assignment]
    else:
        model.register_forward_pre_hook(planner, with_kwargs=True)
    return model


def plan_checkpoints(
    costs: BlockCosts,
    budget: int | None = None,
    share: float | None = None,
    *,
    longest: int | None = 1,
) -> Placement:
    """Return the placement for blocks that ``measure_blocks`` has measured, its base included.

    ``longest``: see ``place``. Raises OptionError if no placement is within the budget.
    """
    plain = costs.base_bytes + peak_of(costs.blocks, ())
    if budget is None and share is None:
        found: Placement | None = least_peak(costs.blocks, longest=longest)
    else:
        allowed = int(plain * (share or 0)) if budget is None else budget
        found = place(costs.blocks, allowed - costs.base_bytes, longest=longest)
    if found is None:
        least = costs.base_bytes + least_peak(costs.blocks, longest=longest).peak_bytes
        raise OptionError(
            f"no placement of checkpoints keeps the activations within {_gib(allowed)}: "
            f"{_gib(plain)} are needed with none, {_gib(least)} at least: "
            f"take a budget of {least} bytes or more"
        )
    return _with_base(found, costs)


def _with_base(found: Placement, costs: BlockCosts) -> Placement:
    return Placement(
        segments=found.segments, peak_bytes=found.peak_bytes + costs.base_bytes, cost=found.cost
    )


def budget_choices(model: nn.Module) -> tuple[Placement, ...]:
    """Return the placements that budgets can ask of ``model``, for the inputs that it met last.

    ``model`` is one that ``checkpoint_budget`` has changed, or holds one, and that has run with
    gradients. Least cost first, the first recomputing nothing; the peak of each, in bytes, is the
    budget that asks for it. Raises OptionError for a model of which nothing has been measured.
    """
    for part in model.modules():
        for planner in _planners(part):
            if planner.measured is not None:
                costs, longest = planner.measured
                return tuple(
                    _with_base(found, costs) for found in trade_offs(costs.blocks, longest=longest)
                )
    raise OptionError(
        f"{type(model).__name__} has not been measured: call checkpoint_budget, then run the model "
        "once with gradients"
    )


def budget_bytes(budget: str | int) -> int:
    """Return ``"2 GiB"``, ``"512MiB"`` or a number of bytes as bytes."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*", str(budget))
    if match is None or float(match[1]) == 0:
        raise OptionError(f"budget must be bytes, or text such as '2 GiB', got {budget!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def check_budget(budget: str | int | None, share: float | None) -> None:
    """Raise OptionError unless ``budget`` is None or bytes, and ``share`` None or a share."""
    if budget is not None:
        budget_bytes(budget)
        if share is not None:
            raise OptionError(f"give budget or share, not both: got {budget!r} and {share}")
    if share is not None and not 0 < share <= 1:
        raise OptionError(f"share must be more than 0 and at most 1, got {share}")


def is_budgeted(model: nn.Module) -> bool:
    """Return whether ``checkpoint_budget`` has been called for ``model``."""
    return bool(_planners(model))


def _planners(model: nn.Module) -> list[_Planner]:
    own = [model.planner] if isinstance(model, _Budgeted) else []
    return own + [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Planner)]


class _Planner:
    """Knows the placement for each kind of input; as a hook it lets a model's blocks follow it."""

    def __init__(self, names: tuple[str, ...], budget: int | None, share: float | None) -> None:
        self.names, self.budget, self.share = names, budget, share
        self.plans: dict[Any, Placement] = {}
        self.measured: tuple[BlockCosts, int | None] | None = None  # last, and the longest region
        self.measuring = False  # the model's own forward runs, as it is without checkpoints

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checkpoint the blocks that are to be, and those alone."""
        if self.measuring or not torch.is_grad_enabled():
            return
        recomputed = self.plan(model, args, kwargs, longest=1).recomputed
        for i, name in enumerate(self.names):
            block = model.get_submodule(name)
            if i in recomputed:
                checkpoint_block(block)
            elif isinstance(block, _Checkpointed):
                _uncheckpoint(block)

    def plan(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        longest: int | None,
    ) -> Placement:
        """Return the placement for such inputs, measured when they come for the first time."""
        key = _kind_of((args, dict(kwargs)), model.training)
        if key not in self.plans:
            for name in self.names:  # measured as they are without checkpoints
                _uncheckpoint(model.get_submodule(name))
            self.measuring = True
            try:
                costs = measure_blocks(model, self.names, args, kwargs, joined=longest != 1)
            finally:
                self.measuring = False
            self.measured = costs, longest
            while len(self.plans) >= _KEPT_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = plan_checkpoints(costs, self.budget, self.share, longest=longest)
        return self.plans[key]


class _Budgeted(nn.Sequential):
    """The part of a sequence's class that is ours; the other is its own class."""

    planner: _Planner

    def forward(self, input: Any) -> Any:
        if self.planner.measuring or not torch.is_grad_enabled():
            return super().forward(input)  # type: ignore[no-untyped-call]
        placement = self.planner.plan(self, (input,), {}, longest=None)
        return self._in_regions(placement.segments, input)

    def _in_regions(self, segments: tuple[Segment, ...], input: Any) -> Any:
        modules, position = list(self), 0
        for start, stop in segments:
            input = _in_order(modules[position:start], input)
            region = modules[start:stop]
            input = _run(functools.partial(_in_order, region), region, (input,))
            position = stop
        return _in_order(modules[position:], input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle or a deep copy goes through the module's own.
        return _restore, (type(self).__mro__[2],), self.__dict__.copy()


@functools.cache
def _budgeted_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Budgeted{plain.__name__}", (_Budgeted, plain), {"__doc__": plain.__doc__})


def _restore(plain: type[nn.Module]) -> nn.Module:
    made: type[nn.Module] = _budgeted_class(plain)  # type: ignore[arg-type]
    return made.__new__(made)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    if hasattr(model, "checkpointable_blocks"):
        named: Any = model
        names: tuple[str, ...] = named.checkpointable_blocks()
        return names
    if isinstance(model, nn.Sequential) and len(model):
        return tuple(name for name, _ in model.named_children())
    raise OptionError(
        f"{type(model).__name__} is no nn.Sequential and names no blocks: give its class a method "
        "checkpointable_blocks(), or use checkpoint_block on its modules"
    )


def _uncheckpoint(block: nn.Module) -> None:
    if isinstance(block, _Checkpointed):
        block.__class__ = type(block).__mro__[2]


def _kind_of(inputs: Any, training: bool) -> Any:
    """Return what the placement depends on: shapes, types and layouts, mode and autocast."""
    described = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else str(leaf)
        for leaf in tree_leaves(inputs)
    )
    kinds = {leaf.device.type for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    autocast = tuple(
        torch.get_autocast_dtype(kind) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)
    )
    return described, training, autocast


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.2f} MiB"
