"""Bytes that the prediction's tracer sees alive: on fake tensors, no memory behind them."""

from __future__ import annotations

from collections.abc import Callable

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.predict.step_trace import Event
from bench.predict.tracer import Tracer

__all__ = ["traced_kept_bytes"]


def traced_kept_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """Return the bytes alive after the forward that ``prepare`` returns, less those before it."""
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer:
            forward = prepare()
            before = _live_bytes(tracer.trace.events)
            result = forward()
            after = _live_bytes(tracer.trace.events)
            del result
            tracer.stop()
    return after - before


def _live_bytes(events: list[Event]) -> int:
    alive: dict[int, int] = {}
    for event in events:
        if event[0] == "alloc":
            alive[event[1]] = event[2]
        elif event[0] == "free":
            del alive[event[1]]
    return sum(alive.values())
