"""Offloading and compression under the tracer: what is in flight, host bytes, folded loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memsave
from bench.case import Case, TechniqueUse
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import simulate
from bench.predict.cards import find_card
from bench.predict.predictor import predict, trace_case, trace_case_folded
from bench.predict.step_trace import Event
from bench.predict.traced_streams import TracedStreams, peak_host_bytes
from bench.predict.tracer import Tracer
from bench.predict.workspaces import fill_workspaces
from memsave.streams import use_streams

SHAPE = (1, 4, 8, 6)
X_BYTES = 4 * 8 * 6 * 4
SETTINGS = AllocatorSettings()


def chain_events(in_flight_bytes: int | None) -> list[Event]:
    """Trace three convolutions, forward and backward; None: without offloading."""
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer, use_streams(TracedStreams(tracer)):
            model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)))
            x = torch.randn(SHAPE)
            tracer.phase("forward")
            if in_flight_bytes is None:
                y = model(x)
            else:
                with memsave.offload(model, minimum_bytes=X_BYTES, in_flight_bytes=in_flight_bytes):
                    y = model(x)
            tracer.phase("held")
            y = y.sum()
            tracer.phase("backward")
            y.backward()
            tracer.phase("end")
            del y
            tracer.stop()
    return tracer.trace.events


def alive_at(events: list[Event], phase: str) -> int:
    """Return the requested bytes alive as a phase begins."""
    alive: dict[int, int] = {}
    for event in events:
        if event == ("phase", phase):
            return sum(alive.values())
        if event[0] == "alloc":
            alive[event[1]] = event[2]
        elif event[0] == "free":
            del alive[event[1]]
    raise AssertionError(f"no phase {phase}")


@pytest.mark.parametrize(
    ("in_flight_bytes", "results"),
    [(None, 2), (0, 0), (X_BYTES - 1, 0), (X_BYTES, 1), (2 * X_BYTES, 2)],
)
def test_a_block_in_flight_stays_active_until_the_wait_on_it(
    in_flight_bytes: int | None, results: int
) -> None:
    """Weights, the input and the output live anyway; of two results those still in flight."""
    events = chain_events(in_flight_bytes)
    weights = 3 * 4 * 4 * 9 * 4
    assert alive_at(events, "held") == weights + (2 + results) * X_BYTES


def test_the_simulator_holds_what_is_in_flight() -> None:
    """Active bytes at the end of the forward: the same blocks, each rounded up to 512 bytes."""
    for in_flight_bytes, blocks in ((0, 2), (X_BYTES, 3)):
        events = _allocator_events(chain_events(in_flight_bytes))
        cut = events.index(("phase", "held"))
        final = simulate(events[:cut], None, SETTINGS).final
        held = 3 * 1024 + blocks * 1024  # a weight is 576 bytes, a block 768: 1024 both
        assert final.active_bytes == held
        assert final.requested_bytes == 3 * 576 + blocks * X_BYTES


def test_backward_allocates_one_block_for_each_result_and_none_for_the_input() -> None:
    events = chain_events(0)
    backward = events[events.index(("phase", "backward")) :]
    restored = [e for e in backward if e[0] == "alloc" and e[2] == X_BYTES]
    plain = chain_events(None)
    whole = plain[plain.index(("phase", "backward")) :]
    gradients = [e for e in whole if e[0] == "alloc" and e[2] == X_BYTES]
    assert len(restored) - len(gradients) == 2
    assert all(e[3] == 0 for e in restored)  # on the stream that computes


def test_host_bytes_are_events_of_their_own() -> None:
    events = chain_events(0)
    changes = [e[1] for e in events if e[0] == "host"]
    assert changes == [X_BYTES] * 3 + [-X_BYTES] * 3
    assert peak_host_bytes(events) == 3 * X_BYTES
    assert peak_host_bytes(chain_events(None)) is None


def test_host_bytes_are_no_memory_of_the_card() -> None:
    trace, _ = trace_case(fcn(offload(minimum_bytes=0)), "cpu")
    assert any(e[0] == "host" for e in trace.events)
    filled = fill_workspaces(trace, find_card("v100-32gb"))
    assert not any(e[0] == "host" for e in filled.events)


def offload(**options: Any) -> TechniqueUse:
    return TechniqueUse(name="offload", options=options)


def fcn(*techniques: TechniqueUse, **changes: Any) -> Case:
    shape = (8, 8, 16)
    values: dict[str, Any] = {"network_options": {"widths": [4, 8]}, "techniques": techniques}
    return Case(
        network="fcn", variant="small", requested_shape=shape, shape=shape, **(values | changes)
    )


def test_a_prediction_has_less_on_the_device_and_host_bytes_beside() -> None:
    card = find_card("v100-32gb")
    plain = predict(fcn(), card, "cpu", SETTINGS)
    moved = predict(fcn(offload(minimum_bytes=4096, in_flight_bytes=0)), card, "cpu", SETTINGS)
    assert plain["peak_host_bytes"] is None
    assert moved["peak_host_bytes"] > 0
    assert moved["peak_requested_bytes"] < plain["peak_requested_bytes"]
    # All that is kept is on the host: never less there than what the device was spared.
    spared = plain["peak_requested_bytes"] - moved["peak_requested_bytes"]
    assert moved["peak_host_bytes"] >= spared


def test_the_second_step_needs_no_more_than_the_first() -> None:
    """Nothing of a step is left alive: no storage in a cache of fake results, no held block."""
    for techniques in (
        [offload(minimum_bytes=0)],
        [TechniqueUse(name="compress_activations", options={"minimum_bytes": 0})],
    ):
        two, _ = trace_case(fcn(*techniques, steps=2), "cpu")
        three, _ = trace_case(fcn(*techniques, steps=3), "cpu")
        peaks = [simulate(_allocator_events(t.events)).peak_requested_bytes for t in (two, three)]
        assert peaks[0] == peaks[1]


def _allocator_events(events: list[Event]) -> list[Event]:
    return [e for e in events if e[0] in ("alloc", "free", "phase")]


def test_what_is_brought_back_is_an_activation_of_the_line_that_made_it() -> None:
    trace, _ = trace_case(fcn(offload(minimum_bytes=4096, in_flight_bytes=0)), "cpu")
    begin = trace.events.index(("phase", "backward"))
    brought = [
        (trace.categories[e[1]], trace.sites[e[1]])
        for e in trace.events[begin:]
        if e[0] == "alloc" and trace.sites[e[1]].operator == "aten.empty.memory_format"
    ]
    restored = [site for category, site in brought if category == "activation"]
    assert restored
    for site in restored:
        assert "offload" not in site.source_line
        assert site.source_line != ""


def test_a_folded_trace_has_the_host_bytes_of_the_whole() -> None:
    """20 slices are told from runs of fewer; host memory grows with the slices."""
    options = {"minimum_bytes": 1024, "in_flight_bytes": 0}
    case = Case(
        network="conv_lstm",
        variant="small",
        network_options={"widths": [2, 3]},
        requested_shape=(8, 8, 40),
        shape=(8, 8, 40),
        steps=1,
        loss="binary_cross_entropy",
        techniques=(offload(**options),),
    )
    folded, _, notes = trace_case_folded(case, "cpu")
    whole, _ = trace_case(case, "cpu")
    assert any("folded" in note for note in notes), notes
    assert folded.events == whole.events
    assert peak_host_bytes(folded.events) == peak_host_bytes(whole.events)
