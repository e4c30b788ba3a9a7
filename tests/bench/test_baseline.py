"""The baseline file: what is written is what is read, and what it never loses silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.baseline import baseline_text, read_baseline, write_baseline
from bench.errors import MembenchError
from bench.figures import select
from bench.record import Holder, append_record
from tests.bench.figures import make_figures
from tests.bench.records import make_record

HOLDERS = (
    Holder(module="b", operator="op", source_line="f.py:2", category="activation", bytes=3),
    Holder(module="a", operator="op", source_line="f.py:1", category="gradient", bytes=5),
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    figures = [
        make_figures(1000, time_s=0.25, holders=HOLDERS[::-1]),
        make_figures(2000, case="c2", status="oom", process_bytes=None),
        make_figures(3000, card="other", allocator_settings="expandable_segments:True"),
    ]
    path = tmp_path / "new" / "b.json"
    write_baseline(path, figures)
    found = read_baseline(path)
    assert sorted(found, key=lambda one: one.peak_allocated_bytes or 0) == figures
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_equal_figures_give_the_same_file_a_holder_a_line_and_no_date() -> None:
    figures = [make_figures(holders=HOLDERS), make_figures(case="c2")]
    text = baseline_text(figures)
    assert text == baseline_text(figures[::-1])
    (a, b) = (line.strip() for line in text.splitlines() if '"module"' in line)
    assert json.loads(a.rstrip(","))["module"] == "a"
    assert json.loads(b)["module"] == "b"
    assert "started_at" not in text
    assert "commit" not in text
    assert text.endswith("}\n")


def test_folders_of_baselines_and_results_are_taken_too(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_baseline(tmp_path / f"{name}.json", [make_figures(suite=name)])
    assert [one.origin.suite for one in read_baseline(tmp_path)] == ["one", "two"]
    results = tmp_path / "results"
    results.mkdir()
    append_record(results / "table1.predicted.jsonl", make_record())
    for path in (results, results / "table1.predicted.jsonl"):
        (one,) = read_baseline(path)
        assert (one.case, one.origin.suite) == ("fcn/baseline/96x96x96/train", "table1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "is not a baseline: make one with membench baseline"),
        ("not json", "is not a baseline"),
        ("[1]", "is not a baseline"),
        ('{"membench_baseline": 99}', "of version 99, this membench reads 1"),
        ('{"membench_baseline": 1}', "is not a whole baseline"),
        ('{"membench_baseline": 1, "made_with": [{"cases": {}}]}', "is not a whole baseline"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(MembenchError, match=words):
        read_baseline(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"peak_allocated_bytes": 1000', '"peak_allocated_bytes": 1000.5'),
        ('"peak_allocated_bytes": 1000', '"peak_allocated_bytes": true'),
        ('"status": "ok"', '"status": "fine"'),
        ('"definition_hash"', '"later"'),
    ],
)
def test_a_baseline_with_a_wrong_field_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "b.json"
    text = baseline_text([make_figures(1000)])
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(MembenchError, match="is not a whole baseline"):
        read_baseline(path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match="does not exist"):
        read_baseline(tmp_path / "b.json")


@pytest.mark.parametrize("status", ["failed", "timeout", "skipped"])
def test_a_case_without_figures_is_no_baseline(tmp_path: Path, status: str) -> None:
    with pytest.raises(MembenchError, match=f"1 case without figures.*{status}: made {status}"):
        write_baseline(tmp_path / "b.json", [make_figures(), make_figures(status=status)])
    assert not (tmp_path / "b.json").exists()
    with pytest.raises(MembenchError, match="no cases"):
        write_baseline(tmp_path / "b.json", [])


def test_cases_are_lost_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_baseline(path, [make_figures(), make_figures(case="c2")])
    before = path.read_text()
    with pytest.raises(MembenchError, match="has 1 case that the results lack, as c2 on v100"):
        write_baseline(path, [make_figures(7, torch="9")])
    assert path.read_text() == before
    write_baseline(path, [make_figures(7, torch="9")], allow_fewer=True)
    assert [one.peak_allocated_bytes for one in read_baseline(path)] == [7]


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    with pytest.raises(MembenchError, match="is there and is not a baseline"):
        write_baseline(path, [make_figures()], allow_fewer=True)
    with pytest.raises(MembenchError, match="cannot write the baseline"):
        write_baseline(path / "below.json", [make_figures()])
    assert path.read_text() == "mine"


def test_a_selection_that_is_empty_is_refused_and_one_of_nothing_is_not() -> None:
    figures = [make_figures(case="a[1]"), make_figures(case="ab", suite="s")]
    assert select(figures, "a[1]", None, "x") == figures[:1]
    assert select(figures, "a*", None, "x") == figures
    assert select(figures, "a*", "s", "x") == figures[1:]
    assert select([], "a*", "s", "x") == []
    with pytest.raises(MembenchError, match="no case 'z' of suite 's' in x: it has 2 cases"):
        select(figures, "z", "s", "x")
