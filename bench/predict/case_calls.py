"""The calls of libraries and kernels that a case makes, gathered by tracing one step of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bench.case import Case
from bench.predict.folding_cases import repeated_steps, with_steps
from bench.predict.predictor import trace_case

__all__ = ["EveryOperator", "case_calls"]

# What the tracer or the card's file knows already, and what computes nothing.
_KNOWN = (
    *("aten.sum.", "aten.nansum.", "aten.mean.", "aten.prod."),
    *("aten.empty", "aten.detach.", "aten.alias.", "aten.lift"),
)


_PERIODS = 3  # of a loop: its first and last ones, and one between


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

    Of a loop of equal steps a few are run: the others make the same calls.
    ``"convolutions"`` is a list of ConvolutionCall's data, ``"operators"`` of OperatorCall's.
    """
    trace, _ = trace_case(_shortened(case), device_type, EveryOperator())
    events = [event for event in trace.events if event[0] in ("convolution", "operator")]
    return {
        "convolutions": [
            call.to_dict() for call in _once(e[3] for e in events if e[0] == "convolution")
        ],
        "operators": [call._asdict() for call in _once(e[1] for e in events if e[0] == "operator")],
    }


def _shortened(case: Case) -> Case:
    one_step = dataclasses.replace(case, steps=1)
    repeated = repeated_steps(one_step)
    if repeated is None:
        return one_step
    steps, period = repeated
    return with_steps(one_step, min(steps, _PERIODS * period))


def _once(calls: Any) -> list[Any]:
    return list(dict.fromkeys(calls))
