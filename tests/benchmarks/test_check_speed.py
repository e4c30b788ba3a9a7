"""How long CI waits for the verdict. The goal stands in the test, for two cores.

A bound is asserted only where benchmarks are enabled, and generously: a busy machine is no fault.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from bench.record import Category, Holder
from tests.bench.records import make_record
from tests.benchmarks.test_speed import assert_below, membench

CASES = 2000
CATEGORIES: tuple[Category, ...] = ("activation", "gradient", "parameter", "temporary")


def write_records(path: Path, records: int, holders: int) -> None:
    """Write records as ``membench run`` does, with as many holders as the FCN has."""
    held = tuple(
        Holder(
            module=f"encoder.{n // 4}.norm{n % 4}",
            operator="aten.cudnn_batch_norm.default",
            source_line=f"memsave/networks/fcn.py:{90 + n}",
            category=CATEGORIES[n % len(CATEGORIES)],
            bytes=2**20 + n,
        )
        for n in range(holders)
    )
    plain = make_record(peak_holders=held)
    lines = (dataclasses.replace(plain, case=f"c{n}").to_json() for n in range(records))
    path.write_text("\n".join(lines) + "\n")


def test_2000_records_are_checked(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The goal: in under 2 s, process and all, each record with 60 holders of its peak."""
    results, baseline = tmp_path / "r.jsonl", tmp_path / "b.json"
    write_records(results, CASES, holders=60)
    assert membench("baseline", str(results), "-o", str(baseline)).returncode == 0
    arguments = ("check", str(results), "--baseline", str(baseline), "--tolerance", "0")
    done = benchmark.pedantic(membench, arguments, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert done.returncode == 0, done.stderr
    assert f"{CASES} cases: {CASES} within tolerance" in done.stdout
    assert_below(benchmark, 4.0)
