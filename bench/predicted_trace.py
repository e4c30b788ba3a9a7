"""The predicted events of one measured case, with the card's workspaces filled in."""

from __future__ import annotations

from bench.backends import predicted_backend
from bench.case import Case
from bench.child import Child
from bench.errors import MembenchError
from bench.fidelity import card_of
from bench.predict.step_trace import Trace
from bench.predict.trace_data import decode_trace
from bench.predict.workspaces import fill_workspaces
from bench.record import Record

__all__ = ["predicted_trace"]


def predicted_trace(record: Record) -> Trace:
    """Trace the record's case in a child process, for the card it was measured on.

    Raises MembenchError where the case cannot be predicted here.
    """
    case, card = Case.from_definition(record.definition), card_of(record)
    backend, _ = predicted_backend(card)
    child = Child(backend.module, backend.child_environment)
    try:
        request = {"case": case.to_definition(), **backend.request, "with_trace": True}
        reply = child.ask(request, case.time_limit_s)
    finally:
        child.close()
    if "trace" not in reply:
        raise MembenchError(f"{case.name} cannot be predicted: {reply.get('reason')}")
    return fill_workspaces(decode_trace(reply["trace"]), card, case.cudnn_benchmark)
