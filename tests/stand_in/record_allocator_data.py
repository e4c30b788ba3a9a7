"""Records what the tests of the simulator hold it against: ``tests/data/allocator``.

``python -m tests.stand_in.record_allocator_data tests/data/allocator``, on the stand-in, writes
programs.json.xz (random programs, PyTorch's answers), snapshots.json.xz (histories that were cut
off, without their stacks) and settings.json.xz (which settings PyTorch takes, and how it reads
them). No test does this: the answers are kept as they were.
"""

from __future__ import annotations

import json
import lzma
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.stand_in.allocator_programs import random_program, real_answers
from tests.stand_in.allocator_setups import SETUPS

__all__ = ["record"]

_STEPS = 60
_SEEDS = (0, 1)
_SEEDS_OF = {"pools": (2, 10), "odd segments": (1, 7)}  # which meet the rules they are there for
# Those of the first four were replayed wrongly once: pages of the other pool, a retry's wait.
_SNAPSHOTS = (
    ("expandable", 511),
    ("expandable", 596),
    ("expandable tight", 575),
    ("expandable tight", 586),
    ("pools tight", 104),
    ("split tight", 502),
    ("collect", 503),
    ("rounding list", 504),
)
_KEPT = ("action", "addr", "size", "stream")  # of a history's entry
_HOW = (
    "recorded by tests/stand_in/record_allocator_data.py: PyTorch's own CUDA caching allocator on "
    "the stand-in GPU, whose memory is counted and on which no kernel runs"
)
_SETTINGS = """
 |max_split_size_mb:20|max_split_size_mb:19|max_split_size_mb:64|max_split_size_mb:abc
max_split_size_mb|max_split_size_mb:|max_split_size_mb: 32 |max_split_size_mb:32,
max_split_size_mb:1e3|max_split_size_mb:99999999999999999999|max_split_size_mb:32,max_split_size_mb:64
expandable_segments:true|expandable_segments:True|expandable_segments:1|expandable_segments : True
expandable_segments:True,,max_split_size_mb:64|,|a:1|EXPANDABLE_SEGMENTS:True|expandable_segments=True
garbage_collection_threshold:0|garbage_collection_threshold:0.5|garbage_collection_threshold:1.0
garbage_collection_threshold:-0.1|garbage_collection_threshold:.5|garbage_collection_threshold:nan
roundup_power2_divisions:4|roundup_power2_divisions:0|roundup_power2_divisions:1
roundup_power2_divisions:3|roundup_power2_divisions:[256:1,512:2,1024:4,>:8]
roundup_power2_divisions:[256:1,512:2]|roundup_power2_divisions:[>:8]|roundup_power2_divisions:[]
roundup_power2_divisions:[3:4]|roundup_power2_divisions:[4:3]|roundup_power2_divisions:[0:4]
roundup_power2_divisions:[512:2,256:4]|roundup_power2_divisions:[512:2,>:4,256:8]
roundup_power2_divisions:[131072:4]|roundup_power2_divisions:[256:1,]|roundup_power2_divisions:[256:1
roundup_power2_divisions:256:1]|roundup_power2_divisions:[256:1,,512:2]
roundup_power2_divisions:[64:8,64:4]|roundup_power2_divisions:[32768:4,>:2]
large_segment_size_mb:10|large_segment_size_mb:11|large_segment_size_mb:64,max_split_size_mb:32
max_split_size_mb:16,large_segment_size_mb:12|max_non_split_rounding_mb:19
max_non_split_rounding_mb:12,large_segment_size_mb:11|per_process_memory_fraction:0.5
per_process_memory_fraction:1.5|per_process_memory_fraction:-1|backend:native|backend:foo
release_lock_on_cudamalloc:True|release_lock_on_cudamalloc:1|pinned_num_register_threads:8
pinned_num_register_threads:3|pinned_num_register_threads:0|pinned_num_register_threads:256
pinned_use_background_threads:yes|pinned_reserve_segment_size_mb:0|pinned_reserve_segment_size_mb:64
graph_capture_record_stream_reuse:no|pinned_use_cuda_host_register:maybe
"""
_READ = """
import json, os, sys
import torch
def read(text):
    try:
        torch._C._accelerator_setAllocatorSettings(text)
    except (IndexError, RuntimeError, ValueError):
        return None
    torch.cuda.init()
    return torch.cuda.memory._snapshot()["allocator_settings"]
answers = {}
for text in json.load(sys.stdin):  # each in a process that has set nothing before
    back, out = os.pipe()
    if os.fork() == 0:
        os.write(out, json.dumps(read(text)).encode())
        os._exit(0)
    os.close(out)
    with os.fdopen(back) as answer:
        answers[text] = json.loads(answer.read())
    os.wait()
print(json.dumps(answers))
"""


def record(folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    programs, version = _programs()
    note = {"how": _HOW, "torch": version}
    _write(folder / "programs.json.xz", {**note, "setups": programs})
    _write(folder / "snapshots.json.xz", {**note, "snapshots": _snapshots()})
    _write(folder / "settings.json.xz", {**note, "settings": _settings()})


def _programs() -> tuple[dict[str, Any], str]:
    found, version = {}, ""
    for name, setup in SETUPS.items():
        programs = [random_program(setup, seed, _STEPS) for seed in _SEEDS_OF.get(name, _SEEDS)]
        with tempfile.TemporaryDirectory() as scratch:
            answers = real_answers(setup, programs, Path(scratch))
        version = answers["torch"]
        for answer in answers["answers"]:  # of the layouts, the last: the rows tell the others
            answer["layouts"] = dict([list(answer["layouts"].items())[-1]])
        found[name] = [
            {"program": program, "answer": answer}
            for program, answer in zip(programs, answers["answers"], strict=True)
        ]
    return found, version


def _snapshots() -> list[dict[str, Any]]:
    found = []
    for name, seed in _SNAPSHOTS:
        setup = SETUPS[name]
        with tempfile.TemporaryDirectory() as scratch:
            real_answers(setup, [random_program(setup, seed)], Path(scratch))
            data = pickle.loads(Path(scratch, "0.pickle").read_bytes())
        for block in (block for segment in data["segments"] for block in segment["blocks"]):
            block.pop("frames", None)
        for segment in data["segments"]:
            segment.pop("frames", None)
        data["device_traces"] = [
            [{key: entry[key] for key in _KEPT if key in entry} for entry in trace]
            for trace in data["device_traces"]
        ]
        found.append({"setup": name, "seed": seed, "snapshot": data})
    return found


def _settings() -> dict[str, Any]:
    texts = [text for line in _SETTINGS.strip("\n").splitlines() for text in line.split("|")]
    run = subprocess.run(
        [sys.executable, "-c", _READ], input=json.dumps(texts), capture_output=True, text=True
    )
    run.check_returncode()
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def _write(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, separators=(",", ":"))
    path.write_bytes(lzma.compress(text.encode(), preset=9))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
