"""The verdict of each case, both sides of each limit, and what is never compared."""

from __future__ import annotations

from typing import Any

import pytest

from bench.check import CheckReport, check, parse_gates
from bench.compare import ALLOWABLE, parse_allowed
from bench.errors import MembenchError
from bench.figures import Figures, figures_of
from bench.record import Holder
from bench.report.check_text import case_heading, check_summary, counts_text
from tests.bench.figures import make_figures
from tests.bench.records import GIB, make_record

NAME = "fcn/baseline/96x96x96/train"


def one(report: CheckReport) -> tuple[str, bool]:
    (case,) = report.cases
    assert report.passed is not case.fails
    return case.verdict, case.fails


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (1000, ("same", False)),
        (1010, ("same", False)),
        (1011, ("regression", True)),
        (990, ("same", False)),
        (989, ("improvement", False)),
    ],
)
def test_one_per_cent_passes_and_a_byte_more_fails(after: int, expected: tuple[str, bool]) -> None:
    assert one(check([make_figures(after)], [make_figures(1000)])) == expected


@pytest.mark.parametrize(("tolerance", "last"), [("0", 1000), ("5B", 1005), ("2.5%", 1025)])
def test_the_tolerance_that_is_asked_for_is_the_one_that_holds(tolerance: str, last: int) -> None:
    gates = parse_gates((), [tolerance])
    assert check([make_figures(last)], [make_figures(1000)], gates).passed
    assert not check([make_figures(last + 1)], [make_figures(1000)], gates).passed


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("peak_reserved_bytes", "reserved"),
        ("process_bytes", "process"),
        ("time_s", "time"),
    ],
)
def test_other_figures_are_shown_and_gate_only_when_asked(field: str, name: str) -> None:
    before, after = make_figures(**{field: 1000}), make_figures(**{field: 5000})
    report = check([after], [before])
    assert one(report) == ("same", False)
    shown = {metric.name: metric.change for metric in report.cases[0].metrics}
    assert shown[name] == 4000
    assert one(check([after], [before], parse_gates([name]))) == ("regression", True)
    assert one(check([before], [before], parse_gates([name]))) == ("same", False)


def test_a_tolerance_of_its_own_gates_that_figure_alone() -> None:
    gates = parse_gates((), ["reserved=3%"])
    assert {name: tolerance.text for name, tolerance in gates.items()} == {
        "allocated": "1 %",
        "reserved": "3 %",
    }
    before = make_figures(peak_reserved_bytes=1000)
    assert check([make_figures(peak_reserved_bytes=1030)], [before], gates).passed
    assert not check([make_figures(peak_reserved_bytes=1031)], [before], gates).passed


def test_the_general_tolerance_holds_for_bytes_and_time_has_its_own() -> None:
    gates = parse_gates(["reserved, process", "time"], ["2%"])
    assert {name: tolerance.text for name, tolerance in gates.items()} == {
        "allocated": "2 %",
        "reserved": "2 %",
        "process": "2 %",
        "time": "10 %",
    }


@pytest.mark.parametrize(
    ("gates", "tolerances", "words"),
    [
        (["reservd"], [], "did you mean 'reserved'"),
        ([], ["reservd=1%"], "no figure that can be gated"),
        ([], ["1%", "2%"], "the tolerance is given twice"),
        ([], ["time=1%", "time=2%"], "time is given twice"),
        ([], ["time=5MiB"], "time is in seconds"),
    ],
)
def test_gates_and_tolerances_that_mean_nothing_are_refused(
    gates: list[str], tolerances: list[str], words: str
) -> None:
    with pytest.raises(MembenchError, match=words):
        parse_gates(gates, tolerances)


def test_a_gated_figure_that_is_not_there_is_misuse() -> None:
    with pytest.raises(MembenchError, match=r"time is gated, but fcn/.* has none in the baseline"):
        check([make_figures(time_s=1.0)], [make_figures()], parse_gates(["time"]))
    with pytest.raises(MembenchError, match=r"allocated is gated, .* has none in the results"):
        check([make_figures(None)], [make_figures()])


def oom(needs: int | None = 2000) -> Figures:
    return make_figures(500, status="oom", needs_bytes=needs, process_bytes=None)


