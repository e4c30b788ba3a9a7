"""The layers of a level's half, in the order in which they run: stages of convolutions and a norm.

A half is an ``nn.Sequential`` of layers, of further sequences, or one layer. Only so is it known
that its children run one after the other, each on the result of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from memsave.checkpoint import _Checkpointed
from memsave.checkpoint_selective import _Selective
from memsave.errors import RefusedError
from memsave.recompute_pairs import _Elsewhere as Elsewhere
from memsave.recomputed_norm_act import RecomputedNormAct
from memsave.surgery.stand_ins import _Resting as Resting
from memsave.tiled.convolutions import check_layers
from memsave.tiled.norm_rules import NormRule, joined_rule

__all__ = ["StageLayers", "split_stages"]


@dataclass(frozen=True, slots=True)
class StageLayers:
    """Convolutions one right after the other, and the norm and activation after the last."""

    convolutions: tuple[nn.Conv3d, ...]
    rule: NormRule


def split_stages(block: nn.Module, name: str = "") -> list[StageLayers]:
    """Return the stages of ``block``, which ``name`` calls in errors.

    Raises RefusedError for layers that cannot run slab by slab, and where their order is not known.
    """
    what = name or type(block).__name__
    stages: list[StageLayers] = []
    convolutions: list[nn.Conv3d] = []
    others: list[nn.Module] = []
    for layer in _layers(block, what):
        if isinstance(layer, nn.Conv3d):
            if others:
                stages.append(_stage(convolutions, others, what))
                convolutions, others = [], []
            convolutions.append(layer)
        elif not convolutions:
            raise RefusedError(
                f"{type(layer).__name__} stands at the beginning of {what}, which cannot run slab "
                "by slab: each half of a level must start with a convolution"
            )
        else:
            others.append(layer)
    if not convolutions:
        raise RefusedError(f"{what} has no convolution: a tiled level needs one in each half")
    stages.append(_stage(convolutions, others, what))
    _check_used_once(stages, what)
    return stages


def _check_used_once(stages: list[StageLayers], what: str) -> None:
    used: set[int] = set()
    for stage in stages:
        for layer in (*stage.convolutions, *([stage.rule.norm] if stage.rule.norm else [])):
            if id(layer) in used:
                raise RefusedError(
                    f"{type(layer).__name__} stands in {what} twice, which cannot run slab by "
                    "slab: give each place a layer of its own"
                )
            used.add(id(layer))


def _stage(convolutions: list[nn.Conv3d], others: list[nn.Module], what: str) -> StageLayers:
    check_layers(convolutions)
    return StageLayers(tuple(convolutions), joined_rule(others, what))


def _layers(module: nn.Module, what: str) -> Iterator[nn.Module]:
    """Give the layers that compute something, in the order in which they run."""
    if _runs_in_order(module):
        for child in module._modules.values():  # children() leaves out what stands there twice
            if child is not None:
                yield from _layers(child, what)
    elif isinstance(module, nn.Dropout | nn.Dropout3d | nn.AlphaDropout):
        if module.p > 0:
            raise RefusedError(
                f"{type(module).__name__}(p={module.p}) in {what} cannot run slab by slab, where "
                "each slab would draw its own mask more than once: set its p to 0"
            )
    elif isinstance(module, nn.Identity | Elsewhere | Resting):
        return
    elif any(True for _ in module.children()) and not isinstance(module, RecomputedNormAct):
        raise RefusedError(
            f"{type(module).__name__} in {what} cannot run slab by slab: its forward is its own, "
            "and a level's half must be an nn.Sequential of convolutions, norms and activations"
        )
    else:
        yield module


def _runs_in_order(module: nn.Module) -> bool:
    """Whether the forward is that of ``nn.Sequential``, checkpointed or not."""
    for kind in type(module).__mro__:
        if kind not in (_Checkpointed, _Selective) and "forward" in vars(kind):
            return vars(kind)["forward"] is nn.Sequential.forward
    return False
