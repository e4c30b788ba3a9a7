"""Checkpoints placed for a card: the search over budgets, and what it gives on a real network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.case import Case, TechniqueUse
from bench.named_case import named_case
from bench.plan import combinations
from bench.plan.combinations import variant_name
from bench.plan.placed import MOST_TRIES, place_for_card
from bench.plan.search import Plan, budget_card, make_plan
from bench.plan.simulator import Simulator
from bench.record import Record
from bench.units import MIB
from memsave.techniques import TECHNIQUES
from tests.bench.records import make_record

CONTEXT = budget_card(2**40).context_bytes
PLACED = TechniqueUse(name="checkpoint_budget")


class Needs:
    """Stands for a simulator: the budgets of a case, and what it needs at each of them."""

    def __init__(self, needs: Sequence[int], capacity: int) -> None:
        self.needs = {10 * (len(needs) - i): one for i, one in enumerate(needs)}
        self.card = SimpleNamespace(capacity_bytes=capacity)
        self.tried: list[int] = []

    def budgets(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
        return [tuple(self.needs) for _ in cases]

    def records(self, cases: Sequence[Case], on_record: object = None) -> list[Record]:
        assert on_record is None
        asked = [use.options["budget"] for case in cases for use in case.techniques]
        self.tried += asked
        return [self.record(budget) for budget in asked]

    def record(self, budget: int) -> Record:
        needs = self.needs[budget]
        if needs <= self.card.capacity_bytes:
            return make_record(needs_bytes=needs)
        return make_record(needs_bytes=needs, status="oom", reason="too large")


def small_case(*uses: TechniqueUse, **given: Any) -> Case:
    case = named_case("fcn", shape="64x64x64", arguments={"widths": [8, 16, 16]}, **given)
    return replace(case, techniques=uses, variant=variant_name(case, uses))


def placed(simulator: Needs) -> int | None:
    """Return the index of the budget that is found, None where none is."""
    budgets = list(simulator.needs)
    plain, case = small_case(), small_case(PLACED)
    done = {
        plain.digest(): simulator.record(budgets[0]),
        case.digest(): simulator.record(budgets[-1]),
    }
    found = place_for_card([plain, case], done, cast(Simulator, simulator))
    if not found:
        return None
    ((chosen, record),) = found
    (use,) = chosen.techniques
    assert record.needs_bytes == simulator.needs[use.options["budget"]]
    return budgets.index(use.options["budget"])


@given(
    st.lists(st.integers(1, 10**6), min_size=2, max_size=16, unique=True),
    st.integers(1, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_of_needs_that_fall_the_first_that_fits_is_found(needs: list[int], capacity: int) -> None:
    needs = sorted(needs, reverse=True)
    simulator = Needs(needs, capacity)

    found = placed(simulator)

    fitting = [i for i, one in enumerate(needs) if one <= capacity]
    trivial = not fitting or fitting[0] in (0, len(needs) - 1)
    assert found == (None if trivial else fitting[0])
    assert len(simulator.tried) == len(set(simulator.tried)) <= MOST_TRIES


@given(st.lists(st.integers(1, 50), min_size=3, max_size=64), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_whatever_the_needs_are_what_is_found_fits_and_tries_are_bounded(
    needs: list[int], capacity: int
) -> None:
    simulator = Needs(needs, capacity)

    found = placed(simulator)

    assert len(simulator.tried) <= MOST_TRIES
    if found is not None:
        assert needs[0] > capacity >= needs[-1]
        assert needs[found] <= capacity
        assert 0 < found < len(needs) - 1


def test_an_exception_among_the_cheaper_ones_is_found_too() -> None:
    """Fragments: the second budget fits, the third and fourth do not."""
    assert placed(Needs([90, 40, 60, 55, 45, 20], 50)) == 1


def test_nothing_is_searched_where_the_case_fits_without_or_not_at_all() -> None:
    for needs in ([50, 40, 30], [90, 80, 70]):
        simulator = Needs(needs, 60)
        assert placed(simulator) is None
        assert simulator.tried == []


def test_a_network_whose_budgets_are_not_known_keeps_its_least_peak() -> None:
    class Unknown(Needs):
        def budgets(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
            return [() for _ in cases]

    assert placed(Unknown([90, 40, 20], 50)) is None


# -- on a real network ------------------------------------------------------------------------


def with_budget(size: int) -> Case:
    return small_case(TechniqueUse(name="checkpoint_budget", options={"budget": size}))


@pytest.fixture(scope="module")
def large() -> Iterator[Simulator]:
    with Simulator(budget_card(20 * 1024 * MIB)) as running:
        yield running


@pytest.fixture(scope="module")
def every(large: Simulator) -> dict[int, Record]:
    """Every budget that there is, simulated one by one."""
    (budgets,) = large.budgets([small_case(PLACED)])
    records = large.records([with_budget(size) for size in budgets])
    return dict(zip(budgets, records, strict=True))


@pytest.fixture(scope="module")
def found(every: dict[int, Record]) -> Plan:
    """A plan for a card on which a budget between the first and the last is what fits."""
    needs = sorted(record.needs_bytes or 0 for record in every.values())
    with pytest.MonkeyPatch.context() as patched:  # few techniques, for speed
        patched.setattr(combinations, "_HELD", (None, combinations._CHECKPOINT, PLACED))
        patched.setattr(combinations, "_MOVED", (None,))
        with Simulator(budget_card(CONTEXT + needs[len(needs) // 2])) as simulator:
            return make_plan(small_case(), simulator, precisions=("fp32",))


def test_the_budgets_of_a_case_go_from_nothing_recomputed_to_the_least_peak(
    every: dict[int, Record], large: Simulator
) -> None:
    plain, tight = large.records([small_case(), small_case(PLACED)])
    first, *_, last = every.values()

    assert list(every) == sorted(every, reverse=True)
    assert len(every) > 2
    assert (first.needs_bytes, first.step_flops) == (plain.needs_bytes, plain.step_flops)
    assert (last.needs_bytes, last.step_flops) == (tight.needs_bytes, tight.step_flops)


def test_the_plan_takes_the_budget_of_least_recomputation_that_fits(
    found: Plan, every: dict[int, Record]
) -> None:
    capacity = found.card.capacity_bytes
    fitting = {s: r for s, r in every.items() if (r.needs_bytes or 0) <= capacity}
    of_variant = {p.case.variant: p for p in found.proposals}
    (chosen,) = [
        p
        for p in found.proposals
        if [(use.name, bool(use.options)) for use in p.case.techniques]
        == [("checkpoint_budget", True)]
    ]

    size = chosen.case.techniques[0].options["budget"]
    assert 0 < len(fitting) < len(every)
    assert chosen.fits
    assert chosen.exact
    assert every[size].step_flops == min(r.step_flops or 0 for r in fitting.values())
    assert chosen.needs_bytes == every[size].needs_bytes
    # The least peak recomputes at least as much, every block most of all.
    plain, least_peak, all_blocks = (
        of_variant[name].slowdown or 0 for name in ("plain", "checkpoint_budget", "checkpoint")
    )
    assert plain < (chosen.slowdown or 0) < least_peak <= all_blocks
    assert chosen.case.variant == f"checkpoint_budget-{size / 2**30:.2f}GiB"


def test_a_network_without_blocks_has_no_budgets(large: Simulator) -> None:
    case = named_case(
        "tests.bench.any_networks:Flexible", inputs=["1x1x8x8x8"], techniques=[PLACED]
    )

    assert large.budgets([case]) == [()]


def test_every_technique_of_the_table_is_tried_by_some_plan() -> None:
    from bench.plan.combinations import single

    cases = [
        small_case(),
        named_case("conv_lstm", shape="64x64x8"),
        named_case("tests.bench.any_networks:Flexible", inputs=["1x1x8x8x8"]),
    ]
    tried = {use.name for case in cases for one in single(case) for use in one.techniques}
    assert tried == set(TECHNIQUES)
    formats = {
        use.options["format"]
        for one in single(cases[0])
        for use in one.techniques
        if use.name == "compress_activations"
    }
    assert formats == {"bf16", "fp8", "int8"}
