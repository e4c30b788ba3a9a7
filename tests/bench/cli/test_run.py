"""``membench run`` from end to end: a small suite, predicted in real workers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bench import runner
from bench.cli import app
from bench.cli.run import _print_table
from bench.record import Record, read_records
from tests.bench.records import make_record

ROOT = Path(__file__).resolve().parents[3]
run_command = importlib.import_module("bench.cli.run")

SUITE = """\
title: A small suite
card: v100-32gb
matrix:
  networks:
    - {name: fcn, variant: small, widths: [4, 8]}
    - {name: fcn, variant: small+abn, widths: [4, 8], norm: inplace_abn}
  shapes: [16x16x16, {shape: 16x16x21, pad: true}]
paper:
  citation: "a paper"
  unit: GB
  figures: {small: {16x16x16: 1.5}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def predict(suite: Path, *arguments: object) -> Result:
    return invoke(
        "run", suite, "--device", "predict", "--results", suite.parent / "results", *arguments
    )


def results_of(suite: Path, card: str = "v100-32gb") -> Path:
    return suite.parent / "results" / card / "small.predicted.jsonl"


def test_a_run_prints_the_table_and_appends_the_records(suite: Path) -> None:
    result = predict(suite)
    assert result.exit_code == 0, result.output
    assert "small+abn" in result.stdout
    assert "predicted" in result.stdout
    assert f"records: {results_of(suite)}" in result.stdout
    records = list(read_records(results_of(suite)))
    assert sorted(r.case for r in records) == [
        "fcn/small+abn/16x16x16/train",
        "fcn/small+abn/16x16x21/train",
        "fcn/small/16x16x16/train",
        "fcn/small/16x16x21/train",
    ]
    assert {r.shape for r in records} == {(16, 16, 16), (16, 16, 22)}
    assert all(r.status == "ok" and r.evidence == "predicted" for r in records)


FIELDS: dict[str, Any] = {
    "case": str,
    "network": str,
    "variant": str,
    "techniques": list,
    "exact": bool,
    "precision": str,
    "shape": list,
    "requested_shape": list,
    "mode": str,
    "batch_size": int,
    "parameters": int,
    "status": str,
    "reason": str,
    "evidence": str,
    "tracer": str,
    "card": str,
    "capped_to": type(None),
    "capacity_bytes": int,
    "needs_bytes": int,
    "peak_requested_bytes": int,
    "peak_allocated_bytes": int,
    "peak_reserved_bytes": int,
    "process_bytes": int,
    "parts": dict,
    "uncalibrated": list,
    "phases": dict,
    "peak_holders": list,
    "step_times_s": list,
    "definition": dict,
    "environment": dict,
    "schema_version": int,
}


def test_json_gives_one_record_a_line_with_the_names_that_scripts_rely_on(suite: Path) -> None:
    result = predict(suite, "--json", "--case", "*/small+abn/16x16x16/*")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    for name, kind in FIELDS.items():
        assert isinstance(record[name], kind), name
    assert set(record["parts"]) == {
        "tensors_bytes",
        "allocator_bytes",
        "workspace_bytes",
        "context_bytes",
    }
    assert set(record["phases"]) == {"model", "forward", "backward", "optimizer"}
    assert set(record["peak_holders"][0]) == {
        "module",
        "operator",
        "source_line",
        "category",
        "bytes",
    }
    assert record["techniques"] == ["inplace_abn"]
    assert record["environment"]["suite"] == "small"
    assert "run" not in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="a pseudo-terminal as on Linux")
def test_json_goes_to_stdout_where_the_bar_is_drawn_on_a_terminal(suite: Path) -> None:
    """As in ``membench run SUITE --json > records.jsonl`` typed into a terminal."""
    terminal, stderr = os.openpty()
    command = [sys.executable, "-m", "bench", "run", str(suite), "--device", "predict", "--json"]
    command += ["--results", str(suite.parent / "results"), "--case", "*/small/16x16x16/*"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:
        os.close(stderr)
        drawn = b""
        with suppress(OSError):  # what reading says once nobody holds the other end
            while chunk := os.read(terminal, 4096):
                drawn += chunk
        stdout, _ = process.communicate(timeout=60)
    os.close(terminal)
    (line,) = stdout.splitlines()
    assert json.loads(line)["case"] == "fcn/small/16x16x16/train"
    assert b"1/1" in drawn
    assert b"schema_version" not in drawn


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes stderr")
def test_with_stderr_closed_json_is_still_records_and_nothing_else(suite: Path) -> None:
    arguments = [sys.executable, "-m", "bench", "run", str(suite), "--device", "predict"]
    arguments += ["--results", str(suite.parent / "results"), "--json", "--case", "*/small/16x*"]
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(arguments)} 2>&-"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok", "ok"]