@pytest.mark.parametrize(
    ("after", "before", "verdict", "fails"),
    [
        ([make_figures()], [], "new", False),
        ([], [make_figures()], "vanished", True),
        ([oom()], [make_figures()], "newly_oom", True),
        ([make_figures()], [oom()], "newly_fits", False),
        ([make_figures(status="failed")], [make_figures()], "failed", True),
        ([make_figures(status="timeout")], [make_figures()], "timeout", True),
        ([make_figures(status="skipped")], [make_figures()], "skipped", True),
        ([make_figures(status="failed")], [], "failed", True),
        ([make_figures()], [make_figures(status="failed")], "new", False),
        ([oom()], [oom()], "same", False),
        ([oom(2020)], [oom(2000)], "same", False),
        ([oom(2021)], [oom(2000)], "regression", True),
        ([oom(1979)], [oom(2000)], "improvement", False),
        ([oom(None)], [oom(2000)], "same", False),
    ],
)
def test_every_other_verdict_is_named(
    after: list[Figures], before: list[Figures], verdict: str, fails: bool
) -> None:
    assert one(check(after, before)) == (verdict, fails)


@pytest.mark.parametrize(
    ("after", "before"), [(make_figures(989), make_figures(1000)), (make_figures(), oom())]
)
def test_with_ratchet_an_improvement_must_be_recorded(after: Figures, before: Figures) -> None:
    report = check([after], [before], ratchet=True)
    assert not report.passed
    assert report.unrecorded == list(report.cases)
    assert "`record it`" in check_summary(report, "record it")
    assert check([make_figures(990)], [make_figures(1000)], ratchet=True).passed


def test_a_new_case_fails_only_when_asked() -> None:
    assert check([make_figures()], [], ratchet=True).passed
    assert not check([make_figures()], [], fail_on_new=True).passed


UNLIKE: dict[str, Any] = {
    "card": ("v100-32gb", "a100-40gb"),
    "capped_to": ("", "titanx-12gb"),
    "evidence": ("predicted", "measured"),
    "tracer": ("cuda-shim", "cpu"),
    "torch": ("2.13.0", "2.12.0"),
    "cudnn": ("", "91900"),
    "allocator_settings": ("", "expandable_segments:True"),
    "suite": ("table1", "table2"),
    "suite_hash": ("0123456789abcdef", "f"),
    "card_hash": ("", "abc"),
    "schema_version": (1, 2),
}


@pytest.mark.parametrize("field", UNLIKE)
def test_unlike_is_never_compared_with_unlike(field: str) -> None:
    before, after = UNLIKE[field]
    with pytest.raises(MembenchError) as caught:
        check([make_figures(**{field: after})], [make_figures()])
    text = str(caught.value)
    assert text.startswith("cannot compare unlike with unlike: ")
    assert f": {before or 'none'} before, {after} now ({NAME})" in text
    assert ("--allow-different" in text) is (field in ALLOWABLE)


@pytest.mark.parametrize("field", ALLOWABLE)
def test_what_differs_can_be_accepted_by_name_and_stays_named(field: str) -> None:
    after = make_figures(1011, **{field: UNLIKE[field][1]})
    report = check([after], [make_figures(1000)], allow_different=parse_allowed([field]))
    assert one(report) == ("regression", True)
    assert [difference.field for difference in report.differences] == [field]
    assert "Compared although not alike" in check_summary(report, "c")


def test_several_differences_are_named_together_and_one_opt_out_is_not_enough() -> None:
    after = make_figures(torch="2.12.0", cudnn="9")
    with pytest.raises(MembenchError, match=r"torch: .*; cuDNN: .*--allow-different torch,cudnn"):
        check([after], [make_figures()])
    with pytest.raises(MembenchError, match=r"unlike: cuDNN: none before, 9 now"):
        check([after], [make_figures()], allow_different={"torch"})


def test_a_case_that_means_something_else_is_not_compared_under_its_name() -> None:
    before = make_figures(definition_hash="0")
    with pytest.raises(MembenchError, match="definition of the case: 0 before"):
        check([make_figures()], [before], allow_different=ALLOWABLE)


