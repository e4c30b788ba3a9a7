"""``membench report``: what it writes, and one clear line for what it cannot read or write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.cli.console import err, out
from bench.record import append_record
from tests.bench.records import make_record


@pytest.fixture(autouse=True)
def _fresh_consoles() -> None:
    """The runner swaps the streams that the cached consoles hold."""
    out.cache_clear()
    err.cache_clear()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "v100-32gb"
    folder.mkdir(parents=True)
    append_record(folder / "table1.predicted.jsonl", make_record())
    return tmp_path / "results"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_report_is_written_for_every_suite_and_named(results: Path, tmp_path: Path) -> None:
    other = make_record(environment={"suite": "other"})
    append_record(results / "other.predicted.jsonl", other)
    reports = tmp_path / "reports"
    code, stdout, stderr = invoke(results, "--output", reports)
    assert (code, stderr) == (0, "")
    assert stdout == f"report: {reports / 'other.md'}\nreport: {reports / 'table1.md'}\n"
    assert (reports / "table1.md").read_text().startswith("# table1\n")
    assert (reports / "other.md").exists()


def test_reports_go_to_reports_unless_told_otherwise(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(results)[1] == f"report: {Path('reports') / 'table1.md'}\n"
    assert (tmp_path / "reports" / "table1.md").exists()


def assert_refused(answer: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds the parts."""
    code, stdout, stderr = answer
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for part in parts:
        assert part in stderr


def test_a_path_that_is_not_there_is_one_line(results: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    answer = invoke(results, tmp_path / "absent", "--output", reports)
    assert_refused(answer, str(tmp_path / "absent"), "does not exist")
    assert not reports.exists()


def test_a_path_that_cannot_be_looked_at_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:  # as below a folder of another user's; root is never refused
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    answer = invoke(tmp_path / "x", "--output", tmp_path / "r")
    assert_refused(answer, f"cannot read results {tmp_path / 'x'}: Permission denied")


def test_a_folder_without_records_is_one_line(tmp_path: Path) -> None:
    assert_refused(invoke(tmp_path, "--output", tmp_path / "r"), "no records in", str(tmp_path))
    assert not (tmp_path / "r").exists()


def test_a_line_that_is_no_record_is_one_line(results: Path, tmp_path: Path) -> None:
    file = results / "v100-32gb" / "table1.predicted.jsonl"
    with file.open("a") as lines:
        lines.write('{"case": "x"}\n')
    answer = invoke(results, "--output", tmp_path / "r")
    assert_refused(answer, f"{file}, line 2: not a record: no network, variant")
    assert not (tmp_path / "r").exists()


def test_an_output_that_cannot_be_written_is_one_line(results: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    answer = invoke(results, "--output", tmp_path / "file" / "below")
    assert_refused(answer, "cannot write reports to", "--output")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_results_at_all_is_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a folder ``results`` lies at hand: it is taken with --all alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert_refused(invoke(), "no results given", "--all")


def test_all_takes_the_folder_results_and_writes_papers_md_after_the_reports(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results.parent)
    code, stdout, stderr = invoke("--all")
    assert (code, stderr) == (0, "")
    reports = Path("reports")
    assert stdout == f"report: {reports / 'table1.md'}\nreport: {reports / 'papers.md'}\n"
    text = (tmp_path / "reports" / "papers.md").read_text()
    assert "## Memory-efficient FCN" in text
    assert "v100-32gb" in text


def test_all_takes_the_results_that_are_named(results: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "r"
    assert invoke(results, "--all", "--output", out_folder)[0] == 0
    assert (out_folder / "papers.md").exists()


def test_papers_md_is_written_with_all_only(results: Path, tmp_path: Path) -> None:
    assert invoke(results, "--output", tmp_path / "r")[0] == 0
    assert not (tmp_path / "r" / "papers.md").exists()


def test_all_without_a_folder_results_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke("--all"), "results does not exist")


def test_the_command_is_defined_without_what_only_reports_need() -> None:
    """pandas and matplotlib take most of a second to import, which --help must not wait for."""
    code = (
        "import sys, bench.cli.report, bench.report; "
        "heavy = {'pandas', 'matplotlib', 'torch', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("form", "name", "begins"),
    [
        ("markdown", "table1.md", "# table1"),
        ("html", "table1.html", "<!doctype html>"),
        ("latex", "table1.tex", "% Made by membench report"),
    ],
)
def test_a_report_has_the_format_that_is_asked_for(
    results: Path, tmp_path: Path, form: str, name: str, begins: str
) -> None:
    reports = tmp_path / "reports"
    code, stdout, stderr = invoke(results, "--format", form, "--output", reports)
    assert (code, stderr, stdout) == (0, "", f"report: {reports / name}\n")
    assert (reports / name).read_text(encoding="utf-8").startswith(begins)


def test_figures_are_written_beside_the_report_and_named(results: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    code, stdout, _ = invoke(results, "--figures", "--output", reports)
    assert code == 0
    named = [line.removeprefix("report: ") for line in stdout.splitlines()]
    stem = reports / "table1.v100-32gb.predicted"
    assert named == [str(reports / "table1.md"), f"{stem}.bars.png", f"{stem}.bars.svg"]
    assert all(Path(name).stat().st_size > 0 for name in named)


def test_a_format_that_is_none_is_refused() -> None:
    code, _, stderr = invoke("results", "--format", "pdf")
    assert code == 2
    assert "'markdown', 'html', 'latex'" in stderr


def test_without_records_no_page_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    answer = invoke(empty, "--format", "html", "--output", tmp_path / "reports")
    assert_refused(answer, "no records in", "empty.jsonl")
    assert not (tmp_path / "reports").exists()
