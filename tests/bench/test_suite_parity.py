"""The section ``parity`` of a suite: its names found, its mistakes named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import SuiteError
from bench.suite import load_suite
from tests.bench.parity_fixtures import SUITE, suite_file

__all__ = ["suite_file"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fcn/checkpoint/*}", "fcn/chekpoint/*}", "line 18: parity.pairs[0].technique: no case"),
        ("{plain: fcn/leaky/*", "{plain: fcn/*/8*", "must match one case, it matches 5"),
        ("fcn/inplace/*, band: 0.001", "fcn/inplace/*", "inplace is not exact: state a band"),
        ("band: 0.001", "band: -1", "parity.pairs[1].band"),
        ("fcn/inplace/*, band", "fcn/leaky/*, band", "compares fcn/leaky/8x8x8/train with itself"),
        ("fcn/inplace/*, band", "fcn/wide/*, band", "two shapes or batch sizes"),
        ('"fcn/wide/*"]', '"fcn/guess/*"]', "case fcn/guess/8x8x8/infer is of mode infer"),
        ('"fcn/wide/*"]', '"conv*"]', "cannot train on a labelled volume"),
        ('"fcn/wide/*"]', '"fcn/none/*"]', "parity.figures[0].cases[1]: no case matches"),
        ("  steps: 6", "  schedule: polly\n  steps: 6", "parity.schedule: unknown schedule"),
        ("  steps: 6", "  stops: 6", "unknown key (did you mean 'steps'?)"),
    ],
)
def test_a_mistake_in_the_section_is_named_with_its_line(
    suite_file: Path, old: str, new: str, message: str
) -> None:
    assert old in SUITE
    suite_file.write_text(SUITE.replace(old, new))
    with pytest.raises(SuiteError) as error:
        load_suite(str(suite_file))
    assert message in str(error.value)


def test_a_section_that_trains_nothing_is_refused(suite_file: Path) -> None:
    suite_file.write_text(SUITE[: SUITE.index("parity:")] + "parity: {steps: 3}\n")
    with pytest.raises(SuiteError, match="says nothing to train"):
        load_suite(str(suite_file))


def test_a_glob_keeps_the_pairs_that_its_cases_stand_in(suite_file: Path) -> None:
    plan = load_suite(str(suite_file)).parity()
    names = [case.variant for case in plan.matching("fcn/inplace/*").cases]
    assert names == ["leaky", "inplace"]
    kept = plan.matching("fcn/plain/*")
    assert [case.variant for case in kept.cases] == ["plain", "checkpoint"]
    assert [figure.note for figure in kept.figures] == ["the paper says so"]


def test_figure4_holds_the_papers_runs_and_a_pair_for_every_technique_of_the_network() -> None:
    suite = load_suite("figure4")
    first, second = suite.parity().figures
    assert [(c.variant, c.batch_size) for c in first.cases] == [
        ("baseline", 1),
        ("inplace_abn+batch2", 2),
        ("bottleneck+inplace_abn", 1),
        ("everything", 1),
    ]
    assert [c.variant for c in second.cases] == ["everything", "everything"]
    assert {c.loss for c in suite.own_cases} == {"cross_entropy+dice"}
    assert {c.optimizer_options["lr"] for c in suite.own_cases} == {4e-4}
    assert suite.file.parity is not None
    assert suite.file.parity.schedule.options == {"factor": 0.3, "patience": 50}
    compared = {pair.technique.variant for pair in suite.parity().pairs}
    assert {"checkpoint", "inplace_abn", "inplace_group_norm", "inplace_instance_norm"} <= compared