def test_a_case_that_failed_is_compared_with_nothing() -> None:
    after = make_figures(status="failed", torch="")
    assert one(check([after], [make_figures()])) == ("failed", True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["evidence"], "figures that differ in it"),
        (["definition"], "figures that differ in it"),
        (["tourch"], "did you mean 'torch'"),
    ],
)
def test_only_some_fields_may_differ(fields: list[str], words: str) -> None:
    with pytest.raises(MembenchError, match=words):
        parse_allowed(fields)


def test_a_definition_is_the_same_without_fields_that_shape_nothing() -> None:
    """Later versions add fields to a case; one at its default is no change."""
    record = make_record()
    plain = figures_of(record, "s").definition_hash
    for name in ("schedule", "cudnn_benchmark", "position", "paper"):
        record.definition.pop(name, None)
    assert figures_of(record, "s").definition_hash == plain
    record.definition["optimizer"] = "sgd"
    assert figures_of(record, "s").definition_hash != plain


def test_cards_and_evidence_of_one_case_are_held_against_their_own() -> None:
    kinds: list[dict[str, Any]] = [
        {"card": "a"},
        {"card": "b"},
        {"card": "a", "evidence": "measured", "tracer": ""},
    ]
    before = [make_figures(1000 * (n + 1), **kind) for n, kind in enumerate(kinds)]
    report = check(before[::-1], before, parse_gates((), ["0"]))
    assert report.counts == {"same": 3}

    assert check(before, before[:2]).counts == {"new": 1, "same": 2}


def test_the_worst_stand_first() -> None:
    names = [f"c{n}" for n in range(5)]
    sizes = (1000, 1500, 2000, 1)
    before = [make_figures(1000, case=name) for name in names[:4]]
    after = [make_figures(size, case=name) for name, size in zip(names[1:], sizes, strict=True)]
    report = check(after, before)
    assert [(c.pair.figures.case, c.verdict) for c in report.cases] == [
        *(("c3", "regression"), ("c2", "regression"), ("c0", "vanished")),
        *(("c4", "new"), ("c1", "same")),
    ]
    assert counts_text(report) == ("5 cases: 2 regression, 1 vanished, 1 new, 1 within tolerance")


def holders(*sizes: tuple[str, int]) -> tuple[Holder, ...]:
    return tuple(
        Holder(module=m, operator="op", source_line="f.py:1", category="activation", bytes=size)
        for m, size in sizes
    )


def test_a_regression_is_explained_and_others_are_not() -> None:
    before = make_figures(2 * GIB, holders=holders(("encoder.0", GIB)))
    after = make_figures(3 * GIB, holders=holders(("encoder.0", GIB), ("decoder.1", GIB)))
    report = check([after], [before])
    (case,) = report.cases
    assert case.growth is not None
    assert case.growth.by_module[0].name == "decoder.1"
    assert case_heading(case) == (
        f"regression: {NAME} on v100-32gb, predicted: "
        "allocated 2.0 GiB -> 3.0 GiB, +1.0 GiB (+50.00 %), tolerance 1 %"
    )
    summary = check_summary(report, "c")
    assert "## Peak GPU memory: the check failed" in summary
    assert "+1.0 GiB  decoder.1  (0 B -> 1.0 GiB)" in summary
    data = report.to_dict()
    assert data["passed"] is False
    assert data["cases"][0]["growth"]["by_module"][0]["growth_bytes"] == GIB
    assert check([before], [before]).cases[0].growth is None


def test_a_figure_in_seconds_reads_as_time() -> None:
    before, after = make_figures(time_s=0.1), make_figures(time_s=0.2)
    (case,) = check([after], [before], parse_gates(["time"])).cases
    assert "time 100.0 ms -> 200.0 ms, +100.0 ms (+100.00 %), tolerance 10 %" in case_heading(case)


def test_a_summary_escapes_what_markdown_would_take_for_its_own() -> None:
    report = check([make_figures(status="failed", reason="a|b <x>", case="c|d")], [])
    assert "failed: a\\|b &lt;x>" in check_summary(report, "c")


def test_a_summary_stays_below_what_github_takes() -> None:
    after = [make_figures(5000, case=f"c{n}") for n in range(1200)]
    before = [make_figures(1000, case=f"c{n}") for n in range(1200)]
    summary = check_summary(check(after, before), "c")
    assert len(summary) < 2**20
    assert "and 700 more" in summary
    assert "1195 more grew" in summary
