"""Memory against cost: measured time before FLOPs, and a front that nothing beats."""

from __future__ import annotations

from typing import Any

import pytest

from bench.record import Record
from bench.report.rows import make_tables
from bench.report.tradeoffs import Tradeoff, make_tradeoff, pareto_front
from tests.bench.records import GIB, make_record

MEASURED: dict[str, Any] = {"evidence": "measured", "tracer": None}


def case(variant: str, gib: float, **overrides: Any) -> Record:
    return make_record(variant=variant, process_bytes=int(gib * GIB), **overrides)


def tradeoff(*records: Record) -> Tradeoff:
    (table,) = make_tables(records)
    (section,) = table.sections
    return make_tradeoff(section)


def test_the_cost_is_the_median_time_where_steps_were_timed() -> None:
    """Half the memory at 3 s for 2 s; FLOPs are there too, and not taken."""
    made = tradeoff(
        case("baseline", 4, step_times_s=(1.0, 2.0, 9.0), step_flops=100, **MEASURED),
        case("small", 2, step_times_s=(3.0,), step_flops=100, **MEASURED),
    )
    assert made.cost == "time"
    assert [(t.row.record.variant, t.memory, t.saved, t.cost) for t in made.trades] == [
        ("baseline", 1.0, 0.0, 1.0),
        ("small", 0.5, 0.5, 1.5),
    ]


def test_the_cost_is_that_of_flops_where_nothing_was_timed() -> None:
    made = tradeoff(case("baseline", 4, step_flops=300), case("small", 1, step_flops=400))
    assert made.cost == "FLOPs"
    assert made.trades[1].cost == pytest.approx(4 / 3)


def test_a_case_without_a_cost_is_left_out_and_named() -> None:
    made = tradeoff(
        case("baseline", 4, step_flops=300),
        case("unknown", 2),
        case("offloaded", 2, step_flops=300, techniques=("offload",)),
        case("broken", 2, status="failed", step_flops=300),
    )
    assert [t.row.record.variant for t in made.trades] == ["baseline"]
    assert made.left_out == (
        ("unknown", "no FLOPs counted"),
        ("offloaded", "moves or packs bytes, which no FLOP counts"),
        ("broken", "no memory to compare"),
    )
    timed = tradeoff(case("baseline", 4, step_times_s=(1.0,), **MEASURED), case("b", 2, **MEASURED))
    assert timed.left_out == (("b", "no step was timed"),)


def test_nothing_on_the_front_is_beaten_and_all_else_is() -> None:
    """b costs more than a and saves less; c saves most; d equals c in memory at a higher cost."""
    made = tradeoff(
        case("baseline", 8, step_flops=100),
        case("a", 4, step_flops=120),
        case("b", 6, step_flops=130),
        case("c", 2, step_flops=140),
        case("d", 2, step_flops=150),
        case("c again", 2, step_flops=140),
    )
    front = pareto_front(made.trades)
    assert [t.row.record.variant for t in front] == ["baseline", "a", "c", "c again"]
