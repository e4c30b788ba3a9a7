"""Plans that are kept: ``results/plans/<card>.json``, what ``membench plan --json`` answered.

A file is one JSON object: the command that was run, the card, the versions that shaped the answer,
and ``proposals``, every one that was simulated, in the plan's order, a line each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case import known_fields
from bench.errors import MembenchError
from bench.predict.cards import Card
from bench.record import Environment

__all__ = ["StoredPlan", "read_plan", "read_plans", "stored_plan", "write_plan"]

_SCHEMA_VERSION = 1
_NEEDED = frozenset(
    {
        *("variant", "network_options", "precision", "exact", "fits", "peak_reserved_bytes"),
        *("process_bytes", "headroom_bytes", "slowdown", "slowdown_evidence", "needs_bytes"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlan:
    """One search for one card, predicted. ``command`` is what followed ``membench``."""

    command: tuple[str, ...]
    card: str
    model: str  # the card's name in full
    memory_bytes: int  # of the card
    context_bytes: int  # of them, what the caching allocator cannot have
    tracer: str
    environment: Environment
    proposals: tuple[dict[str, Any], ...]
    evidence: str = "predicted"
    schema_version: int = _SCHEMA_VERSION

    @property
    def fitting(self) -> tuple[dict[str, Any], ...]:
        """The proposals that fit, the best first."""
        return tuple(one for one in self.proposals if one["fits"])


def stored_plan(
    command: Iterable[str],
    card: Card,
    tracer: str,
    environment: Environment,
    proposals: Iterable[dict[str, Any]],
) -> StoredPlan:
    """Return what is kept of a plan; ``environment`` is that in which it was begun."""
    return StoredPlan(
        command=tuple(command),
        card=card.name,
        model=card.model,
        memory_bytes=card.memory_bytes,
        context_bytes=card.context_bytes,
        tracer=tracer,
        environment=dataclasses.replace(environment, card_hash=card.digest()),
        proposals=tuple(proposals),
    )


def write_plan(folder: Path, plan: StoredPlan) -> Path:
    """Write ``<card>.json`` and return its path.

    Errors: MembenchError where the folder cannot be written.
    """
    data = dataclasses.asdict(plan)
    rows = ",\n".join(json.dumps(one) for one in data.pop("proposals"))
    text = f'{json.dumps(data)[:-1]}, "proposals": [\n{rows}\n]}}\n'
    path = folder / f"{plan.card}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MembenchError(
            f"cannot write the plan {path}: {error.strerror or error}; choose another folder"
        ) from None
    return path


def read_plan(path: Path) -> StoredPlan:
    """Return the plan of one file.

    Errors: MembenchError for a file that cannot be read or is no plan.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        values = known_fields(StoredPlan, data)
        made = known_fields(Environment, values["environment"])
        values["environment"] = Environment(**{**made, "notes": tuple(made.get("notes", ()))})
        for name in ("command", "proposals"):
            values[name] = tuple(values[name])
        plan = StoredPlan(**values)
        missing = {name for one in plan.proposals for name in _NEEDED - set(one)}
    except OSError as error:
        raise MembenchError(f"cannot read the plan {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MembenchError(
            f"{path} is no plan ({error}): python -m bench.plan_session makes it again"
        ) from None
    if missing or not plan.proposals:
        what = f"without {', '.join(sorted(missing))}" if missing else "none at all"
        raise MembenchError(
            f"{path} has proposals {what}: python -m bench.plan_session makes it again"
        )
    return plan


def read_plans(folder: Path) -> list[StoredPlan]:
    """Return the plans of a folder, the smallest card first.

    Errors: MembenchError where there is none, or a file is no plan.
    """
    plans = [read_plan(path) for path in sorted(folder.glob("*.json"))]
    if not plans:
        raise MembenchError(
            f"no plans in {folder}: python -m bench.plan_session makes those of results/plans"
        )
    return sorted(plans, key=lambda plan: (plan.memory_bytes, plan.card))
