"""The largest volume: found as trying every shape would find it, and said where it is not sure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from bench.case import Case
from bench.cli.max_shape import max_shape
from bench.errors import MembenchError
from bench.named_case import named_case
from bench.plan.largest import LargestSearch, cube_of, slices_of
from bench.plan.search import budget_card
from bench.plan.simulator import Simulator
from bench.predict.cards import Card, all_cards
from bench.record import Record
from bench.units import MIB
from tests.bench.records import make_record

CONTEXT = budget_card(2**40).context_bytes
DIVISOR = (8, 8, 8)

app = typer.Typer()
app.command()(max_shape)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


class Formula:
    """Stands for a simulator: what a case needs is a formula of its shape."""

    def __init__(self, needs: Callable[[tuple[int, ...]], int]) -> None:
        self.needs, self.asked = needs, 0

    def records(self, cases: Sequence[Case], card: Card) -> list[Record]:
        self.asked += len(cases)
        return [self._record(case, card) for case in cases]

    def _record(self, case: Case, card: Card) -> Record:
        needs = self.needs(case.shape)
        if needs > card.capacity_bytes:
            return make_record(status="oom", reason="small", needs_bytes=needs, process_bytes=None)
        return make_record(needs_bytes=needs, peak_reserved_bytes=needs, process_bytes=needs)


def search(simulator: Formula, grow: Any = None) -> LargestSearch:
    case = named_case("fcn", shape="64x64x64")
    return LargestSearch(case, grow or slices_of((64, 64), DIVISOR), cast(Simulator, simulator))


def capacity(size: int) -> Card:
    return budget_card(CONTEXT + size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 10**6), st.integers(10**5, 10**9))
def test_slices_are_those_that_trying_every_number_finds(
    per_slice: int, fixed: int, size: int
) -> None:
    found = search(Formula(lambda s: fixed + per_slice * s[2])).find(capacity(size))

    limit = 65_536 // 8
    best = min((size - fixed) // (per_slice * 8), limit)
    if best < 1:
        assert found.shape is None
    else:
        assert found.shape == (64, 64, 8 * best)
        assert found.monotonic
        assert found.reached_limit == (best == limit)


def test_a_cube_is_found_where_memory_grows_in_jumps() -> None:
    def needs(shape: tuple[int, ...]) -> int:
        return -(-4 * shape[0] ** 3 // (20 * MIB)) * 20 * MIB

    formula = Formula(needs)
    found = search(formula, cube_of(DIVISOR)).find(capacity(1000 * MIB))

    best = max(n for n in range(8, 2000, 8) if needs((n,) * 3) <= 1000 * MIB)
    assert found.shape == (best,) * 3
    assert found.next_shape == (best + 8,) * 3
    assert formula.asked < 30


def test_memory_that_falls_with_the_volume_is_reported() -> None:
    # 16 slices need much, every other number little: the search for 3 MiB ends below them.
    def needs(shape: tuple[int, ...]) -> int:
        return 2 * MIB if shape[2] in (8, 24) else 4 * MIB

    found = search(Formula(needs)).find(capacity(3 * MIB))

    assert found.shape == (64, 64, 8)
    assert not found.monotonic


def test_a_second_card_uses_what_was_simulated_for_the_first() -> None:
    formula = Formula(lambda s: s[2] * MIB)
    finder = search(formula)
    first = finder.find(capacity(800 * MIB))
    asked = formula.asked
    second = finder.find(replace(capacity(400 * MIB), name="other-1gb"))

    assert (first.shape, second.shape) == ((64, 64, 800), (64, 64, 400))
    assert formula.asked - asked <= asked


def test_a_failing_case_is_an_error() -> None:
    class Failing(Formula):
        def _record(self, _case: Case, _card: Card) -> Record:
            return make_record(status="failed", reason="boom", process_bytes=None)

    with pytest.raises(MembenchError, match="boom"):
        search(Failing(lambda _shape: 0)).find(capacity(MIB))


def test_a_smallest_shape_that_the_network_refuses_is_passed_over() -> None:
    class Refuses(Formula):
        def _record(self, case: Case, card: Card) -> Record:
            if case.shape[2] == 8:
                return make_record(status="failed", reason="one value", process_bytes=None)
            return super()._record(case, card)

    finder = search(Refuses(lambda shape: shape[2] * MIB))

    assert finder.find(capacity(100 * MIB)).shape == (64, 64, 96)
    assert finder.find(replace(capacity(9 * MIB), name="less-1gb")).shape is None


def test_cubes_need_divisors_that_divide_one_another() -> None:
    assert cube_of((8, 8, 4))(3) == (24, 24, 24)
    with pytest.raises(MembenchError, match="--inplane"):
        cube_of((8, 8, 3))


def test_inplane_sides_are_padded_never_cropped() -> None:
    assert slices_of((250, 260), DIVISOR)(2) == (256, 264, 16)


def test_json_says_the_shape_and_the_next_one_does_not_fit() -> None:
    budget = str(CONTEXT + 200 * MIB)
    common = ("--network", "fcn", "--budget", budget, "--mode", "infer", "--json")

    result = invoke(*common, "--inplane", "60x64", "--techniques", "inplace_abn")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["techniques"] == ["inplace_abn"]
    assert found["shape"][:2] == [64, 64]
    assert found["next_shape"] == [64, 64, found["shape"][2] + 8]
    assert found["peak_reserved_bytes"] <= 200 * MIB


def test_nothing_that_fits_is_exit_code_1() -> None:
    result = invoke("--network", "fcn", "--budget", "1MiB", "--mode", "infer")

    assert result.exit_code == 1
    assert "nothing fits" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--card", "rtx4090-24gb", "--inplane", "64x64", "--isotropic"), "one of the two"),
        (("--all-cards", "--card", "rtx4090-24gb"), "--all-cards"),
        ((), "--card"),
        (("--card", "rtx4090-24gb", "--techniques", "chekpoint"), "checkpoint"),
        (("--card", "rtx4090-24gb", "--inplane", "64"), "64"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = invoke("--network", "fcn", *arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_all_cards_have_a_row_each_and_larger_cards_hold_no_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {name: all_cards()[name] for name in ("t4-16gb", "rtx3060-12gb", "rtx4090-24gb")}
    monkeypatch.setattr("bench.predict.cards.all_cards", lambda: few)

    result = invoke(
        "--network",
        "fcn",
        "--all-cards",
        "--mode",
        "infer",
        "--techniques",
        "inplace_abn",
        "--isotropic",
        "--json",
    )

    found = json.loads(result.stdout)
    assert [one["card"] for one in found] == ["rtx3060-12gb", "t4-16gb", "rtx4090-24gb"]
    voxels = [one["voxels"] for one in found]
    assert voxels == sorted(voxels)
    assert voxels[0] > 0
