"""Recorded traces of the important cases: which, where they lie, and what is not made again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.case import Case
from bench.errors import MembenchError
from bench.gpu import GpuIdentity
from bench.predict.replay import replay
from bench.predict.trace_file import read_trace
from bench.runner import TimeLimit
from bench.trace_session import main, record_traces, trace_path
from tests.bench.predict.random_runs import SETUPS
from tests.bench.predict.snapshots import random_snapshot, write_snapshot


def snapshot(_case: Case, path: Path) -> None:
    write_snapshot(path, random_snapshot(SETUPS["default"], 5))


def test_a_trace_of_each_network_and_precision_is_kept_and_replays(tmp_path: Path) -> None:
    made, failed = record_traces(["table1"], tmp_path, "h200-141gb", snapshot)

    assert failed == []
    assert sorted(path.name for path in made) == [  # fp32 and fp16, the smallest shape of each
        "fcn-baseline-96x96x96-train.json.gz",
        "fcn-ccblock+inplace_abn+mp-96x96x96-train.json.gz",
    ]
    assert {path.parent for path in made} == {tmp_path / "h200-141gb" / "traces" / "table1"}
    assert all(replay(read_trace(path)).exact for path in made)
    data = json.loads(gzip.decompress(made[0].read_bytes()))
    case = Case.from_definition(data["definition"])
    assert trace_path(tmp_path, "h200-141gb", "table1", case) == made[0]


def test_what_is_there_is_not_made_again_and_a_failure_costs_one_trace(tmp_path: Path) -> None:
    def refuses_half(case: Case, path: Path) -> None:
        if case.precision == "fp16":
            raise MembenchError("no luck")
        snapshot(case, path)

    made, failed = record_traces(["table1"], tmp_path, "c", refuses_half)
    again, _ = record_traces(["table1"], tmp_path, "c", snapshot)

    assert [len(made), len(again)] == [1, 1]
    assert made != again
    assert failed[0].endswith("train: no luck")


def test_no_case_has_more_than_half_of_the_time_and_none_begins_after_it(tmp_path: Path) -> None:
    limits: list[float] = []

    def taking(case: Case, path: Path) -> None:
        limits.append(case.time_limit_s)
        snapshot(case, path)

    (first, _), _ = record_traces(["table1"], tmp_path, "c", taking, TimeLimit.from_now(100.0))
    assert limits == [50.0, 50.0]
    definition = json.loads(gzip.decompress(first.read_bytes()))["definition"]
    assert definition["time_limit_s"] == 600.0  # the suite's: what is kept is the case's own

    made, failed = record_traces(["table1"], tmp_path, "d", taking, TimeLimit.from_now(0.0))
    assert (made, len(limits)) == ([], 2)
    assert [line.split("train: ")[1] for line in failed] == ["no time left: run it again"] * 2


def test_ctrl_c_keeps_what_was_recorded_and_exits_130_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuIdentity(name="NVIDIA H200", uuid="GPU-1", memory_bytes=2**37, card="h200-141gb")
    monkeypatch.setattr("bench.gpu.gpu_identity", lambda: gpu)

    def interrupted(_case: Case, _path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.export.measured.measure_snapshot", interrupted)
    options = ["--results", str(tmp_path), "--suites", "table1", "--time-limit", "60"]
    assert main(options) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_without_a_gpu_it_says_so_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise MembenchError("no CUDA GPU found: here")

    monkeypatch.setattr("bench.gpu.gpu_identity", none)
    assert main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: no CUDA GPU found: here\n"