def test_the_paper_figure_is_in_the_definition_in_bytes(suite: Path) -> None:
    predict(suite, "--case", "*/small/16x16x16/*")
    (record,) = read_records(results_of(suite))
    assert record.definition["paper"] == {"text": "1.5 GB", "relation": "=", "bytes": 1_500_000_000}


def test_a_case_can_be_run_again_from_its_record_alone(suite: Path) -> None:
    from bench.case import Case

    predict(suite, "--case", "*/small/16x16x21/*")
    (record,) = read_records(results_of(suite))
    case = Case.from_definition(json.loads(record.to_json())["definition"])
    assert (case.name, case.shape) == (record.case, (16, 16, 22))
    assert case.to_definition() == record.definition


def test_a_glob_also_matches_the_padded_shape(suite: Path) -> None:
    result = predict(suite, "--json", "--case", "*/16x16x22/*")
    assert {json.loads(line)["case"] for line in result.stdout.splitlines()} == {
        "fcn/small/16x16x21/train",
        "fcn/small+abn/16x16x21/train",
    }


def test_resume_runs_only_what_is_missing(suite: Path) -> None:
    predict(suite, "--case", "*/small/*")
    before = results_of(suite).read_text().splitlines()
    assert len(before) == 2
    result = predict(suite, "--resume", "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 4
    after = results_of(suite).read_text().splitlines()
    assert after[:2] == before
    assert [json.loads(line)["variant"] for line in after[2:]] == ["small+abn", "small+abn"]
    again = predict(suite, "--resume")
    assert again.exit_code == 0
    assert results_of(suite).read_text().splitlines() == after


def test_resume_after_a_line_that_was_cut_off_runs_that_case_again(suite: Path) -> None:
    predict(suite)
    path = results_of(suite)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:200])
    assert predict(suite, "--resume").exit_code == 0
    assert len({r.case for r in read_records(path)}) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="signals as on Linux")
