"""The budgets that the technique ``checkpoint_budget`` can meet in a case, found untraced."""

from __future__ import annotations

import contextlib
from typing import Any

from bench.case import Case

__all__ = ["case_budgets"]


class _ForwardDoneError(Exception):
    """Leaves a step at the end of its forward, through all that stands around it."""


def case_budgets(case: Case, device_type: str) -> dict[str, Any]:
    """Return ``{"budgets": [...]}`` in bytes, the largest first, as JSON-ready data.

    The case uses ``checkpoint_budget``. Its first forward runs on fake tensors, in which the
    technique measures the network's blocks; at the first budget nothing is recomputed, at the last
    one all that makes the peak smaller.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.build_workload import build_workload
    from memsave.checkpoint_budget import budget_choices

    def until_backward(phase: str) -> None:
        if phase == "backward":
            raise _ForwardDoneError

    with FakeTensorMode():
        workload = build_workload(
            case, lambda _phase: None, "cpu" if device_type == "cpu" else "cuda:0"
        )
        with contextlib.suppress(_ForwardDoneError):
            workload.step(until_backward)
        return {"budgets": [choice.peak_bytes for choice in budget_choices(workload.model)]}
