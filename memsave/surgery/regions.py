"""A checkpointed region must not start by overwriting its own input: it could not be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from memsave.checkpoint import _Checkpointed
from memsave.errors import RefusedError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.surgery.dataflow import Call, Dataflow
from memsave.surgery.pairs import Pair

__all__ = ["check_regions"]


def check_regions(
    model: nn.Module, flows: Callable[[], list[Dataflow]], replaced: Mapping[str, Pair]
) -> None:
    """Raise RefusedError if an in-place norm in a checkpointed region overwrites what came in.

    ``flows`` is asked for only if there is something to check; ``replaced`` are the norms that
    have just been made in-place ones.
    """
    modules = dict(model.named_modules())
    regions = [name for name, module in modules.items() if isinstance(module, _Checkpointed)]
    kinds = (InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm)
    norms = [name for name, module in modules.items() if isinstance(module, kinds)]
    for region in regions:
        for norm in norms:
            if not _within(norm, region):
                continue
            for producer in _producers(norm, flows, replaced):
                if producer is None or not _within(_where(producer), region):
                    raise RefusedError(
                        f"{norm} overwrites the input of the checkpointed region {region}, which "
                        "could not be run again: checkpoint a region that starts with the "
                        f"convolution before {norm}, or replace this norm by recomputed_norm_act"
                    )


def _producers(
    norm: str, flows: Callable[[], list[Dataflow]], replaced: Mapping[str, Pair]
) -> list[Call | None]:
    if norm in replaced:
        return list(replaced[norm].producers)
    calls = [call for flow in flows() for call in flow.of_module(norm)]
    return [call.argument.producer for call in calls if call.argument is not None]


def _where(call: Call) -> str:
    return call.owner if call.module is None else call.module


def _within(name: str, region: str) -> bool:
    return not region or name == region or name.startswith(f"{region}.")
