"""How a model's dataflow is found: by a run without memory, by a symbolic trace, by its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from memsave.surgery.dataflow import FORWARD_ERRORS, Dataflow
from memsave.surgery.dataflow_run import guessed_inputs, run_dataflows
from memsave.surgery.dataflow_symbolic import symbolic_dataflows, symbolic_parts

__all__ = ["find_dataflows"]


def find_dataflows(
    model: nn.Module, example_inputs: Any, norms: Sequence[str]
) -> tuple[list[Dataflow], tuple[str, ...]]:
    """Return the dataflows that hold all calls of ``norms`` that can be seen, and how they came.

    A norm that the whole model's forward does not call, or all of them where it cannot be
    followed, are looked for in the parts of the model that can be traced by themselves.
    """
    notes: list[str] = []
    if example_inputs is not None:
        flows = _run(model, example_inputs, notes)
    else:
        flows = _symbolic(model, notes) or _guess(model, notes)
    called = {call.module for flow in flows for call in flow.calls}
    missing = [name for name in norms if name not in called]
    if missing:
        flows = flows + _parts(model, missing, notes)
    return flows, tuple(notes)


def _run(model: nn.Module, example_inputs: Any, notes: list[str]) -> list[Dataflow]:
    args, kwargs = _arguments(example_inputs)
    try:
        flows = run_dataflows(model, args, kwargs)
    except FORWARD_ERRORS as error:
        notes.append(f"the forward could not be followed on the example inputs: {_line(error)}")
        return []
    notes.append("pairs were found in a run on the example inputs, without memory or arithmetic")
    return flows


def _symbolic(model: nn.Module, notes: list[str]) -> list[Dataflow]:
    try:
        flows = symbolic_dataflows(model)
    except FORWARD_ERRORS:
        return []
    notes.append("pairs were found by a symbolic trace, which holds for all inputs")
    return flows


def _guess(model: nn.Module, notes: list[str]) -> list[Dataflow]:
    for inputs in guessed_inputs(model):
        try:
            flows = run_dataflows(model, inputs, {})
        except FORWARD_ERRORS:
            continue
        notes.append(
            f"pairs were found in a run on a made-up input of shape {tuple(inputs[0].shape)}: "
            "give example_inputs if the forward takes other ways with yours"
        )
        for flow in flows:
            _forget_sizes(flow)
        return flows
    notes.append("the forward as a whole could not be followed without example_inputs")
    return []


def _parts(model: nn.Module, missing: Sequence[str], notes: list[str]) -> list[Dataflow]:
    """Return the flows of the parts that hold a missing norm."""
    wanted = set(missing)
    kept = [
        flows
        for flows in symbolic_parts(model)
        if any(call.module in wanted for flow in flows for call in flow.calls)
    ]
    if kept:
        parts = [flows[0].part or "the whole model" for flows in kept]
        more = f" and {len(parts) - 3} more parts" if len(parts) > 3 else ""
        notes.append(f"traced symbolically by themselves: {', '.join(parts[:3])}{more}")
    return [flow for flows in kept for flow in flows]


def _forget_sizes(flow: Dataflow) -> None:
    """Bytes of an input that nobody gave would be made up as well."""
    for call in flow.calls:
        for value in (call.argument, call.result, call.overwrites):
            if value is not None:
                value.nbytes = None


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
