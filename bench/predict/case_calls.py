"""The calls of libraries and kernels that a case makes, gathered by tracing one step of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bench.case import Case
from bench.predict.predictor import trace_case_folded

__all__ = ["EveryOperator", "case_calls"]

# What the tracer or the card's file knows already, and what computes nothing.
_KNOWN = (
    *("aten.sum.", "aten.nansum.", "aten.mean.", "aten.prod."),
    *("aten.empty", "aten.detach.", "aten.alias.", "aten.lift"),
)


class EveryOperator:
    """A container of all operators that a calibration measures."""

    def __contains__(self, operator: object) -> bool:
        """Whether ``operator`` may take memory beside its results that nothing else tells."""
        name = str(operator)
        if not name.startswith("aten.") or name.startswith(_KNOWN):
            return False
        packet = getattr(torch.ops.aten, name.split(".")[1])
        overload = getattr(packet, name.split(".")[2], None)
        return overload is not None and not overload.is_view


def case_calls(case: Case, device_type: str) -> dict[str, Any]:
    """Return the distinct calls as JSON-ready data, in the order in which a step makes them.

    ``"convolutions"`` is a list of ConvolutionCall's data, ``"operators"`` of OperatorCall's.
    """
    one_step = dataclasses.replace(case, steps=1)
    trace, _, _ = trace_case_folded(one_step, device_type, EveryOperator())
    events = [event for event in trace.events if event[0] in ("convolution", "operator")]
    return {
        "convolutions": [
            call.to_dict() for call in _once(e[3] for e in events if e[0] == "convolution")
        ],
        "operators": [
            call._asdict() for call in _once(e[1] for e in events if e[0] == "operator")
        ],
    }


def _once(calls: Any) -> list[Any]:
    return list(dict.fromkeys(calls))
