"""The simulator held against what PyTorch's own CUDA caching allocator did, as recorded.

The data are those of ``tests/stand_in/record_allocator_data.py``; nothing here needs a GPU.
"""

from __future__ import annotations

import copy
import json
import lzma
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.predict.alloc_conf import ROUNDUP_INTERVALS, parse_alloc_conf
from tests.stand_in.allocator_compare import NAMES, first_difference, replay_difference
from tests.stand_in.allocator_setups import SETUPS

_DATA = Path(__file__).resolve().parents[2] / "data" / "allocator"


@cache
def _read(name: str) -> Any:
    return json.loads(lzma.decompress((_DATA / f"{name}.json.xz").read_bytes()))


def _snapshots() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _read("snapshots")["snapshots"]
    return found


def test_the_data_say_how_they_were_recorded() -> None:
    for name in ("programs", "snapshots", "settings"):
        assert _read(name)["torch"] == "2.11.0+cu130"
        assert "PyTorch's own CUDA caching allocator" in _read(name)["how"]


@pytest.mark.parametrize("name", SETUPS)
def test_each_step_of_a_program_leaves_what_it_left_in_pytorch(name: str) -> None:
    """Addresses, all counters and their peaks, retries, out-of-memories, calls to the driver."""
    for one in _read("programs")["setups"][name]:
        assert first_difference(SETUPS[name], one["program"], one["answer"]) is None


def test_the_programs_meet_what_they_are_there_for() -> None:
    last = [
        dict(zip(NAMES, one["answer"]["steps"][-1], strict=True))
        for programs in _read("programs")["setups"].values()
        for one in programs
    ]
    for name in ("ooms", "retries", "device frees", "synchronisations", "inactive split"):
        assert sum(row[name] > 0 for row in last) >= 5, name


@pytest.mark.parametrize("column", range(len(NAMES)), ids=NAMES)
def test_a_single_byte_of_difference_is_found(column: int) -> None:
    one = copy.deepcopy(_read("programs")["setups"]["tight"][0])
    row = one["answer"]["steps"][-1]
    row[column] = 1 if row[column] is None else row[column] + 1
    found = first_difference(SETUPS["tight"], one["program"], one["answer"])
    assert found is not None
    assert NAMES[column] in found


def test_a_block_elsewhere_is_found() -> None:
    one = copy.deepcopy(_read("programs")["setups"]["tight"][0])
    (layout,) = one["answer"]["layouts"].values()
    layout[0][4][0][1] += 512
    found = first_difference(SETUPS["tight"], one["program"], one["answer"])
    assert found is not None
    assert "layout" in found


@pytest.mark.parametrize("recorded", _snapshots(), ids=lambda one: f"{one['setup']}-{one['seed']}")
def test_a_snapshot_replays_at_every_address(recorded: dict[str, Any], tmp_path: Path) -> None:
    """Histories that were cut off: what was there before them follows by going backwards."""
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(recorded["snapshot"]))
    assert replay_difference(path) is None


def test_a_snapshot_with_a_block_moved_does_not_replay(tmp_path: Path) -> None:
    snapshot = copy.deepcopy(_snapshots()[0]["snapshot"])
    moved = next(e for e in reversed(snapshot["device_traces"][0]) if e["action"] == "alloc")
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            if block["address"] == moved["addr"]:
                block["address"] += 512
                block["size"] -= 512
    moved["addr"] += 512
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    assert replay_difference(path) is not None


@pytest.mark.parametrize("text", _read("settings")["settings"])
def test_settings_are_taken_refused_and_read_as_by_pytorch(text: str) -> None:
    answer = _read("settings")["settings"][text]
    if answer is None:
        with pytest.raises(MembenchError, match="cannot use"):
            parse_alloc_conf(text)
        return
    settings = parse_alloc_conf(text)
    divisions = answer["roundup_power2_divisions"]
    own = settings.roundup_power2_divisions or (0,) * ROUNDUP_INTERVALS
    assert own == tuple(divisions[str(1 << place)] for place in range(ROUNDUP_INTERVALS))
    assert (settings.max_split_size_bytes or -1) == answer["max_split_size"]
    assert settings.garbage_collection_threshold == answer["garbage_collection_threshold"]
    assert settings.expandable_segments == answer["expandable_segments"]