def test_a_run_out_of_time_says_what_is_left_and_resume_finishes(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner.run_cases

    def first_only(plan: runner.Run, report: Any) -> list[Record]:
        assert plan.limit is not None
        assert plan.limit.seconds == 50.0
        return whole(dataclasses.replace(plan, cases=plan.cases[:1]), report)

    monkeypatch.setattr(run_command, "run_cases", first_only)
    result = predict(suite, "--time-limit", "50")
    assert result.exit_code == 1
    assert "3 cases are left: run it again with --resume" in result.stderr
    assert "small" in result.stdout

    monkeypatch.setattr(run_command, "run_cases", whole)
    assert predict(suite, "--resume", "--time-limit", "100").exit_code == 0
    assert len(list(read_records(results_of(suite)))) == 4


def test_ctrl_c_says_how_to_go_on_and_resume_finishes(suite: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", str(suite), "--device", "predict"]
    command += ["--results", str(suite.parent / "results")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while ": ok" not in process.stderr.readline():  # until the first case has finished
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    finished = results_of(suite).read_text().splitlines()
    assert 1 <= len(finished) <= 4
    if process.returncode != 0:  # it may have been at its end
        assert process.returncode == 130
        assert stdout == ""
        assert stderr.splitlines()[-1].startswith("interrupted; finished cases are in ")
    assert predict(suite, "--resume").exit_code == 0
    after = results_of(suite).read_text().splitlines()
    assert after[: len(finished)] == finished
    assert len(after) == 4


def test_another_card_gets_its_own_file_and_capacity(suite: Path) -> None:
    predict(suite, "--card", "rtx4090-24gb", "--case", "*/small/16x16x16/*")
    (record,) = read_records(results_of(suite, "rtx4090-24gb"))
    assert record.card == "rtx4090-24gb"
    assert record.capacity_bytes is not None
    assert 22 * 2**30 < record.capacity_bytes < 24 * 2**30


def test_a_case_that_cannot_be_run_is_recorded_and_exits_1(suite: Path) -> None:
    """One voxel a channel: batch norm has no variance there, which only the step itself finds."""
    text = SUITE.replace("[16x16x16, {shape: 16x16x21, pad: true}]", "[16x16x16]").replace(
        "widths: [4, 8]}", "widths: [4, 8]}\n    - {name: fcn, variant: deep, levels: 5}"
    )
    suite.write_text(text)
    result = predict(suite)
    records = {r.variant: r for r in read_records(results_of(suite))}
    assert result.exit_code == 1
    assert records["deep"].status == "failed"
    assert "more than 1 value per channel" in records["deep"].reason
    assert records["small"].status == "ok"
    assert "fcn/deep/16x16x16/train: failed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "v100-33gb"], "v100-32gb"),
        (["--card", ""], "no card is called ''"),
        (["--case", "nothing*"], "nothing*"),
        (["--volumes", "no-such-folder"], "no-such-folder"),
        (["--spacing", "1,1"], "spacing"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    suite: Path, arguments: list[str], message: str
) -> None:
    result = predict(suite, *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""
    assert not (suite.parent / "results").exists()


def test_a_row_with_a_card_of_its_own_is_predicted_for_that_one(suite: Path) -> None:
    """Its record lies in that card's folder; a card on the command line is for all rows."""
    text = suite.read_text()
    row = next(line for line in text.splitlines() if "variant:" in line)
    suite.write_text(text.replace(row, row.replace("variant:", "card: t4-16gb, variant:", 1), 1))
    result = predict(suite, "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    here = list(read_records(results_of(suite)))
    there = list(read_records(results_of(suite, "t4-16gb")))
    assert {r.card for r in here} == {"v100-32gb"}
    assert {r.card for r in there} == {"t4-16gb"}
    assert len(here) + len(there) == len(lines)
    named = predict(suite, "--card", "p100-16gb")
    assert named.exit_code == 0, named.output
    assert len(list(read_records(results_of(suite, "p100-16gb")))) == len(lines)


def test_a_row_s_unknown_card_is_named_with_its_line(suite: Path) -> None:
    text = suite.read_text()
    row = next(line for line in text.splitlines() if "variant:" in line)
    suite.write_text(text.replace(row, row.replace("variant:", "card: t4-17gb, variant:", 1), 1))
    result = predict(suite)
    assert result.exit_code == 2
    assert "t4-17gb" in result.stderr
    assert f"line {text.splitlines().index(row) + 1}" in result.stderr


def test_a_results_folder_that_cannot_be_written_is_one_line(suite: Path) -> None:
    (suite.parent / "results").write_text("a file")
    result = predict(suite)
    assert result.exit_code == 2
    assert "cannot write results" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_allocator_settings_that_torch_would_refuse_are_one_line(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "no_such_option:1")
    result = predict(suite)
    assert result.exit_code == 2
    assert "no_such_option" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (suite.parent / "results").exists()


def test_cuda_where_there_is_none_is_one_line(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = invoke("run", suite, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device predict" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_suite_offers_the_shipped_ones() -> None:
    result = invoke("run", "tabel1", "--device", "predict")
    assert result.exit_code == 2
    assert "table1" in result.stderr


def piped_into_forty_columns(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A real process with pipes, in a narrow terminal's environment."""
    return subprocess.run(
        [sys.executable, "-m", "bench", "run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
        check=False,
    )


def test_errors_are_not_folded_when_piped(suite: Path) -> None:
    done = piped_into_forty_columns(str(suite), "--card", "x" * 150)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_misspelt_option_is_not_folded_when_piped(suite: Path) -> None:
    done = piped_into_forty_columns(str(suite), "--device", "x" * 150)
    assert done.returncode == 2
    assert "x" * 150 in done.stderr.splitlines()[-1]
    assert "'predict'" in done.stderr.splitlines()[-1]


def test_a_results_file_is_named_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    _print_table([make_record()], [Path("my-results/[bold]x.jsonl")])
    assert capsys.readouterr().out.endswith("records: my-results/[bold]x.jsonl\n")


def test_the_command_line_starts_without_torch() -> None:
    script = (
        "import sys, bench.cli; "
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'pydantic', 'nibabel') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
