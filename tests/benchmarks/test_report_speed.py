"""How long a large report takes. The goal stands in the test, for two cores.

A bound is asserted only where benchmarks are enabled, and generously: a busy machine is no fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.record import Record
from tests.bench.records import make_record
from tests.bench.test_timeline import make_timeline
from tests.benchmarks.test_speed import assert_below, membench

SHAPES, VARIANTS = 100, 20


def many() -> list[Record]:
    """Return 2,000 records: each variant at each shape, with all that pictures are made of."""
    return [
        make_record(
            variant="baseline" if variant == 0 else f"variant-{variant}",
            requested_shape=(64 + 8 * shape,) * 3,
            position=shape * VARIANTS + variant,
            step_flops=1000 + variant,
            process_bytes=2**30 * (shape + 2) - variant * 2**20,
            timeline=make_timeline(),
        )
        for shape in range(SHAPES)
        for variant in range(VARIANTS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["markdown", "html"])
def test_2000_records_are_reported(benchmark: BenchmarkFixture, tmp_path: Path, form: str) -> None:
    """The goal: in under 10 s, process and all, with every picture."""
    results = tmp_path / "r.jsonl"
    results.write_text("\n".join(record.to_json() for record in many()) + "\n")
    arguments = ("report", str(results), "--format", form, "--output", str(tmp_path / "out"))
    done = benchmark.pedantic(membench, arguments, rounds=2, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert done.returncode == 0, done.stderr
    assert_below(benchmark, 20.0)
