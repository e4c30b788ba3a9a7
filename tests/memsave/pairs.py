"""What happens when two techniques are used together: the decisions, and the step that tries them.

Decisions are data, so that ``pairs_table`` can print them; ``test_pairs`` holds each to a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.workload import Workload
from memsave import compression, compression_formats
from memsave.checkpoint import _Checkpointed
from memsave.checkpoint_selective import _Selective
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.offload import _Scope as OffloadScope
from memsave.optimizer_in_backward import _InBackward
from memsave.recomputed_norm_act import RecomputedNormAct
from memsave.technique_pairs import find_conflict
from memsave.techniques import TECHNIQUES
from memsave.tiled import TiledUNet

__all__ = [
    "COMPRESSED",
    "IN_PLACE",
    "NOTES",
    "OPTIONS",
    "ROUNDING",
    "Refused",
    "Step",
    "Together",
    "all_pairs",
    "decision",
    "run",
]

IN_PLACE = {  # technique -> the norm that computes the same plainly
    "inplace_abn": "batch_norm_leaky_relu",
    "inplace_group_norm": "group_norm_leaky_relu",
    "inplace_instance_norm": "instance_norm_leaky_relu",
}
ROUNDING = 1e-13
"""In float64, relative to all gradients: sums in another order, or a result inverted.

A unit is 1.1e-16 and inverting leaky ReLU 0.01 costs up to 100 of them; measured up to 2e-15.
"""
COMPRESSED = 0.1
"""The same for bf16, whose unit is 2^-9 = 0.2 %: what a region recomputes from a rounded input
changes sign where activations are near 0. Measured 0.2 to 4 % on this network of 512 voxels."""

# What makes each technique act on networks this small. A technique that is not here has not been
# decided upon, and fails the tests.
OPTIONS: dict[str, dict[str, Any]] = {
    "inplace_abn": {},
    "inplace_group_norm": {},
    "inplace_instance_norm": {},
    "recomputed_norm_act": {},
    "checkpoint": {},
    "checkpoint_selective": {},
    "checkpoint_steps": {"every": 2},
    "offload": {"minimum_bytes": 0},
    "compress_activations": {"minimum_bytes": 0, "format": "bf16"},
    "checkpoint_budget": {},
    "optimizer_in_backward": {},
    "tiled_levels": {"slabs": 2},
}


@dataclass(frozen=True, slots=True)
class Refused:
    """``message`` is in what the user reads; ``reason`` is in the table."""

    message: str
    reason: str


@dataclass(frozen=True, slots=True)
class Together:
    """The pair's gradients are those of ``reference``, within ``band`` (0: bit for bit)."""

    reference: tuple[str, ...]
    band: float


_NO_PLAIN_PAIR = Refused(
    "no pair of norm and activation that can be recomputed",
    "a network built with in-place norms has no plain norm left; `memsave.apply` takes both, the "
    "first named has the norms that it can take and the other the rest",
)
_OVERWRITTEN = Refused(
    "in-place norms, which overwrite the convolutions' results",
    "in-place norms overwrite the convolutions' results that would be kept",
)
_NO_SUCH_NORM = Refused("unknown norm", "no recurrent network here has this norm")
# Pairs that a technique or a network refuses by itself, because it sees it there
_REFUSED_BY_THEMSELVES: dict[frozenset[str], Refused] = {
    **{frozenset({norm, "recomputed_norm_act"}): _NO_PLAIN_PAIR for norm in IN_PLACE},
    **{frozenset({norm, "checkpoint_selective"}): _OVERWRITTEN for norm in IN_PLACE},
    frozenset({"inplace_group_norm", "checkpoint_steps"}): _NO_SUCH_NORM,
    frozenset({"inplace_instance_norm", "checkpoint_steps"}): _NO_SUCH_NORM,
    frozenset({"checkpoint_steps", "tiled_levels"}): Refused(
        "ConvLSTM cannot be tiled",
        "only a 3D U-Net can be tiled, and it takes no steps",
    ),
}
NOTES: dict[frozenset[str], str] = {
    frozenset({"checkpoint_selective", "offload"}): "blocks' inputs are moved; the convolutions' "
    "results that selective checkpoints keep stay on the device",
    frozenset({"checkpoint_selective", "compress_activations"}): "blocks' inputs are compressed; "
    "the convolutions' results that selective checkpoints keep are not",
    frozenset({"checkpoint", "tiled_levels"}): "the levels that are not tiled are checkpointed",
    frozenset({"checkpoint_selective", "tiled_levels"}): "the levels that are not tiled are "
    "checkpointed",
    **{
        frozenset({norm, "compress_activations"}): "in bf16 alone: fp8 and int8 are refused, "
        "since inverting the norm would multiply their error"
        for norm in IN_PLACE
    },
}
# What saves, moves or frees tensors as they are, so that compression sees the same ones
_SAVES_THE_SAME = {"offload", "optimizer_in_backward"}


def all_pairs() -> list[tuple[str, str]]:
    """Return every pair of the table, in its order."""
    return list(combinations(TECHNIQUES, 2))


