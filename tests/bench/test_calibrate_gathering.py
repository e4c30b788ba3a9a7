"""What a calibration is to measure is traced in pieces: what a piece has traced is kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench.calibrate import calibrate as calibrate_module
from bench.calibrate import gathering
from bench.calibrate.calibrate import card_of
from bench.calibrate.gathering import gather
from bench.calibrate.wanted import Wanted
from bench.child import ChildTimeoutError
from bench.cli.calibrate import calibrate as calibrate_command
from bench.runner import TimeLimit
from tests.bench.calibration_fixtures import HELLO, convolution
from tests.bench.records import make_case


def test_gathering_traces_the_cases_in_children_and_keeps_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real child and shim; the second time nothing is traced."""
    monkeypatch.setattr(gathering, "cache_folder", lambda: tmp_path)
    case = make_case(requested_shape=(16, 16, 16), steps=2)
    broken = make_case(requested_shape=(16, 16, 16), variant="odd", network_options={"block": "no"})

    wanted = gather([case, broken], 0.0)

    directions = {call.direction for call in wanted.convolutions}
    assert directions == {"forward", "input_gradient", "weight_gradient"}
    assert {call.transposed for call in wanted.convolutions} == {True, False}
    assert len(set(wanted.convolutions)) == len(wanted.convolutions)
    assert [line.split(":")[0] for line in wanted.skipped] == [broken.name]
    monkeypatch.setattr(gathering, "Child", lambda *_: pytest.fail("traced again"))
    assert gather([case, broken], 0.0) == wanted


class SlowTracer:
    """A tracing child that answers at once, but for cases of the variant ``slow``."""

    asked: list[str]  # by all of a test

    def __init__(self, _module: str, _environment: dict[str, str]) -> None:
        pass

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        self.asked.append(request["case"]["variant"])
        if self.asked[-1] == "slow":
            time.sleep(limit_s)
            raise ChildTimeoutError("too slow")
        return {"convolutions": [convolution(8).to_dict()], "operators": []}

    def close(self) -> None:
        pass


@pytest.fixture
def tracers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One tracer, stood in for; returns the variants that it was asked for."""
    monkeypatch.setattr(gathering, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(gathering, "usable_cores", lambda: 1)
    monkeypatch.setattr(gathering, "Child", SlowTracer)
    SlowTracer.asked = []
    return SlowTracer.asked


def test_a_piece_that_ends_while_it_traces_keeps_what_it_has_traced(tracers: list[str]) -> None:
    cases = [make_case(variant=name) for name in ("a", "slow", "b")]

    first = gather(cases, 0.0, TimeLimit.from_now(0.3))
    assert (first.untraced, tracers) == (2, ["a", "slow"])
    assert first.convolutions == (convolution(8),)

    gather(cases, 0.0, TimeLimit.from_now(0.3))
    assert tracers[2:] == ["slow"]  # and not "a" again


def test_a_case_that_takes_longer_than_any_may_is_left_out_for_good(
    tracers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_TRACE_LIMIT_S", 0.1)
    cases = [make_case(variant=name) for name in ("slow", "b")]

    for _ in range(2):
        wanted = gather(cases, 0.0, TimeLimit.from_now(60.0))
        assert wanted.untraced == 0
        assert wanted.skipped == ("fcn/slow/96x96x96/train: too slow",)
    assert tracers == ["slow", "b"]


def test_what_other_code_traced_is_traced_again(
    tracers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(gathering, "_PACKAGES", (package,))
    for source in ("x = 1", "x = 1", "x = 2"):
        (package / "tracer.py").write_text(source)
        gather([make_case(variant="a")], 0.0)

    assert tracers == ["a", "a"]


def test_the_code_that_counts_is_that_of_both_packages() -> None:
    assert [(p.name, (p / "__init__.py").is_file()) for p in gathering._PACKAGES] == [
        ("bench", True),
        ("memsave", True),
    ]


def test_a_line_that_was_cut_off_is_traced_again(tracers: list[str], tmp_path: Path) -> None:
    cases = [make_case(variant=name) for name in ("a", "b")]
    whole = gather(cases, 0.0)
    (kept,) = tmp_path.glob("calibration-calls-*.jsonl")
    kept.write_bytes(kept.read_bytes()[:-20])

    assert gather(cases, 0.0) == whole
    assert tracers == ["a", "b", "b"]


def test_a_piece_that_only_traced_is_not_complete_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the card's file meanwhile: a piece that is killed leaves it as it stands."""
    path = tmp_path / f"{card_of(HELLO).name}.json"
    seen: list[bool] = []

    def gathered(*_: object) -> Wanted:
        seen.append(json.loads(path.read_text())["calibration"]["complete"])
        return Wanted(convolutions=(convolution(8),), operators=(), held_out=(), untraced=3)

    monkeypatch.setattr(calibrate_module, "calibrated_cases", lambda _: [make_case()])
    monkeypatch.setattr(calibrate_module, "gather", gathered)
    monkeypatch.setattr(calibrate_module, "check_gpu", lambda: None)
    monkeypatch.setattr(calibrate_module, "_greeting", lambda: HELLO)
    app = typer.Typer()
    app.command()(calibrate_command)

    result = CliRunner().invoke(app, ["-o", str(tmp_path)])

    assert result.exit_code == 1
    assert result.stderr.startswith("3 of the suites' cases are not traced yet")
    assert seen == [False]
    assert json.loads(path.read_text())["calibration"]["complete"] is False
