"""``membench replay``: what it prints and how it exits."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench.cli.replay import replay
from bench.predict.cards import find_card
from bench.units import GIB
from tests.bench.predict.random_runs import SETUPS
from tests.bench.predict.snapshots import (
    RECORDED,
    random_snapshot,
    recorded_data,
    recorded_path,
    shift_addresses,
    write_snapshot,
)


@pytest.fixture(name="app")
def _app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(replay)
    return app


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return write_snapshot(tmp_path / "snapshot.pickle", random_snapshot(SETUPS["default"], 4))


def run(app: typer.Typer, *arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_an_exact_replay_says_so_and_exits_with_0(app: typer.Typer, path: Path) -> None:
    code, stdout, _ = run(app, path)
    allocations = json.loads(run(app, path, "--json")[1])["allocations"]
    assert code == 0
    assert f"{allocations}/{allocations} allocations at the recorded address\n" in stdout
    assert stdout.count("as recorded") == 3
    assert "fit" not in stdout


def test_json_is_one_object_and_nothing_else(app: typer.Typer, path: Path) -> None:
    code, stdout, stderr = run(app, path, "--json", "--capacity", "24GiB")
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    assert result["addresses_exact"] == result["allocations"] > 0
    assert (result["fits"], result["oom_at_event"]) == (True, None)


@pytest.mark.parametrize("name", RECORDED)
def test_ten_shifted_addresses_exit_with_1(app: typer.Typer, tmp_path: Path, name: str) -> None:
    data = recorded_data(name)
    shift_addresses(data["events"], "alloc", 10, seed=1)
    shifted = tmp_path / "shifted.json.gz"
    shifted.write_bytes(gzip.compress(json.dumps(data).encode()))
    code, stdout, stderr = run(app, shifted, "--json")
    result = json.loads(stdout)
    assert code == 1
    assert result["addresses_exact"] <= result["allocations"] - 10
    assert "differs from the record" in stderr


def test_other_reserved_bytes_exit_with_1(app: typer.Typer, tmp_path: Path) -> None:
    data = recorded_data("cnn_train_loop")
    data["expected"]["peak_reserved_bytes"] += 2
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(data))
    code, stdout, _ = run(app, wrong)
    assert code == 1
    assert "128 MiB (134217728 B), recorded 128 MiB (134217730 B)" in stdout


def test_a_run_that_does_not_fit_is_a_result(app: typer.Typer) -> None:
    path = recorded_path("transformer_2.7b_train_step")
    code, stdout, _ = run(app, path, "--card", "v100-32gb")
    assert code == 0
    assert "does not fit the card v100-32gb: out of memory at event" in stdout
    code, stdout, _ = run(app, path, "--capacity", "60 GiB")
    assert code == 0
    assert "fits a capacity of 60 GiB" in stdout


def test_a_card_is_its_memory_less_its_context(app: typer.Typer) -> None:
    path = recorded_path("transformer_2.7b_train_step")
    card = find_card("v100-32gb")
    by_card = json.loads(run(app, path, "--card", "v100-32gb", "--json")[1])
    by_size = json.loads(run(app, path, "--capacity", card.capacity_bytes, "--json")[1])
    assert card.capacity_bytes < card.memory_bytes <= 32 * GIB
    assert by_card == by_size


def _evil() -> bytes:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("pwned",)

    return pickle.dumps({"segments": [Evil()], "device_traces": [[]]})


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--card", "v100-32gb", "--capacity", "24GiB"], "both name a capacity"),
        (["--capacity", "24MB"], "MB means"),
        (["--capacity", "much"], "not a size"),
        (["--capacity", "0"], "no memory at all"),
        (["--card", "v100-33gb"], "v100-32gb"),
        (["--device", "3"], "no device 3"),
        (["--device", "-1"], "no device -1"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(
    app: typer.Typer, path: Path, arguments: list[str], why: str
) -> None:
    code, stdout, stderr = run(app, path, *arguments)
    assert (code, stdout) == (2, "")
    assert why in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"no trace", "not a memory trace"), (_evil(), "asks for")],
)
def test_bad_files_exit_with_2_and_one_line(
    app: typer.Typer, tmp_path: Path, content: bytes | None, why: str
) -> None:
    path = tmp_path / ("a long folder name " * 8) / "file"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    code, stdout, stderr = run(app, path)
    assert (code, stdout) == (2, "")
    assert why in stderr
    assert stderr.count("\n") == 1