def decision(first: str, second: str) -> Together | Refused:
    """Return what is to happen when the two are used together, in either order."""
    pair = frozenset({first, second})
    conflict = find_conflict(first, second)
    if conflict is not None:
        return Refused(conflict.reason, conflict.reason)
    if pair in _REFUSED_BY_THEMSELVES:
        return _REFUSED_BY_THEMSELVES[pair]
    in_place = tuple(pair & set(IN_PLACE))
    if "compress_activations" in pair:
        if pair & _SAVES_THE_SAME:
            return Together(("compress_activations",), 0)
        return Together(in_place, COMPRESSED)
    return Together(in_place, ROUNDING if "tiled_levels" in pair else 0)


@dataclass(frozen=True, slots=True)
class Step:
    """What two training steps gave."""

    gradients: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of each step, by parameter
    buffers: tuple[Tensor, ...]  # after both
    acted: frozenset[str]  # the techniques that could be seen at work

    def distance(self, reference: Step, step: int) -> float:
        """Return the norm of the gradients' difference in one step, relative to the reference."""
        pairs = zip(self.gradients[step], reference.gradients[step], strict=True)
        difference = _norm(a - b for a, b in pairs)
        return difference / _norm(reference.gradients[step])


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(t.square().sum()) for t in tensors))


@functools.cache
def run(names: tuple[str, ...], *, recurrent: bool, norm: str, eps: bool = False) -> Step:
    """Take two steps with the techniques called ``names``, in float64 on the CPU.

    ``eps``: scale plain norms by weight + eps, as the in-place norms do.
    """
    with _float64(), _watched() as calls:
        workload = build_workload(_case(names, recurrent, norm), lambda _phase: None, "cpu")
        if eps:
            _add_eps(workload)
        seen: tuple[dict[int, Tensor], ...] = ({}, {})
        for gradients in seen:
            hooks = [p.register_hook(_noting(gradients, i)) for i, p in _parameters(workload)]
            workload.step(lambda _phase: None)
            for hook in hooks:
                hook.remove()
    in_order = tuple(tuple(g[i] for i in sorted(g)) for g in seen)
    assert all(len(g) == len(list(workload.model.parameters())) for g in in_order)
    return Step(
        (in_order[0], in_order[1]),
        tuple(b.clone() for b in workload.model.buffers()),
        frozenset(name for name in names if _acted(name, workload, calls)),
    )


def _case(names: tuple[str, ...], recurrent: bool, norm: str) -> Case:
    shape = (8, 8, 4) if recurrent else (8, 8, 8)
    block = {} if recurrent else {"block": "ccblock"}
    return Case(
        network="conv_lstm" if recurrent else "fcn",
        variant="pair",
        requested_shape=shape,
        shape=shape,
        network_options={"widths": [4, 8], "norm": norm, **block},
        techniques=tuple(TechniqueUse(name=n, options=OPTIONS[n]) for n in names),
        loss="binary_cross_entropy" if recurrent else "cross_entropy+dice",
        optimizer="sgd",
    )


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _parameters(workload: Workload) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(workload.model.parameters()))


def _noting(gradients: dict[int, Tensor], i: int) -> Callable[[Tensor], None]:
    """Return a hook that runs before the gradient is used, which may be within backward."""

    def note(gradient: Tensor) -> None:
        assert i not in gradients
        gradients[i] = gradient.detach().clone()

    return note


def _add_eps(workload: Workload) -> None:
    kinds = (torch.nn.BatchNorm3d, torch.nn.GroupNorm, torch.nn.InstanceNorm3d)
    for module in workload.model.modules():
        if isinstance(module, kinds):
            module.weight.data += module.eps


@contextmanager
def _watched() -> Iterator[dict[str, mock.Mock]]:
    """Count the blocks sent to the host, and the tensors compressed."""
    send, compress = OffloadScope._send, compression_formats.compress
    with (
        mock.patch.object(OffloadScope, "_send", autospec=True, side_effect=send) as sent,
        mock.patch.object(compression, "compress", side_effect=compress) as compressed,
    ):
        yield {"offload": sent, "compress_activations": compressed}


_KINDS: dict[str, type] = {
    "inplace_abn": InPlaceABN,
    "inplace_group_norm": InPlaceGroupNorm,
    "inplace_instance_norm": InPlaceInstanceNorm,
    "recomputed_norm_act": RecomputedNormAct,
    "checkpoint": _Checkpointed,
    "checkpoint_selective": _Selective,
    "checkpoint_budget": _Checkpointed,  # placed at the first forward
    "tiled_levels": TiledUNet,
}


def _acted(name: str, workload: Workload, calls: dict[str, mock.Mock]) -> bool:
    if name in calls:
        return bool(calls[name].called)
    if name == "optimizer_in_backward":
        return isinstance(workload.optimizer, _InBackward)
    if name == "checkpoint_steps":
        return bool(getattr(workload.model, "steps_per_checkpoint", None) == 2)
    return any(isinstance(module, _KINDS[name]) for module in workload.model.modules())
