"""Small cases of the FCN: a second of a GPU, yet all of its operators."""

from __future__ import annotations

from typing import Any

from bench.case import Case

__all__ = ["small_case"]


def small_case(side: int = 64, **changes: Any) -> Case:
    """A training step of the FCN at ``side`` cubed, batch 1."""
    fields: dict[str, Any] = {"network": "fcn", "variant": "small", "timed_steps": 0, **changes}
    shape = (side, side, side)
    return Case(requested_shape=shape, shape=shape, **fields)
