"""Figures made up for tests of check and compare."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.figures import Figures, Origin, figures_of
from tests.bench.records import make_record

__all__ = ["make_figures"]


def make_figures(allocated: int | None = 1000, **overrides: Any) -> Figures:
    """Return figures of an ok case; fields of ``Origin`` may be given beside its own."""
    made = figures_of(make_record(), "table1")
    fields = {f.name for f in dataclasses.fields(Origin)}
    origin = {name: overrides.pop(name) for name in list(overrides) if name in fields}
    status = overrides.get("status", "ok")
    values: dict[str, Any] = {
        "peak_allocated_bytes": allocated,
        "reason": "" if status == "ok" else f"made {status}",
        "origin": dataclasses.replace(made.origin, **origin),
    } | overrides
    return dataclasses.replace(made, **values)
