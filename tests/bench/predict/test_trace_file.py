"""Reading traces: what is accepted, and the one line that says why something is not."""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.predict.replay import replay
from bench.predict.trace_file import read_trace
from bench.units import MIB
from tests.bench.predict.random_runs import SETUPS
from tests.bench.predict.snapshots import random_snapshot, write_snapshot

REDUCED: dict[str, Any] = {
    "settings": None,
    "segments_at_start": [[1 << 32, 20 * MIB, 0, "large"]],
    "blocks_at_start": [[1 << 32, 4 * MIB]],
    "events": [["alloc", (1 << 32) + 4 * MIB, 2 * MIB, 0], ["free", 1 << 32]],
    "expected": {
        "reserved_at_start_bytes": 20 * MIB,
        "peak_reserved_bytes": 20 * MIB,
        "final_reserved_bytes": 20 * MIB,
    },
}


def snapshot() -> dict[str, Any]:
    return random_snapshot(SETUPS["tight"], 7, count=60)


class Evil:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo pwned > pwned",)


def assert_refused(path: Path, why: str) -> None:
    with pytest.raises(MembenchError, match=why) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [False, True])
def test_snapshots_of_every_pickle_protocol_are_read(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    content = pickle.dumps(snapshot(), protocol=protocol)
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert replay(read_trace(path)).exact


@pytest.mark.parametrize("zipped", [False, True])
def test_reduced_traces_are_read(tmp_path: Path, zipped: bool) -> None:
    content = json.dumps(REDUCED).encode()
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(content) if zipped else content)
    result = replay(read_trace(path))
    assert (result.allocations, result.exact) == (1, True)


def test_reduced_traces_may_hold_expandable_segments_and_out_of_memory(tmp_path: Path) -> None:
    base = 1 << 33
    data = {
        **REDUCED,
        "settings": {"expandable_segments": True},
        "segments_at_start": [[base, 20 * MIB, 0, "large", True]],
        "blocks_at_start": [[base, 4 * MIB]],
        "events": [
            ["segment_map", base + 20 * MIB, 20 * MIB, 0],
            ["alloc", base + 4 * MIB, 30 * MIB, 0],
            ["oom", None, 900 * MIB, 0],
            ["free", base + 4 * MIB],
            ["segment_unmap", base + 20 * MIB, 20 * MIB, 0],
        ],
        "expected": {**REDUCED["expected"], "peak_reserved_bytes": 40 * MIB},
    }
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data))
    assert replay(read_trace(path)).exact


def test_a_pickle_that_asks_for_a_class_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = snapshot()
    data["segments"].append(Evil())
    assert_refused(write_snapshot(tmp_path / "evil.pickle", data), r"asks for \w+\.system")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'echo pwned > pwned'\ntR.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R.",
        b"(icollections\nOrderedDict\n.",
    ],
    ids=["text protocol", "GLOBAL", "STACK_GLOBAL, a harmless class", "INST"],
)
def test_no_way_of_asking_for_a_class_is_let_through(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evil.pickle"
    path.write_bytes(content)
    assert_refused(path, "its pickle asks for")


@pytest.mark.parametrize(
    "content",
    [b"\x82\x01.", b"Pid\n.", b"\x80\x02}X\x01\x00\x00\x00ab.", b"\x80\x63.", b"\x80\x02]h\x05."],
    ids=["extension code", "persistent id", "state for a dict", "protocol 99", "unknown memo"],
)
def test_odd_opcodes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.pickle"
    path.write_bytes(content)
    assert_refused(path, "is not a memory trace")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited on Linux only")
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x01r" + struct.pack("<I", 2**31 - 2) + b".",
        b"\x80\x04\x96" + struct.pack("<Q", 2**36) + b"x.",
    ],
    ids=["memo of 2^31 entries", "bytearray of 64 GiB"],
)
def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.pickle"
    path.write_bytes(content)
    assert_refused(path, "is not a memory trace")


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(gzip.compress(b"0" * 20_000_000) and b"0" * 20_000_000))
    assert_refused(path, "unpacks to more than")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [False, True])
def test_truncated_files_are_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    content = pickle.dumps(snapshot())
    content = gzip.compress(content) if zipped else content
    path = tmp_path / "cut.pickle"
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path, "gzip data is damaged" if zipped else "its pickle is cut off")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"# a text\n", "no pickle"),
        (b"\x89PNG\r\n", "no pickle"),
        (b"{'segments': []}", "looks like JSON but is not"),
        (b"[" * 100_000, "looks like JSON but is not"),
        (b"[1, 2]", "it holds a list, not a dict"),
        (b"{}", "neither 'segments' with 'device_traces' nor 'events'"),
        (pickle.dumps([1]), "it holds a list"),
        (pickle.dumps("text"), "it holds a str"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert_refused(path, why)


def test_a_file_of_absurd_size_is_not_even_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.predict.trace_file._MAX_FILE_BYTES", 1000)
    path = write_snapshot(tmp_path / "snapshot.pickle", snapshot())
    assert_refused(path, "too large: .* at most 1000 B; record with a smaller max_entries")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "No such file")
    assert_refused(tmp_path, "Is a directory")


