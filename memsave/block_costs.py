"""What each block of a network keeps for backward and costs, found without memory or arithmetic.

The forward runs once on fake tensors of the given inputs' shapes and types: autograd's saved
tensors say which bytes are kept by whom, torch's formulas say the FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from memsave.errors import OptionError
from memsave.placement import Block
from memsave.recompute_scope import active_scope
from memsave.recomputed_norm_act import recompute

__all__ = ["BlockCosts", "measure_blocks"]


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """The blocks as ``memsave.placement`` takes them, and what is kept whatever is recomputed."""

    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    base_bytes: int  # between the blocks: their inputs, where they are no block's result, and rest


@dataclass(slots=True)
class _Seen:
    """What one block was seen to do."""

    inputs: dict[int, int] = field(default_factory=dict)  # storage -> bytes, as all below
    results: dict[int, int] = field(default_factory=dict)
    saved: dict[int, int] = field(default_factory=dict)
    flops: int = 0


def measure_blocks(
    model: nn.Module,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    joined: bool = False,
) -> BlockCosts:
    """Return what the submodules ``names`` of ``model`` keep and cost, run on such inputs.

    ``joined``: each block reads the result of the one before and nothing else, so that several may
    be recomputed as one. Otherwise what lies between them is kept, and counted in ``base_bytes``.

    Memory, Exact: bytes are those that autograd keeps, at the autocast, training mode and
        ``recompute`` scope of the call; nothing is allocated, no statistics and no random state
        change. While backward runs a block, the gradient of its result and one more tensor of
        its largest size are counted besides; convolution workspaces are not.
    Errors: OptionError for a block that does not run once in a forward.
    """
    watch = _Watch(model, names)
    with _disable_current_modes(), FakeTensorMode(), torch.enable_grad():
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # One fake tensor for each real one, so that shared ones stay shared.
        made = {id(t): _alike(t) for t in (*state.values(), *tree_leaves((args, kwargs)))
                if isinstance(t, Tensor)}  # fmt: skip
        watch.known = {_key(tensor) for tensor in made.values()}
        args, keywords = tree_map_only(Tensor, lambda t: made[id(t)], (args, dict(kwargs or {})))
        with watch:
            torch.func.functional_call(
                model, {name: made[id(t)] for name, t in state.items()}, args, keywords
            )
    return watch.costs(joined)


class _Watch:
    """Follows a forward: which block runs, and what is saved meanwhile."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        self.seen = [_Seen() for _ in names]
        self.runs = [0] * len(names)
        self.known: set[int] = set()  # storages that live anyway
        self.between: dict[int, int] = {}
        self._current: int | None = None
        self._flops = FlopCounterMode(display=False)
        self._alive: list[Tensor] = []  # so that no two storages share an address
        self._entered = ExitStack()

    def __enter__(self) -> None:
        for i, name in enumerate(self.names):
            block = self.model.get_submodule(name)
            enter = block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: self._begin(i, (args, kwargs)), with_kwargs=True
            )
            leave = block.register_forward_hook(lambda _, __, result, i=i: self._end(i, result))
            self._entered.callback(enter.remove)
            self._entered.callback(leave.remove)
        # The scope asks for the outermost hooks that it is in, which are to be ours.
        scope: AbstractContextManager[None] = nullcontext()
        if active_scope() is not None:
            scope = recompute(self.model)
        self._entered.enter_context(self._flops)
        self._entered.enter_context(saved_tensors_hooks(self._save, lambda tensor: tensor))
        self._entered.enter_context(scope)

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def _begin(self, i: int, inputs: Any) -> None:
        self.runs[i] += 1
        self._current = i
        self.seen[i].inputs.update(self._storages(tree_leaves(inputs)))
        self.seen[i].flops -= self._flops.get_total_flops()

    def _end(self, i: int, result: Any) -> None:
        self._current = None
        self.seen[i].results.update(self._storages(tree_leaves(result)))
        self.seen[i].flops += self._flops.get_total_flops()

    def _save(self, tensor: Tensor) -> Tensor:
        saved = self.between if self._current is None else self.seen[self._current].saved
        saved.update(self._storages([tensor]))
        return tensor

    def _storages(self, values: Iterable[Any]) -> dict[int, int]:
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._alive += tensors
        return {
            _key(tensor): tensor.untyped_storage().nbytes()
            for tensor in tensors
            if _key(tensor) not in self.known
        }

    def costs(self, joined: bool) -> BlockCosts:
        """Return what was seen."""
        wrong = [f"{name} {runs} times" for name, runs in zip(self.names, self.runs, strict=True)
                 if runs != 1]  # fmt: skip
        if wrong:
            raise OptionError(
                f"each block must run once in a forward, got {', '.join(wrong)}: "
                "name blocks that do, or use checkpoint_steps for a recurrent network"
            )
        base = dict(self.between)
        for seen in self.seen:
            base |= seen.inputs
        blocks = tuple(_block(seen, base, joined) for seen in self.seen)
        results = {key for seen in self.seen for key in seen.results}
        between = sum(size for key, size in base.items() if key not in results)
        return BlockCosts(self.names, blocks, between)


def _block(seen: _Seen, base: Mapping[int, int], joined: bool) -> Block:
    """Return the block; ``base`` is what others keep.

    A result that nobody else keeps, as one that is only summed, has but its gradient.
    """
    apart = {*base, *(seen.results if joined else ()), *(seen.inputs if joined else ())}
    inside = {key: size for key, size in seen.saved.items() if key not in apart}
    results = sum(seen.results.values())
    held = results if joined else sum(s for key, s in seen.results.items() if key in base)
    # A block may need its own result, as an activation does; others keep it no longer by then.
    own = sum(size for key, size in seen.saved.items() if key in seen.results and key not in inside)
    largest = max((*seen.saved.values(), *seen.results.values()), default=0)
    return Block(
        inside_bytes=sum(inside.values()),
        result_bytes=held,
        cost=seen.flops + results,
        work_bytes=largest + results - held + own,
    )


def _alike(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.requires_grad_(tensor.requires_grad)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
