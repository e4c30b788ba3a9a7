"""Traces reduced to numbers and read again: the replay is the one before."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import MembenchError
from bench.predict.replay import replay
from bench.predict.trace import Trace
from bench.predict.trace_file import read_trace
from bench.predict.trace_writer import reduce_trace, write_reduced_trace
from tests.bench.predict.random_runs import SETUPS
from tests.bench.predict.snapshots import (
    RECORDED,
    random_snapshot,
    recorded_path,
    write_snapshot,
)


def snapshot(tmp_path: Path, setup: str, seed: int, keep: float = 1.0) -> Trace:
    data = random_snapshot(SETUPS[setup], seed, keep=keep)
    return read_trace(write_snapshot(tmp_path / "snapshot.pickle", data))


@pytest.mark.parametrize("setup", ["default", "expandable"])
@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_reduced_replays_as_exactly_as_the_snapshot(
    tmp_path: Path, setup: str, seed: int
) -> None:
    trace = snapshot(tmp_path, setup, seed, keep=0.7)

    write_reduced_trace(tmp_path / "small" / "t.json.gz", trace, {"source": {"case": "a"}})

    again = replay(read_trace(tmp_path / "small" / "t.json.gz"))
    assert again == replay(trace)
    assert again.exact
    assert again.allocations > 50


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_trace_written_again_replays_to_the_last_address(
    tmp_path: Path, name: str
) -> None:
    trace = read_trace(recorded_path(name))

    write_reduced_trace(tmp_path / "t.json.gz", trace)

    again = replay(read_trace(tmp_path / "t.json.gz"))
    assert (again.addresses_exact, again.exact) == (again.allocations, True)
    assert again.allocations > 1000


def test_what_a_trace_is_of_stands_in_front_and_files_are_alike(tmp_path: Path) -> None:
    trace = snapshot(tmp_path, "default", 1)
    for name in ("a", "b"):
        write_reduced_trace(tmp_path / name, trace, {"case": "fcn"})

    first, second = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second
    assert next(iter(json.loads(gzip.decompress(first)))) == "case"


def test_a_delayed_free_stands_where_it_was_completed(tmp_path: Path) -> None:
    trace = snapshot(tmp_path, "default", 2)
    kinds = [event.kind for event in trace.events]
    assert "free_requested" in kinds  # other streams delay some

    rows = reduce_trace(trace)["events"]

    completed = kinds.count("free") + kinds.count("free_completed")
    assert [row[0] for row in rows].count("free") == completed
    assert len(rows) == len(kinds) - kinds.count("free_requested")


def test_what_the_form_has_no_word_for_is_refused(tmp_path: Path) -> None:
    trace = snapshot(tmp_path, "default", 3)
    private = replace(trace, events=(trace.events[0]._replace(pool_id=(0, 1)),))
    with pytest.raises(MembenchError, match="private memory pools"):
        reduce_trace(private)
    split = replace(trace, settings=replace(trace.settings, max_split_size_bytes=1 << 25))
    with pytest.raises(MembenchError, match="other than expandable_segments"):
        reduce_trace(split)
    (tmp_path / "file").write_text("")
    with pytest.raises(MembenchError, match="cannot write"):
        write_reduced_trace(tmp_path / "file" / "t.gz", trace)