def test_a_history_that_was_not_recorded_says_how_to_record_it(tmp_path: Path) -> None:
    data = snapshot()
    data["device_traces"] = [[]]
    assert_refused(write_snapshot(tmp_path / "a", data), "call torch.cuda.memory._record_memory")
    data["device_traces"] = [[{"action": "snapshot", "addr": 0, "size": 1, "stream": 0}]]
    assert_refused(write_snapshot(tmp_path / "b", data), "device 0 has no recorded events")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.pop("segments"), "needs the lists"),
        (lambda d: d.update(device_traces={}), "needs the lists"),
        (lambda d: d.update(device_traces=[3]), "list of lists"),
        (lambda d: d.update(segments=[3]), "segment 0 is a int, not a dict"),
        (lambda d: d.update(allocator_settings=[1]), "settings is a list"),
        (lambda d: d["segments"][0].update(address="x"), "a segment's address is 'x'"),
        (lambda d: d["segments"][0].update(total_size=0), "a segment's size is 0"),
        (lambda d: d["segments"][0].update(total_size=True), "a segment's size is True"),
        (lambda d: d["segments"][0].update(total_size=10**30), "a segment's size is 1000"),
        (lambda d: d["segments"][0].update(blocks=None), "a segment's blocks is a NoneType"),
        (lambda d: d["segments"][0].update(total_size=512), "leaves its segment"),
        (lambda d: d["segments"][0]["blocks"][0].pop("size"), "a block's size is None"),
        (lambda d: d["segments"].append(d["segments"][0]), "overlap"),
        (lambda d: d["segments"][0].update(segment_pool_id=3), "pair of numbers"),
        (lambda d: d["device_traces"][0].__setitem__(0, 3), "event 0 is a int"),
        (lambda d: d["device_traces"][0][0].pop("addr"), "event 0's addr is None"),
        (lambda d: d["device_traces"][0][0].update(size=-1), "event 0's size is -1"),
        (lambda d: d["device_traces"][0][0].update(stream=1.5), "event 0's stream is 1.5"),
    ],
)
def test_what_is_wrong_in_a_snapshot_is_named(tmp_path: Path, change: Any, why: str) -> None:
    data = snapshot()
    change(data)
    assert_refused(write_snapshot(tmp_path / "snapshot.pickle", data), why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(events=[]), "list of events is empty"),
        (lambda d: d.update(events=3), "no list 'events'"),
        (lambda d: d.update(events=[3]), r"events\[0\] is not a list"),
        (lambda d: d.update(events=[["move", 1]]), "event 0 is no event"),
        (lambda d: d.update(events=[["alloc", 1]]), "event 0 is no event"),
        (lambda d: d.update(events=[[["alloc"], 1]]), "event 0 is no event"),
        (lambda d: d.update(events=[["free", "x"]]), "event 0's address is 'x'"),
        (lambda d: d.pop("expected"), "no 'expected' reserved bytes"),
        (lambda d: d["expected"].pop("peak_reserved_bytes"), "peak_reserved_bytes is None"),
        (lambda d: d.update(segments_at_start=[[1, 2]]), "at least 4 values"),
        (lambda d: d.update(blocks_at_start=[[1, 512]]), "lies in no segment|leaves its segment"),
        (lambda d: d.update(blocks_at_start=[[1 << 40, 512]]), "lies in no segment"),
    ],
)
def test_what_is_wrong_in_a_reduced_trace_is_named(tmp_path: Path, change: Any, why: str) -> None:
    data = copy.deepcopy(REDUCED)
    change(data)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data))
    assert_refused(path, why)


def test_of_several_devices_the_one_with_events_is_read(tmp_path: Path) -> None:
    data = snapshot()
    data["device_traces"] = [[], data["device_traces"][0]]
    for segment in data["segments"]:
        segment["device"] = 1
    path = write_snapshot(tmp_path / "snapshot.pickle", data)
    assert read_trace(path).device == 1
    assert replay(read_trace(path, device=1)).exact
    with pytest.raises(MembenchError, match="device 0 has no recorded events"):
        read_trace(path, device=0)
    with pytest.raises(MembenchError, match=r"no device 2, only 2 device\(s\)"):
        read_trace(path, device=2)


def test_a_reduced_trace_has_one_device(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(REDUCED))
    assert read_trace(path, device=0).device == 0
    with pytest.raises(MembenchError, match="no device 1"):
        read_trace(path, device=1)


def test_snapshots_of_old_versions_are_read(tmp_path: Path) -> None:
    """No block addresses, no settings, no devices, no pools, no word on expandable segments."""
    data = snapshot()
    del data["allocator_settings"]
    for segment in data["segments"]:
        for key in ("device", "is_expandable", "segment_pool_id"):
            del segment[key]
        for block in segment["blocks"]:
            del block["address"]
    path = write_snapshot(tmp_path / "snapshot.pickle", data)
    assert replay(read_trace(path)).exact


def test_a_history_without_completions_is_replayed_from_the_requests(tmp_path: Path) -> None:
    data = random_snapshot(SETUPS["default"], 7, count=60, streams=1)
    trace = data["device_traces"][0]
    data["device_traces"] = [[e for e in trace if e["action"] != "free_completed"]]
    assert replay(read_trace(write_snapshot(tmp_path / "a", data))).exact


def test_stacks_tell_who_emptied_the_cache(tmp_path: Path) -> None:
    data = random_snapshot(SETUPS["tight"], 7)
    released = [e for e in data["device_traces"][0] if e["action"] == "segment_free"]
    assert released
    for entry in released:
        entry["frames"] = [{"name": "empty_cache", "filename": "memory.py", "line": 1}]
    trace = read_trace(write_snapshot(tmp_path / "a", data))
    assert {e.by_user for e in trace.events if e.kind == "segment_free"} == {True}
    assert {e.by_user for e in trace.events if e.kind != "segment_free"} == {False}
