"""Which case is which between two runs of any kind."""

from __future__ import annotations

from bench.compare import compare, differences, pair_up
from tests.bench.figures import make_figures


def test_two_runs_of_one_case_are_compared_whatever_they_are_called() -> None:
    before, after = make_figures(1000), make_figures(1500, case="c2", definition_hash="0")
    (pair,) = compare([before], [after])
    assert (pair.before, pair.after, pair.growth_bytes) == (before, after, 500)
    assert [one.field for one in differences([pair])] == ["definition"]
    assert len(compare([before], [after, make_figures(case="c3")])) == 3


def test_a_side_that_is_missing_or_did_not_finish_has_no_growth() -> None:
    whole, cut = make_figures(1000), make_figures(900, status="oom")
    alone, missing, unfinished = (
        *pair_up([], [whole]),
        *pair_up([whole], []),
        *pair_up([whole], [cut]),
    )
    assert (alone.before, alone.after, missing.before, missing.after) == (None, whole, whole, None)
    assert alone.growth_bytes is missing.growth_bytes is unfinished.growth_bytes is None
    assert alone.explain() is missing.explain() is None
    assert pair_up([make_figures(None)], [whole])[0].growth_bytes is None


def test_each_figure_is_used_once_and_the_likest_wins() -> None:
    near, far = make_figures(card="a"), make_figures(card="b", torch="9")
    pairs = pair_up([near, far], [far, near])
    assert [(pair.before, pair.after) for pair in pairs] == [(far, far), (near, near)]
    assert [p.before for p in pair_up([near], [near, near])] == [near, None]


def test_a_difference_names_every_case_that_has_it() -> None:
    before = [make_figures(case=f"c{n}") for n in range(3)]
    after = [make_figures(case=f"c{n}", torch="9") for n in range(3)]
    (found,) = differences(pair_up(before, after))
    assert found.text == "torch: 2.13.0 before, 9 now (3 cases, as c0)"
    assert found.to_dict()["cases"] == ("c0", "c1", "c2")
