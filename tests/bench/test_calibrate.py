"""``membench calibrate`` on a stand-in GPU whose workspaces are known: what is written, what is
gone on with, and that a prediction for the card then takes what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench.calibrate import calibrate as calibrate_module
from bench.calibrate.calibrate import Outcome, Settings, calibrate, card_of
from bench.calibrate.device import convolution_operation, operator_operation, take_reading
from bench.calibrate.device_worker import handler
from bench.calibrate.section import Section, load_section
from bench.calibrate.session import Session, jobs_left
from bench.calibrate.wanted import (
    Wanted,
    calibrated_cases,
    held_out,
    representatives,
    wanted_calls,
)
from bench.case import Case
from bench.cli.calibrate import calibrate as calibrate_command
from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.calibration import CALIBRATION_SCHEMA
from bench.predict.call_notes import operator_call
from bench.predict.cards import Card, find_card
from bench.predict.case_calls import case_calls
from bench.predict.library_calls import ConvolutionCall, OperatorCall
from bench.predict.predictor import predict, trace_case
from bench.predict.workspaces import fill_workspaces
from bench.units import MIB
from tests.bench.calibration_fixtures import (
    HELLO,
    FakeStart,
    convolution,
    first_bytes,
    workspace_bytes,
)
from tests.bench.fake_cuda import FakeCuda
from tests.bench.records import make_case

SMALL = Wanted(
    convolutions=(convolution(8), convolution(16)),
    operators=(OperatorCall("aten.max_pool3d.default", '[[{"dtype": "float32", "tensor": [8]}]]'),),
    held_out=(convolution(12),),
)


@pytest.fixture(autouse=True)
def _one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make_case(), make_case(precision="fp16")]
    monkeypatch.setattr(calibrate_module, "calibrated_cases", lambda _: cases)


def measured(tmp_path: Path, start: FakeStart | None = None, **settings: Any) -> Outcome:
    chosen = Settings(**{"folder": tmp_path, **settings})
    return calibrate(chosen, lambda _: None, start or FakeStart(), HELLO, SMALL)


def test_a_calibration_measures_contexts_and_every_call_with_benchmark_off_and_on(
    tmp_path: Path,
) -> None:
    outcome = measured(tmp_path)

    section = json.loads((tmp_path / "h200-141gb.json").read_text())["calibration"]
    assert outcome.complete
    assert section["complete"] is True
    assert {
        (tuple(row["input"]), row["benchmark"]): row["workspace_bytes"]
        for row in section["convolutions"]
    } == {
        (call.input, on): workspace_bytes(call, on)
        for call in SMALL.convolutions
        for on in (False, True)
    }
    assert [row["benchmark"] for row in section["held_out"]] == [False, True]
    assert section["context"]["networks_bytes"] == {"fcn/fp32": 453 * MIB, "fcn/fp16": 453 * MIB}
    assert (section["context"]["bare_bytes"], section["cublas_workspace_bytes"]) == (
        400 * MIB,
        32 * MIB,
    )
    assert [section[k] for k in ("torch", "cudnn", "driver")] == ["2.11.0+cu130", "91002", "580.1"]
    assert outcome.card.context_bytes == 453 * MIB
    assert "Measured" in outcome.card.context_source


def test_each_context_has_a_process_of_its_own_and_benchmark_is_never_mixed(tmp_path: Path) -> None:
    start = FakeStart()

    measured(tmp_path, start)

    kinds = [[next(iter(r)) for r in process.asked] for process in start.processes]
    assert kinds == [
        *(["context"], ["context"]),
        ["convolution", "convolution", "operator", "convolution"],
        ["convolution"] * 3,
    ]
    assert [process.benchmark for process in start.processes] == [False, False, False, True]
    assert all(process.finished for process in start.processes)


def test_a_piece_out_of_time_is_gone_on_with_where_it_stopped(tmp_path: Path) -> None:
    pieces = []
    for _ in range(12):
        start = FakeStart()
        outcome = measured(tmp_path, start, limit_s=0.0)
        pieces.append(start.asked)
        if outcome.complete:
            break

    whole = FakeStart()
    measured(tmp_path / "other", whole)
    assert all(len(piece) == 1 for piece in pieces)
    assert [request for piece in pieces for request in piece] == whole.asked
    again = FakeStart()
    assert measured(tmp_path, again).complete
    assert again.asked == []


def test_the_card_names_the_suites_of_all_its_pieces(tmp_path: Path) -> None:
    for suite in ("table1", "flare21", "table1"):
        measured(tmp_path, suites=(suite,))

    section = json.loads((tmp_path / "h200-141gb.json").read_text())["calibration"]
    assert section["suites"] == ["flare21", "table1"]


def test_other_software_is_measured_anew_and_says_so(tmp_path: Path) -> None:
    measured(tmp_path)

    changed = {**HELLO, "driver": "590.2"}
    section = load_section(tmp_path / "h200-141gb.json", changed)

    assert section.readings == {}
    assert section.notes == ["measured anew: the one before was with driver 580.1"]


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (3, "its calibration is no JSON object: remove the file"),
        ([1], "its calibration is no JSON object: remove the file"),
        ({}, None),
        ({"notes": None}, "cannot be gone on with"),
        (
            {"notes": [], "suites": [], "convolutions": [3], "held_out": []},
            "cannot be gone on with",
        ),
    ],
)
def test_a_section_of_another_form_is_named_with_its_file(
    tmp_path: Path, calibration: Any, said: str | None
) -> None:
    if isinstance(calibration, dict) and calibration:
        calibration = {**HELLO, "schema_version": CALIBRATION_SCHEMA, **calibration}
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"calibration": calibration}))
    if said is None:
        assert load_section(path, HELLO).readings == {}
        return
    with pytest.raises(MembenchError, match=said) as raised:
        load_section(path, HELLO)
    assert str(path) in str(raised.value)


def test_a_call_that_ends_the_process_costs_that_call_alone(tmp_path: Path) -> None:
    wanted = dataclasses.replace(SMALL, convolutions=(convolution(8, channels=7), convolution(16)))
    start = FakeStart(crashes=(7,))

    outcome = calibrate(Settings(folder=tmp_path), lambda _: None, start, HELLO, wanted)

    section = outcome.section.to_dict()
    assert outcome.complete
    assert [row["skipped"] for row in section["not_measured"]] == ["process killed by SIGSEGV"] * 2
    assert {tuple(row["input"]) for row in section["convolutions"]} == {convolution(16).input}
    restored = load_section(outcome.path, HELLO)
    assert jobs_left(restored, wanted, [make_case(), make_case(precision="fp16")]) == []


def test_what_was_measured_is_saved_while_the_session_runs() -> None:
    times = iter(range(0, 1000, 7))
    saved: list[int] = []
    section = Section({})
    session = Session(
        section,
        FakeStart(),
        lambda: saved.append(len(section.readings)),
        clock=lambda: float(next(times)),
    )

    session.run(jobs_left(section, dataclasses.replace(SMALL, operators=()), []), 500.0)

    # Every second job of 7 s; the third and the sixth are held out, and lie apart.
    assert saved == [1, 2, 4, 4]


def test_a_card_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MembenchError, match="cannot write the card"):
        measured(tmp_path / "file")


def test_a_gpu_without_a_card_file_gets_one() -> None:
    hello = {**HELLO, "gpu": "NVIDIA Zeta 9", "memory_bytes": 23 * 2**30}

    card = card_of(hello)

    assert (card.name, card.model, card.compute_capability) == (
        "zeta9-24gb",
        "NVIDIA Zeta 9",
        (9, 0),
    )


def test_without_a_gpu_the_command_says_so_and_exits_2() -> None:
    app = typer.Typer()
    app.command()(calibrate_command)

    result = CliRunner().invoke(app, [])

    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "membench calibrate measures on a GPU, and here is none" in line


@pytest.mark.parametrize("complete", [True, False])
def test_the_command_prints_what_it_found_and_whether_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    outcome = dataclasses.replace(measured(tmp_path), complete=complete)
    outcome.section.context["cublas_workspace_bytes"] = 5
    asked: list[Settings] = []
    monkeypatch.setattr(calibrate_module, "check_gpu", lambda: None)

    def answer(settings: Settings, _report: object) -> Outcome:
        asked.append(settings)
        return outcome

    monkeypatch.setattr(calibrate_module, "calibrate", answer)
    app = typer.Typer()
    app.command()(calibrate_command)

    arguments = ["-o", str(tmp_path), "--suite", "table1", "--time-limit", "9", "--hold-out", "0"]
    result = CliRunner().invoke(app, arguments)

    assert asked == [Settings(folder=tmp_path, suites=("table1",), limit_s=9.0, hold_out=0.0)]
    assert result.exit_code == (0 if complete else 1)
    assert "context, with a network: 453 MiB" in result.stdout
    assert "convolutions: 4 measured, 2 held out; other operators: 1" in result.stdout
    assert "cuBLAS took 5 bytes" in result.stderr
    assert ("run membench calibrate again" in result.stderr) != complete


# -- what is measured ---------------------------------------------------------------------------


def test_the_held_out_suite_and_networks_of_a_users_own_are_not_seen() -> None:
    with pytest.raises(MembenchError, match="never sees"):
        calibrated_cases(["heldout"])
    assert {case.network for case in calibrated_cases(["flare21"])} == {"light_unet", "dense_vnet"}


def test_about_the_share_of_input_shapes_is_held_out_whatever_the_variant() -> None:
    cases = [make_case(requested_shape=(side, side, side)) for side in range(16, 16 + 400)]
    share = sum(held_out(case, 0.25) for case in cases) / len(cases)
    assert 0.18 < share < 0.32  # three deviations of 400 draws
    assert not any(held_out(case, 0.0) for case in cases)
    for case in cases[:20]:
        other = dataclasses.replace(case, variant="ccblock", precision="fp16")
        assert held_out(other, 0.25) == held_out(case, 0.25)


def test_calls_are_measured_once_largest_last_and_held_out_ones_apart() -> None:
    shapes = [(side, side, side) for side in range(16, 200)]
    inside = make_case(requested_shape=next(s for s in shapes if not apart(s)))
    outside = make_case(requested_shape=next(s for s in shapes if apart(s)))
    big, small, theirs = convolution(32), convolution(8), convolution(12)
    answers = {
        inside.name: [big, small, big],
        outside.name: [small, theirs],
    }

    def ask(case: Case) -> dict[str, Any]:
        calls = [call.to_dict() for call in answers[case.name]]
        operators = [{"operator": f"aten.{case.shape[0]}.default", "arguments": "[]"}]
        return {"convolutions": calls, "operators": operators}

    wanted = wanted_calls([outside, inside], ask, 0.3)

    assert wanted_calls([inside, outside], ask, 0.3) == wanted
    assert wanted.convolutions == (small, big)
    assert wanted.held_out == (theirs,)
    assert [call.operator for call in wanted.operators] == [f"aten.{inside.shape[0]}.default"]


def apart(shape: tuple[int, ...]) -> bool:
    return held_out(make_case(requested_shape=shape), 0.3)


def test_a_case_that_cannot_be_traced_is_named() -> None:
    wanted = wanted_calls([make_case()], lambda _: {"status": "failed", "reason": "no"}, 0.0)
    assert wanted.skipped == ("fcn/baseline/96x96x96/train: no",)


def test_the_smallest_training_case_stands_for_a_network_and_precision() -> None:
    small = make_case(requested_shape=(8, 8, 8))
    cases = [make_case(), small, make_case(requested_shape=(4, 4, 4), mode="infer")]
    half = make_case(precision="fp16")
    assert representatives([*cases, half]) == [small, half]


# -- what the device worker does, on CPU tensors ------------------------------------------------


def test_the_excess_of_a_call_is_what_it_took_beside_its_results() -> None:
    gpu = FakeCuda()

    def run() -> str:
        gpu.allocate(MIB)  # the result, which stays until the reading
        gpu.allocate(3 * MIB)
        gpu.free(3 * MIB)
        return "result"

    reading = take_reading(gpu, lambda: run, 0)

    assert reading == {"first_bytes": 3 * MIB, "workspace_bytes": 3 * MIB}
    assert gpu.reads_while_busy == 0


def test_a_call_that_is_refused_says_why_and_one_too_large_is_not_made() -> None:
    gpu = FakeCuda()
    refused = take_reading(gpu, lambda: lambda: gpu.allocate(2**40), 0)
    assert refused["skipped"].startswith("refused: CUDA out of memory")
    assert "are free" in take_reading(gpu, lambda: pytest.fail("made"), 2**40)["skipped"]

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        take_reading(gpu, lambda: lost, 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_direction_of_a_traced_convolution_can_be_made_again(
    transposed: bool, channels_last: bool
) -> None:
    """Called for real, each gives the shape that the trace says."""
    shapes: dict[str, Any] = {"input": (2, 4, 5, 6, 7), "weight": (6, 2, 3, 3, 3), "groups": 2}
    shapes["output"] = (2, 6, 5, 6, 7)
    if transposed:
        shapes |= {"weight": (4, 3, 3, 3, 3)}
    for direction, shape in (
        ("forward", shapes["output"]),
        ("input_gradient", shapes["input"]),
        ("weight_gradient", shapes["weight"]),
    ):
        call = convolution(
            direction=direction, transposed=transposed, channels_last=channels_last, **shapes
        )
        result = convolution_operation(call, torch.device("cpu"))()
        given = [t for t in (result if isinstance(result, tuple) else [result]) if t is not None]
        assert [tuple(t.shape) for t in given] == [shape]


def test_an_operators_arguments_come_back_from_their_data() -> None:
    a, bias = torch.rand(3, 4).t(), torch.rand(1).expand(4, 3)
    args = ([a, bias], 1)
    call = operator_call(torch.ops.aten.cat.default, args, None, "cpu")
    assert call is not None
    assert call.tensors == (((4, 3), "float32"), ((4, 3), "float32"))
    assert operator_operation(call, torch.device("cpu"))().shape == (4, 6)

    named = {"dtype": torch.float16, "memory_format": torch.contiguous_format}
    converted = operator_call(torch.ops.aten._to_copy.default, (a,), named, "cpu")
    assert converted is not None
    assert operator_operation(converted, torch.device("cpu"))().dtype == torch.float16
    assert operator_call(torch.ops.aten.add.Tensor, (object(), a), {}, "cpu") is None
    assert operator_call(torch.ops.aten.zeros.default, ([3],), {}, "cpu") is None


def test_the_device_worker_answers_each_kind_of_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import nvml

    gpu = FakeCuda()
    monkeypatch.setattr(nvml, "best_process_bytes", lambda *_, **__: gpu.process_bytes)
    handle = handler(gpu, None)

    small = convolution(4, channels=1).to_dict()
    assert handle({"convolution": small}) == {"first_bytes": 0, "workspace_bytes": 0}
    pool = {
        "operator": "aten.relu.default",
        "arguments": '[[{"tensor": [4], "dtype": "float32"}], {}]',
    }
    assert handle({"operator": pool}) == {"first_bytes": 0, "workspace_bytes": 0}
    context = handle({"context": make_case(requested_shape=(16, 16, 16)).to_definition()})
    readings = [context[k] for k in ("bare_bytes", "cudnn_bytes", "network_bytes")]
    assert readings == [gpu.context_bytes] * 3
    assert context["notes"] == []


def test_views_and_what_the_tracer_knows_are_not_measured() -> None:
    calls = case_calls(make_case(requested_shape=(16, 16, 16)), "cpu")
    names = {row["operator"] for row in calls["operators"]}
    assert "aten._foreach_add_.Scalar" in names
    assert not [name for name in names if name.startswith(("aten.sum.", "aten.view.", "aten.t."))]
    assert not [name for name in names if "convolution" in name]


def test_of_a_loop_of_equal_steps_a_few_are_traced() -> None:
    case = make_case(
        network="conv_lstm", variant="v", requested_shape=(32, 32, 40), loss="binary_cross_entropy"
    )
    calls = case_calls(case, "cpu")
    assert {tuple(row["input"][2:]) for row in calls["convolutions"]} <= {
        (side, side) for side in (32, 16, 8, 4, 2)
    }


# -- what a prediction makes of it --------------------------------------------------------------


def calibrated(case: Case, tmp_path: Path, keep: int | None = None) -> Card:
    """The H200 after a calibration that saw the first ``keep`` of the case's convolutions."""
    calls = case_calls(case, "cpu")
    rows = [ConvolutionCall.from_dict(row) for row in calls["convolutions"]]
    wanted = Wanted(tuple(rows[:keep]), (), ())
    outcome = calibrate(Settings(folder=tmp_path), lambda _: None, FakeStart(), HELLO, wanted)
    return outcome.card


