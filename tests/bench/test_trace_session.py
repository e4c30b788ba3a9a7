"""Recorded traces of the important cases: which, where they lie, and what is not made again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.case import Case
from bench.errors import MembenchError
from bench.predict.replay import replay
from bench.predict.trace_file import read_trace
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


def test_without_a_gpu_it_says_so_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise MembenchError("no CUDA GPU found: here")

    monkeypatch.setattr("bench.gpu.gpu_identity", none)
    assert main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: no CUDA GPU found: here\n"
