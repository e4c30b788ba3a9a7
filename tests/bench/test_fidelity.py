"""``membench fidelity`` on measured records made up for the test: errors, causes, verdicts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import fidelity as fidelity_module
from bench.case import Case
from bench.cli.fidelity import fidelity as fidelity_command
from bench.errors import MembenchError
from bench.fidelity import (
    Compared,
    Fidelity,
    Predicting,
    card_of,
    compare,
    measured_records,
    spread,
)
from bench.predict.calibration import CALIBRATION_SCHEMA
from bench.predict.cards import find_card
from bench.record import Record, append_record
from bench.report.fidelity import fidelity_markdown, groups, summary_rows
from bench.runner import Progress, TimeLimit
from bench.units import MIB
from tests.bench.records import GIB, make_record

MEASURED: dict[str, Any] = {
    "evidence": "measured",
    "tracer": None,
    "parts": {"tensors_bytes": 2 * GIB, "workspace_bytes": None},
}


def measured(**changes: Any) -> Record:
    return make_record(**{**MEASURED, **changes})


def pair(predicted: dict[str, Any] | None = None, **changes: Any) -> Compared:
    return Compared(
        measured=measured(**changes), predicted=make_record(**(predicted or {})), heldout=False
    )


def test_an_error_is_predicted_over_measured_less_one() -> None:
    one = pair({"peak_allocated_bytes": 3 * GIB}, peak_allocated_bytes=4 * GIB)

    assert one.error("allocated") == -0.25
    assert one.error("requested") == 0.0
    assert pair(peak_reserved_bytes=None).error("reserved") is None


@pytest.mark.parametrize(
    ("more", "workspace", "tensors"),
    [
        (300 * MIB, 300 * MIB, 0),  # within the 512 MiB of workspace that were predicted
        (600 * MIB, 512 * MIB, 88 * MIB),  # beyond them
        (-100 * MIB, -100 * MIB, 0),  # a library took more than was predicted
    ],
)
def test_the_difference_of_allocated_bytes_is_workspace_as_far_as_it_can_be(
    more: int, workspace: int, tensors: int
) -> None:
    allocated = 2 * GIB + GIB // 2
    one = pair(
        {"peak_allocated_bytes": allocated + more, "parts": {"context_bytes": 3 * MIB}},
        parts={"allocator_bytes": MIB, "context_bytes": 5 * MIB},
    )

    causes = one.causes()

    assert (causes.workspace, causes.tensors) == (workspace, tensors)
    assert causes.allocator == GIB // 2 - MIB
    assert causes.context == -2 * MIB


def test_without_workspaces_all_of_it_is_tensors() -> None:
    one = pair({"peak_allocated_bytes": GIB, "parts": {"workspace_bytes": 0}})
    assert (one.causes().workspace, one.causes().tensors) == (0, GIB - (2 * GIB + GIB // 2))


def test_a_spread_counts_cases_under_and_under_by_more_than_the_margin() -> None:
    """1.00, 0.99, 0.97 and 1.04 of what was measured: 0.99 is within the margin of 2 %."""
    base = 1000 * MIB
    pairs = [
        pair({"peak_allocated_bytes": base * part // 100}, peak_allocated_bytes=base)
        for part in (100, 99, 97, 104)
    ]

    found = spread(pairs, "allocated")

    assert found is not None
    assert found.cases == 4
    assert found.median_size == pytest.approx(0.02)
    assert [found.lowest, found.highest] == pytest.approx([-0.03, 0.04])
    assert (found.under, found.under_margin) == (0.5, 0.25)
    assert spread([], "allocated") is None


def test_records_that_are_all_predicted_are_misuse() -> None:
    with pytest.raises(MembenchError, match="no measured record in here: all 1 are predicted"):
        measured_records({"table1": [make_record()]}, [Path("here")])


def test_a_capped_record_is_predicted_for_the_gpu_it_ran_on_at_the_capacity_it_had() -> None:
    record = measured(card="h200-141gb", capped_to="v100-32gb", capacity_bytes=10 * GIB)

    card = card_of(record)

    assert (card.name, card.capacity_bytes) == ("h200-141gb", 10 * GIB)
    assert card.cublas_workspace_bytes == 32 * MIB  # the H200's, not the V100's
    with pytest.raises(MembenchError, match="no card is called"):
        card_of(measured(card="odd-1gb"))
    with pytest.raises(MembenchError, match="names no card"):
        card_of(measured(card=None))


Predict = Callable[[Case], dict[str, Any]]


@pytest.fixture
def predicting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Predict], list[Any]]:
    """Let ``run_cases`` be answered by a function; returns the list of runs asked for."""

    def use(predict: Predict) -> list[Any]:
        runs: list[Any] = []

        def run_cases(run: Any, report: Callable[[Progress], None]) -> list[Record]:
            runs.append(run)
            records = [
                make_record(variant=case.variant, requested_shape=case.shape, **predict(case))
                for case in run.cases
            ]
            for case, record in zip(run.cases, records, strict=True):
                report(Progress(case, record))
            return records

        monkeypatch.setattr(fidelity_module, "run_cases", run_cases)
        return runs

    return use


def test_cases_are_compared_where_both_sides_fit_and_named_where_not(
    predicting: Callable[[Predict], list[Any]],
) -> None:
    answers: dict[str, dict[str, Any]] = {
        "same": {},
        "both": {"status": "oom"},
        "ours": {"status": "oom"},
        "broken": {"status": "failed"},
    }
    predicting(lambda case: answers[case.variant])
    records = [
        measured(variant="same"),
        measured(variant="both", status="oom"),
        measured(variant="ours"),
        measured(variant="broken"),
        measured(variant="crashed", status="failed"),
        measured(variant="nowhere", card="odd-1gb"),
        dataclasses.replace(measured(variant="elsewhere"), definition={"network": "fcn"}),
    ]

    found = compare(records)

    assert [one.measured.variant for one in found.compared] == ["same"]
    assert found.agreed_oom == (records[1].case,)
    assert [a.variant for a, _ in found.differing] == ["ours"]
    said = {case.split("/")[1]: why for case, why in found.not_predicted}
    assert said["crashed"].startswith("measured failed")
    assert said["broken"].startswith("predicted failed")
    assert said["nowhere"].startswith("no card is called 'odd-1gb'")
    assert said["elsewhere"].startswith("not the definition of a case: ")
    assert "'variant'" in said["elsewhere"]


def test_each_card_capacity_and_allocator_setting_is_predicted_as_it_was_measured(
    predicting: Callable[[Predict], list[Any]],
) -> None:
    runs = predicting(lambda _: {})
    expandable = {"allocator_settings": "expandable_segments:True"}

    compare(
        [
            measured(variant="a"),
            measured(variant="b", environment=expandable),
            measured(variant="c", capped_to="titanx-12gb", capacity_bytes=GIB),
            measured(variant="d"),
        ]
    )

    asked = [([c.variant for c in run.cases], run.backend.request) for run in runs]
    assert [names for names, _ in asked] == [["a", "d"], ["b"], ["c"]]
    assert asked[1][1]["allocator_settings"] == "expandable_segments:True"
    capped = asked[2][1]["card"]
    assert capped["memory_bytes"] - capped["context_bytes"] == GIB


def test_predictions_that_are_kept_are_not_made_again_unless_they_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run_cases(run: Any, _report: Callable[[Progress], None]) -> list[Record]:
        run.path.parent.mkdir(exist_ok=True)
        made = []
        for case in run.cases[: 1 if run.limit else None]:
            asked.append(case.variant)
            record = dataclasses.replace(measured(), definition=case.to_definition())
            record = dataclasses.replace(record, evidence="predicted", case=case.name)
            append_record(run.path, record)
            made.append(record)
        return made

    monkeypatch.setattr(fidelity_module, "run_cases", run_cases)
    records = [measured(variant="a"), measured(variant="b")]
    piece = Predicting(kept=tmp_path / "kept", limit=TimeLimit.from_now(60.0))

    first = compare(records, how=piece)
    assert [one.measured.variant for one in first.compared] == ["a"]
    assert first.not_predicted == ((records[1].case, "no time was left to predict it"),)
    second = compare(records, how=piece)
    assert [one.measured.variant for one in second.compared] == ["a", "b"]
    assert second.compared[0].predicted.case == records[0].case
    assert asked == ["a", "b"]

    monkeypatch.setenv("MEMBENCH_COMMIT", "another")
    compare(records, how=Predicting(kept=tmp_path / "kept"))
    compare([measured(variant="a", card="h200-141gb")], how=Predicting(kept=tmp_path / "kept"))
    assert asked == ["a", "b", "a", "b", "a"]


def test_a_folder_that_cannot_keep_predictions_is_misuse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = invoke(results(tmp_path, measured()), "--keep", tmp_path / "file")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: cannot keep predictions in ")
    assert done.stderr.endswith("choose another folder with --keep\n")


def test_the_command_ends_with_1_where_the_time_did_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Predicting] = []

    def compare(_records: Any, _report: Any, how: Predicting) -> Fidelity:
        asked.append(how)
        return Fidelity(compared=(), not_predicted=(("a", "no time was left to predict it"),))

    monkeypatch.setattr(fidelity_module, "compare", compare)
    arguments = (results(tmp_path, measured()), "--time-limit", "9", "--keep", tmp_path / "kept")
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "no time was left for 1 cases: run it again"
    (how,) = asked
    assert (how.kept, how.limit and how.limit.seconds) == (tmp_path / "kept", 9.0)


@pytest.mark.parametrize(
    ("uncalibrated", "suite", "heldout"),
    [
        ((), "table1", False),
        (("convolution workspace (extrapolated)",), "table1", True),
        (("context",), "table1", True),
        (("mixed precision (traced as the CPU runs it)",), "table1", False),
        ((), "suites/heldout.yaml", True),
    ],
)
def test_a_case_is_held_out_where_calibration_saw_not_all_of_it(
    predicting: Callable[[Predict], list[Any]],
    uncalibrated: tuple[str, ...],
    suite: str,
    heldout: bool,
) -> None:
    predicting(lambda _: {"uncalibrated": uncalibrated})
    (one,) = compare([measured(environment={"suite": suite})]).compared
    assert one.heldout == heldout


def test_what_else_differs_is_said(predicting: Callable[[Predict], list[Any]]) -> None:
    predicting(lambda _: {"tracer": "cpu"})
    environment = {"torch": "2.11.0+cu130"}
    record = measured(capped_to="titanx-12gb", capacity_bytes=GIB, environment=environment)

    (one,) = compare([record]).compared

    assert one.remarks == (
        "capped to titanx-12gb",
        "torch 2.11.0+cu130 measured, 2.13.0 predicted",
        "traced on the CPU",
        "v100-32gb is not calibrated",
    )


def test_what_a_calibration_did_not_measure_is_said(
    predicting: Callable[[Predict], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"schema_version": CALIBRATION_SCHEMA, "context": {"networks_bytes": {}}}
    calibration = {**section, "convolutions": [], "operators": []}
    card = dataclasses.replace(find_card("v100-32gb"), calibration=calibration)
    monkeypatch.setattr(fidelity_module, "find_card", lambda _: card)
    outside = "convolution workspace (extrapolated)"
    predicting(lambda case: {"uncalibrated": (outside,) if case.variant == "b" else ()})

    measured_there, outside_of_it = compare([measured(), measured(variant="b")]).compared

    assert not [one for one in measured_there.remarks if "rests on" in one]
    assert outside_of_it.remarks[-1] == f"rests on {outside}"
    assert (measured_there.heldout, outside_of_it.heldout) == (False, True)


def results(folder: Path, *records: Record) -> Path:
    for record in records:
        append_record(folder / "table1.measured.jsonl", record)
    return folder


def invoke(*arguments: object) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fidelity_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_json_has_one_object_for_each_case_that_fits_and_nothing_else(
    tmp_path: Path, predicting: Callable[[Predict], list[Any]]
) -> None:
    predicting(lambda case: {"status": "oom"} if case.variant == "b" else {})
    process = make_record().process_bytes
    assert process is not None
    folder = results(tmp_path, measured(process_bytes=2 * process), measured(variant="b"))

    done = invoke(folder, "--json", "--output", tmp_path / "reports")

    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["case"], found["heldout"]) == ("fcn/baseline/96x96x96/train", False)
    assert {k: v for k, v in found.items() if k.startswith("error_")} == {
        "error_requested": 0.0,
        "error_allocated": 0.0,
        "error_reserved": 0.0,
        "error_process": -0.5,
    }
    verdict = "fcn/b/96x96x96/train: measured ok (3.5 GiB), predicted oom (made oom for a test)"
    assert verdict in done.stderr
    assert verdict in (tmp_path / "reports" / "fidelity.md").read_text()
    assert done.exit_code == 0


def test_the_table_is_printed_for_people(
    tmp_path: Path, predicting: Callable[[Predict], list[Any]]
) -> None:
    predicting(lambda _: {"uncalibrated": ("context",)})
    done = invoke(results(tmp_path, measured(), measured(variant="b")), "--case", "*/b/*")
    assert "held out  allocated" in done.stdout
    assert "1 compared, 0 out of memory on both sides, 0 with another verdict" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no measured record in"),
        (("--case", "*/zz/*"), "no measured record in"),
    ],
)
def test_predicted_records_alone_exit_with_2(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = invoke(results(tmp_path, make_record()), *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_glob_that_matches_nothing_exits_with_2_and_lists_cases(tmp_path: Path) -> None:
    done = invoke(results(tmp_path, measured()), "--case", "*/zz/*")
    assert done.exit_code == 2
    assert "fcn/baseline/96x96x96/train" in done.stderr


def test_a_real_case_predicted_again_has_no_error_against_itself() -> None:
    """Through the real worker: a prediction passed off as measured differs in nothing."""
    record = measured(requested_shape=(16, 16, 16))
    (first,) = compare([record]).compared
    itself = dataclasses.replace(first.predicted, evidence="measured", tracer=None)

    (one,) = compare([itself]).compared

    assert [one.error(q) for q in ("requested", "allocated", "reserved", "process")] == [0.0] * 4
    assert one.causes() == dataclasses.replace(
        one.causes(), tensors=0, workspace=0, allocator=0, context=0
    )


# -- the report ---------------------------------------------------------------------------------


def test_calibrated_and_held_out_cases_stand_apart_with_their_goals() -> None:
    good = pair()
    bad = dataclasses.replace(pair(peak_allocated_bytes=GIB), heldout=True)

    rows = {(row["shapes"], row["bytes"]): row for row in summary_rows([good, bad])}

    assert list(groups([bad, good])) == ["calibrated", "held out"]
    assert rows["calibrated", "allocated"]["goal"] == "1 %, met"
    assert rows["held out", "allocated"]["goal"] == "2 %, missed by 148.00 %"
    assert rows["held out", "allocated"]["highest"] == "+150.0 %"
    assert rows["calibrated", "process"]["goal"] == "-"


def test_the_report_names_versions_causes_worst_cases_and_what_was_left_out() -> None:
    worst = pair(peak_allocated_bytes=GIB, variant="worst")
    ours = measured(variant="verdict")
    found = Fidelity(
        compared=(pair(), worst),
        agreed_oom=("fcn/full/1x1x1/train",),
        differing=((ours, make_record(status="oom")),),
        not_predicted=(("fcn/gone/1x1x1/train", "no such network"),),
    )

    text = fidelity_markdown(found)

    assert "- measured: v100-32gb, torch 2.13.0, cuDNN None, driver None" in text
    assert text.index("fcn/worst/") < text.index("fcn/baseline/")
    for part in ("## Differences by cause", "fcn/full/", "fcn/verdict/", "no such network"):
        assert part in text
    assert "No case is `ok` on both sides." in fidelity_markdown(Fidelity(compared=()))