@pytest.mark.parametrize("trying", [False, True])
def test_a_prediction_takes_the_measured_workspaces_call_by_call(
    tmp_path: Path, trying: bool
) -> None:
    case = make_case(requested_shape=(16, 16, 16), cudnn_benchmark=trying)
    card = calibrated(case, tmp_path)
    trace, _ = trace_case(case, "cpu")

    filled = fill_workspaces(trace, card, trying)

    seen: set[ConvolutionCall] = set()
    wanted = []
    for event in trace.events:
        if event[0] == "convolution":
            call = event[3]
            if trying and call not in seen:  # tried out, and then run
                wanted.append(first_bytes(call, trying))
            wanted.append(workspace_bytes(call, trying))
            seen.add(call)
    sizes = [
        event[2]
        for event in filled.events
        if event[0] == "alloc" and filled.categories[event[1]] == "workspace"
    ]
    assert sizes == wanted
    assert len(wanted) > len(seen) > 10
    emptied = [event for event in filled.events if event[0] == "empty_cache"]
    assert len(emptied) == (len(seen) if trying else 0)  # torch gives the cache back after a trial


def test_a_calibrated_prediction_names_nothing_uncalibrated_and_uses_the_networks_context(
    tmp_path: Path,
) -> None:
    case = make_case(requested_shape=(16, 16, 16))
    card = calibrated(case, tmp_path)
    assert card.calibration is not None
    context = {"networks_bytes": {"fcn/fp32": 333 * MIB, "fcn/fp16": 453 * MIB}}
    card = dataclasses.replace(card, calibration={**card.calibration, "context": context})

    fields = predict(case, card, "cpu", AllocatorSettings())

    assert fields["uncalibrated"] == ()
    assert fields["parts"]["context_bytes"] == 333 * MIB  # not the card's, of all networks
    assert fields["capacity_bytes"] == card.memory_bytes - 333 * MIB
    said = [note for note in fields["notes"] if "calibration of h200-141gb" in note]
    assert len(said) == 1
    assert "torch 2.11.0, here" in said[0]


