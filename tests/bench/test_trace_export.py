"""Predicted runs in other people's forms: PyTorch's snapshot, and Chrome's trace events."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz as untyped_viz
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.errors import MembenchError
from bench.export import check_path, write_snapshot_file
from bench.export.chrome import chrome_trace
from bench.export.measured import recording_history, with_module_frames
from bench.export.recording import Recording, record_run
from bench.export.snapshot import snapshot
from bench.named_case import named_case
from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf
from bench.predict.allocator import simulate
from bench.predict.allocator.blocks import LIVE
from bench.predict.cards import find_card
from bench.predict.predictor import trace_case
from bench.predict.replay import replay
from bench.predict.step_trace import Site, Trace
from bench.predict.trace_data import decode_trace, encode_trace
from bench.predict.trace_file import read_trace
from bench.predict.workspaces import fill_workspaces

_memory_viz: Any = untyped_viz

SUITE = """\
title: Two small cases
card: t4-16gb
matrix:
  networks: [{name: fcn, variant: small, widths: [4, 8]}]
  shapes: [16x16x16, 8x8x8]
"""
CONFIGURATIONS = ("", "expandable_segments:True", "roundup_power2_divisions:4")


@pytest.fixture(scope="module")
def trace() -> Trace:
    case = named_case("fcn", shape="16x16x16", arguments={"widths": [4, 8]})
    return fill_workspaces(trace_case(case, "cpu")[0], find_card("t4-16gb"))


@pytest.fixture(scope="module")
def recording(trace: Trace) -> Recording:
    return record_run(trace, None)


def of_action(data: dict[str, Any], *actions: str) -> list[dict[str, Any]]:
    return [entry for entry in data["device_traces"][0] if entry["action"] in actions]


# -- the recording ------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_recording_makes_the_simulators_decisions(trace: Trace, configuration: str) -> None:
    settings = parse_alloc_conf(configuration)
    recording, result = record_run(trace, None, settings), simulate(trace.events, None, settings)
    assert max(e.reserved_bytes for e in recording.entries) == result.peak_reserved_bytes
    assert recording.allocator.counters == result.final
    allocated = highest = 0
    for entry in recording.entries:
        allocated += entry.block_bytes if entry.action == "alloc" else 0
        allocated -= entry.block_bytes if entry.action == "free_requested" else 0
        highest = max(highest, allocated)
    assert highest == result.peak_allocated_bytes
    held = {block.address for block in recording.allocator.blocks() if block.state == LIVE}
    assert set(recording.identities) == held


def test_a_recording_that_runs_out_of_memory_ends_with_it(trace: Trace) -> None:
    needs = simulate(trace.events).peak_reserved_bytes
    recording = record_run(trace, needs // 2)
    assert recording.entries[-1].action == "oom"
    data = snapshot(recording, trace, AllocatorSettings(), needs // 2)
    assert data["device_traces"][0][-1]["device_free"] >= 0
    assert "OutOfMemoryError" in _memory_viz.trace(data)


def test_a_block_that_another_stream_uses_is_freed_when_that_is_done() -> None:
    events = [("alloc", 0, 512, 0), ("record_stream", 0, 7), ("free", 0), ("alloc", 1, 512, 0),
              ("complete_events", 7), ("alloc", 2, 512, 0), ("empty_cache",)]  # fmt: skip
    site = Site("m", "op", "f.py:1")
    made = Trace(events=events, sites=[site] * 3, categories=["temporary"] * 3)
    actions = [e.action for e in record_run(made, None).entries]
    assert actions == [
        "segment_alloc", "alloc", "free_requested", "alloc", "free_completed", "alloc",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no known kind"):
        record_run(Trace(events=[("what",)]), None)


# -- PyTorch's form -----------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_an_exported_snapshot_replays_to_the_last_address(
    trace: Trace, configuration: str, tmp_path: Path
) -> None:
    settings = parse_alloc_conf(configuration)
    data = snapshot(record_run(trace, None, settings), trace, settings, 2**40)
    write_snapshot_file(tmp_path / "x.pickle", data)
    result = replay(read_trace(tmp_path / "x.pickle"))
    assert result.exact
    assert result.allocations == sum(1 for e in trace.events if e[0] == "alloc" and e[2])
    assert result.reserved_peak_bytes == simulate(trace.events, None, settings).peak_reserved_bytes


def test_pytorchs_own_tool_lists_every_event(trace: Trace, recording: Recording) -> None:
    data = snapshot(recording, trace, AllocatorSettings(), 2**40)
    listed = _memory_viz.trace(data).splitlines()
    entries = data["device_traces"][0]
    assert listed[1] == f"{len(entries)} entries"
    assert len(listed) == len(entries) + 3  # the device, the count, the total at the end
    assert "snapshot" in _memory_viz.trace_plot(data)
    assert f"total_reserved: {_memory_viz.Bytes(recording.allocator.reserved_bytes)}" in (
        _memory_viz.segsum(data)
    )


def test_modules_lines_and_phases_stand_in_the_frames(trace: Trace, recording: Recording) -> None:
    data = snapshot(recording, trace, AllocatorSettings(), 2**40)
    frames = [entry["frames"] for entry in of_action(data, "alloc")]
    assert all(len(stack) == 3 for stack in frames)
    assert any(
        stack[0]["filename"] == "memsave/networks/fcn.py" and stack[0]["line"] > 0
        for stack in frames
    )
    modules = {stack[1]["name"] for stack in frames}
    assert "(no module)" in modules
    assert any(name.startswith("encoder.0.") for name in modules)
    assert {stack[2]["name"].partition(":")[0] for stack in frames} == {
        "model", "forward", "backward", "optimizer",
    }  # fmt: skip
    assert "optimizer: optimizer_state" in {stack[2]["name"] for stack in frames}


def test_segments_add_up_to_what_is_held_at_the_end(trace: Trace, recording: Recording) -> None:
    data, counters = snapshot(recording, trace, AllocatorSettings(), 2**40), recording.allocator
    segments = data["segments"]
    assert sum(s["total_size"] for s in segments) == counters.reserved_bytes
    assert sum(s["allocated_size"] for s in segments) == counters.allocated_bytes
    assert sum(s["requested_size"] for s in segments) == counters.requested_bytes
    for segment in segments:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]


# -- Chrome's form ------------------------------------------------------------------------------


def test_chrome_counters_reach_the_peak_by_category(trace: Trace, recording: Recording) -> None:
    data = chrome_trace(recording, trace, {"case": "a/b", "evidence": "predicted"})
    result = simulate(trace.events)
    counters = [e for e in data["traceEvents"] if e["ph"] == "C"]
    allocated = [e["args"] for e in counters if e["name"] == "allocated bytes"]
    assert max(sum(values.values()) for values in allocated) == result.peak_allocated_bytes
    reserved = [e["args"]["reserved"] for e in counters if e["name"] == "reserved bytes"]
    assert max(reserved) == result.peak_reserved_bytes
    assert set(allocated[0]) >= {"parameter", "gradient", "activation", "workspace"}
    assert data["otherData"]["evidence"] == "predicted"
    json.dumps(data)


def test_chrome_slices_are_the_phases_in_their_order(trace: Trace, recording: Recording) -> None:
    events = chrome_trace(recording, trace, {})["traceEvents"]
    phases = [e for e in events if e["ph"] == "X" and e["cat"] == "phase"]
    assert [e["name"] for e in phases] == ["model", *["forward", "backward", "optimizer"] * 2]
    for one, other in pairwise(phases):
        assert one["ts"] + one["dur"] == other["ts"]
    operators = [e for e in events if e["ph"] == "X" and e["cat"] == "operator"]
    by_thread = Counter(e["tid"] for e in (*phases, *operators))
    assert len(by_thread) == 2
    assert sum(e["args"]["requested_bytes"] for e in operators) == sum(
        e[2] for e in trace.events if e[0] == "alloc"
    )
    for one, other in pairwise(operators):
        assert one["ts"] + one["dur"] <= other["ts"]  # slices of one thread must not cross


def test_a_trace_comes_back_as_it_was_sent(trace: Trace) -> None:
    assert decode_trace(encode_trace(trace)) == trace


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SUITE)
    return tmp_path / "small.yaml"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_writes_a_snapshot_that_replay_finds_exact(suite: Path) -> None:
    path = suite.with_name("x.pickle")
    done = invoke("trace", suite, "--case", "*/8x8x8/*", "-o", path, "--device", "predict")
    assert done.exit_code == 0, done.stderr
    assert "fcn/small/8x8x8/train on t4-16gb, predicted" in done.stdout
    assert str(len(pickle.loads(path.read_bytes())["device_traces"][0])) in done.stdout
    replayed = invoke("replay", path, "--json")
    assert replayed.exit_code == 0
    assert json.loads(replayed.stdout)["addresses_exact"] > 100


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-o", "x.pickle"), "is 2 cases, name one by --case: fcn/small/16x16x16/train, fcn/"),
        (("--case", "*", "-o", "x.json"), "'*' is 2 cases"),
        (("--case", "nope", "-o", "x.json"), "no case of suite small matches 'nope'"),
        (("--case", "*/8x8x8/*", "-o", "x.txt"), "write FILE.pickle, a snapshot"),
        (("--case", "*/8x8x8/*", "-o", "no/such/folder/x.json"), "there is no folder"),
        (("--case", "*/8x8x8/*", "-o", "x.json", "--card", "nope-1gb"), "nope-1gb"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    suite: Path, arguments: tuple[str, ...], why: str
) -> None:
    done = invoke("trace", suite, *arguments, "--device", "predict")
    assert (done.exit_code, done.stdout) == (2, "")
    assert why in done.stderr


def test_a_suite_without_a_card_asks_for_one(suite: Path) -> None:
    suite.write_text(SUITE.replace("card: t4-16gb\n", ""))
    done = invoke("trace", suite, "--case", "*/8x8x8/*", "-o", "x.json", "--device", "predict")
    assert (done.exit_code, "choose one with --card" in done.stderr) == (2, True)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(MembenchError, match="it is a folder"):
        check_path(tmp_path / "x.json")
    with pytest.raises(MembenchError, match="cannot write"):
        write_snapshot_file(tmp_path / "x.json", {})


# -- measured -----------------------------------------------------------------------------------


def test_a_measured_history_names_the_module_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's recording stood in for: the first layer's forward allocates."""
    said: list[str] = []
    entries: list[dict[str, Any]] = []
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_set_memory_metadata", said.append, raising=False)
    monkeypatch.setattr(memory, "_record_memory_history", lambda **k: calls.append(k))
    monkeypatch.setattr(memory, "_snapshot", lambda: {"segments": [], "device_traces": [entries]})

    class Allocates(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entries.append({"action": "alloc", "frames": [], "user_metadata": said[-1]})
            return super().forward(x)

    model = torch.nn.Sequential(Allocates(2, 2), torch.nn.ReLU())
    with recording_history(tmp_path / "x.pickle") as found:
        model(torch.ones(1, 2))
    assert said == ["Sequential", "0", "Sequential", "1", "Sequential", "", ""]
    assert found == {"snapshot_entries": 1}
    assert calls[-1] == {"enabled": None}
    (entry,) = pickle.loads((tmp_path / "x.pickle").read_bytes())["device_traces"][0]
    assert entry["frames"] == [{"filename": "module", "line": 0, "name": "0"}]


def test_a_history_without_names_is_left_as_it_is() -> None:
    data = {"device_traces": [[{"action": "alloc", "frames": []}, {"action": "snapshot"}]]}
    assert with_module_frames(data)["device_traces"][0][0]["frames"] == []
