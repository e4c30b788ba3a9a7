"""The literal table of techniques that may not be used together, each with its reason.

Every pair that is not here is either refused by a technique itself, which sees it in the network,
or tested together: ``tests/memsave/test_pairs.py`` tries them all, and ``PAIRS.md`` beside this
file is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from memsave.errors import OptionError
from memsave.techniques import Technique

__all__ = ["CONFLICTS", "Conflict", "check_pairs", "find_conflict"]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why two techniques do not go together, and what to do."""

    reason: str
    in_apply: bool = True  # False: only where a network is built, as a suite's are
    disjoint_blocks: bool = False  # True: allowed where each names blocks, and none is in both


_ONE_NORM = Conflict(
    "both choose the norm that the network is built with, so the one named last would take the "
    "other's place: name one of them",
    in_apply=False,  # there the first named takes the norms that it can, the next one the rest
)

CONFLICTS: Mapping[frozenset[str], Conflict] = {
    frozenset({"inplace_abn", "inplace_group_norm"}): _ONE_NORM,
    frozenset({"inplace_abn", "inplace_instance_norm"}): _ONE_NORM,
    frozenset({"inplace_group_norm", "inplace_instance_norm"}): _ONE_NORM,
    frozenset({"checkpoint", "checkpoint_selective"}): Conflict(
        "one block is recomputed whole or in part: name one of them, or give each its own blocks",
        disjoint_blocks=True,
    ),
    frozenset({"checkpoint", "checkpoint_budget"}): Conflict(
        "checkpoint_budget decides by itself which blocks are recomputed and would undo the "
        "other's choice: name one of them"
    ),
    frozenset({"checkpoint_selective", "checkpoint_budget"}): Conflict(
        "checkpoint_budget cannot see the convolutions' results that the other keeps, so its "
        "budget would be exceeded: name one of them"
    ),
    frozenset({"checkpoint_steps", "checkpoint_budget"}): Conflict(
        "checkpoint_budget places blocks that run once in a forward, and a recurrent network's "
        "run once a step: leave checkpoint_budget out"
    ),
    frozenset({"tiled_levels", "checkpoint_budget"}): Conflict(
        "checkpoint_budget measures a network's plain forward, which tiled levels do not run, and "
        "would do nothing: use checkpoint for the levels that are not tiled"
    ),
}


def find_conflict(first: str, second: str) -> Conflict | None:
    """Return why the techniques called ``first`` and ``second`` do not go together, if so."""
    return CONFLICTS.get(frozenset({first, second}))


def check_pairs(techniques: Sequence[tuple[Technique, Any]], *, in_apply: bool = False) -> None:
    """Raise OptionError if two of ``techniques``, given with their options, do not go together.

    ``in_apply``: they change a model that is there, rather than one that is built with them.
    """
    for (first, first_options), (second, second_options) in combinations(techniques, 2):
        if first.name == second.name:
            raise OptionError(f"technique {first.name!r} is named twice: name it once")
        conflict = find_conflict(first.name, second.name)
        if conflict is None or (in_apply and not conflict.in_apply):
            continue
        if conflict.disjoint_blocks and _disjoint(first_options, second_options):
            continue
        raise OptionError(
            f"techniques {first.name!r} and {second.name!r} cannot be used together: "
            f"{conflict.reason}"
        )


def _disjoint(first: Any, second: Any) -> bool:
    """Whether both name blocks, and none of them is in both or inside one of the other's."""
    return bool(first.blocks and second.blocks) and not any(
        f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
        for a in first.blocks
        for b in second.blocks
    )