def test_shapes_that_calibration_did_not_see_are_marked(tmp_path: Path) -> None:
    case = make_case(requested_shape=(16, 16, 16))
    card = calibrated(case, tmp_path, keep=12)

    marked = predict(case, card, "cpu", AllocatorSettings())["uncalibrated"]

    # The first twelve are all of the forward pass: the gradients have nothing like them.
    assert "convolution workspace" in marked


def test_what_is_tried_out_does_not_count_as_needed(tmp_path: Path) -> None:
    case = make_case(requested_shape=(32, 32, 32), cudnn_benchmark=True)
    card = calibrated(case, tmp_path)

    def trying(more_bytes: int) -> dict[str, Any]:
        assert card.calibration is not None
        rows = [
            {**row, "first_bytes": row["workspace_bytes"] + more_bytes}
            for row in card.calibration["convolutions"]
        ]
        calibration = {**card.calibration, "convolutions": rows}
        tried = dataclasses.replace(card, calibration=calibration)
        return predict(case, tried, "cpu", AllocatorSettings())

    # More than the optimizer's state, which the second step has and the first, that tries, has not.
    much, nothing = trying(512 * MIB), trying(0)

    assert much["needs_bytes"] == nothing["needs_bytes"]
    assert much["peak_allocated_bytes"] > nothing["peak_allocated_bytes"]


def test_trials_take_no_more_than_there_is() -> None:
    call = convolution(64, channels=16)
    from bench.predict.step_trace import Site, Trace

    site = Site("m", "op", "f.py:1")
    event = ("convolution", call.operand_bytes, "float32", call, site)
    row = {**call.to_dict(), "benchmark": True, "first_bytes": 2**50, "workspace_bytes": 77}
    data = {"schema_version": 1, "context": {"networks_bytes": {}}, "operators": []}
    card = dataclasses.replace(find_card("h200-141gb"), calibration={**data, "convolutions": [row]})

    events = fill_workspaces(Trace(events=[event, event]), card, True).events

    assert [e[2] for e in events if e[0] == "alloc"] == [card.capacity_bytes, 77, 77]
