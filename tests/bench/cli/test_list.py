"""``membench list``: every name that a suite or an option can use."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from bench.cli import list as command
from bench.predict.cards import all_cards
from memsave.networks import NETWORKS
from memsave.techniques import TECHNIQUES

ROOT = Path(__file__).resolve().parents[3]

app = typer.Typer()
app.command()(command.list_)


@pytest.fixture(autouse=True)
def no_own_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMBENCH_CARDS", str(tmp_path))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


def test_cards_are_one_unwrapped_line_each_when_piped() -> None:
    result = invoke("cards")

    assert result.exit_code == 0
    assert first_words(result.stdout) == list(all_cards())
    name, model = "v100-32gb".ljust(19), "Tesla V100-SXM2-32GB".ljust(32)
    assert f"{name}{model}7.0   31.7 GiB   31.4 GiB   368 MiB  13.0  no\n" in result.stdout


@pytest.mark.parametrize(("kind", "table"), [("networks", NETWORKS), ("techniques", TECHNIQUES)])
def test_names_are_those_of_the_table(kind: str, table: dict[str, object]) -> None:
    assert first_words(invoke(kind).stdout) == list(table)


def test_shipped_suites_are_listed_with_their_files() -> None:
    rows = json.loads(invoke("suites", "--json").stdout)["suites"]

    assert "table1" in [row["name"] for row in rows]
    assert all(Path(row["path"]).is_file() for row in rows)


def test_without_a_kind_all_four_are_listed() -> None:
    text = invoke().stdout

    headings = [line for line in text.splitlines() if not line.startswith(" ")]
    assert headings == ["networks:", "techniques:", "suites:", "cards:"]
    assert "\n  v100-32gb " in text


def test_json_is_one_object_with_plain_numbers() -> None:
    told = json.loads(invoke("cards", "--json").stdout)

    assert list(told) == ["cards"]
    row = told["cards"][-1]
    sources = {name: row.pop(name) for name in list(row) if name.endswith("_source")}
    assert set(sources) == {"memory_source", "context_source", "context_cuda_source"}
    assert all(sources.values())
    assert row == {
        "name": "v100-32gb",
        "model": "Tesla V100-SXM2-32GB",
        "compute_capability": "7.0",
        "memory_bytes": 34_072_559_616,
        "capacity_bytes": 34_072_559_616 - 368 * (1 << 20),
        "context_bytes": 368 * (1 << 20),
        "context_cuda": "13.0",
        "calibrated": False,
    }
    assert set(json.loads(invoke("--json").stdout)) == {"networks", "techniques", "suites", "cards"}


def test_the_list_for_people_names_the_cuda_version_of_a_context_and_no_paragraph() -> None:
    lines = invoke("cards").stdout.splitlines()

    assert all("  13.0  " in line and "MiB" in line for line in lines)
    assert "Estimate" not in "".join(lines)


def test_a_misspelt_kind_is_misuse_with_the_nearest_word() -> None:
    result = invoke("crads")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: there is no list of 'crads' (did you mean 'cards'?)\n"


def test_on_a_terminal_it_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=130, color_system=None)
    monkeypatch.setattr(command, "out", lambda: console)

    assert invoke("cards").exit_code == 0
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0].split() == ["cards"]
    assert lines[1].split() == [
        "name",
        "model",
        "compute",
        "capability",
        "memory",
        "capacity",
        "context",
        "context",
        "cuda",
        "calibrated",
    ]
    assert lines[-1].split()[:2] == ["v100-32gb", "Tesla"]


def test_on_a_narrow_terminal_names_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(command, "out", lambda: console)

    assert invoke("cards").exit_code == 0
    assert isinstance(console.file, io.StringIO)
    assert set(all_cards()) <= set(console.file.getvalue().split())


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes stdout")
def test_a_closed_stdout_is_no_error() -> None:
    command_line = f"exec {shlex.quote(sys.executable)} -m bench list suites >&-"
    done = subprocess.run(
        ["sh", "-c", command_line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_list_is_no_lines() -> None:
    assert command._lines([]) == []
