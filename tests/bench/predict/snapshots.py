"""Snapshots and reduced traces for the tests, and where the recorded ones are."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from tests.bench.predict.random_runs import Setup, random_actions, run_reference
from tests.bench.predict.reference_allocator import (
    MIB,
    NO_LIMIT,
    Piece,
    ReferenceAllocator,
    Segment,
)

TRACES = Path(__file__).resolve().parents[3] / "../shared/traces"
RECORDED = ("cnn_train_loop", "transformer_2.7b_forward", "transformer_2.7b_train_step")


def recorded_path(name: str) -> Path:
    """The file of a trace recorded on a real GPU; skips, visibly, where it is absent."""
    path = TRACES / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"the recorded trace {name} is not beside this checkout")
    return path


def recorded_data(name: str) -> Any:
    return json.loads(gzip.decompress(recorded_path(name).read_bytes()))


def random_snapshot(
    setup: Setup, seed: int, *, count: int = 200, streams: int = 2, keep: float = 1.0
) -> dict[str, Any]:
    """What PyTorch would have recorded of a random run; ``keep`` of its history is left."""
    reference = setup.reference()
    reference.range_bytes = 1 << 41  # no real card's is as small as these capacities'
    run_reference(reference, random_actions(seed, count, streams))
    return snapshot_of(reference, max(1, int(keep * len(reference.trace))))


def write_snapshot(path: Path, snapshot: dict[str, Any]) -> Path:
    path.write_bytes(pickle.dumps(snapshot, protocol=4))
    return path


def shift_addresses(
    events: list[list[Any]], kind: str, count: int, seed: int, frees_too: bool = False
) -> None:
    """Shift the addresses of ``count`` events of a reduced trace in place."""
    rng = random.Random(seed)
    of_kind = [place for place, event in enumerate(events) if event[0] == kind]
    for place in rng.sample(of_kind, count):
        old = events[place][1]
        events[place][1] += rng.choice([512, -512, 4096, 2**21, 2**30])
        following = (e for e in events[place + 1 :] if e[:2] == ["free", old])
        if frees_too and (free := next(following, None)) is not None:
            free[1] = events[place][1]


def _settings(reference: ReferenceAllocator) -> dict[str, Any]:
    conf = []
    if reference.large_segment != 20 * MIB:
        conf.append(f"large_segment_size_mb:{reference.large_segment // MIB}")
    if reference.max_rounding != 20 * MIB:
        conf.append(f"max_non_split_rounding_mb:{reference.max_rounding // MIB}")
    if reference.fraction != 1.0:
        conf.append(f"per_process_memory_fraction:{reference.fraction}")
    divisions = reference.divisions or (0,) * 16
    return {
        "PYTORCH_CUDA_ALLOC_CONF": ",".join(conf),
        "max_split_size": -1 if reference.max_split == NO_LIMIT else reference.max_split,
        "garbage_collection_threshold": reference.gc_threshold,
        "expandable_segments": reference.expandable,
        "roundup_power2_divisions": {str(2**i): d for i, d in enumerate(divisions)},
    }


def snapshot_of(
    reference: ReferenceAllocator, history: int | None = None, device: int = 0
) -> dict[str, Any]:
    """What ``torch.cuda.memory._snapshot`` returns, the last ``history`` events kept."""
    traces: list[list[dict[str, Any]]] = [[] for _ in range(device + 1)]
    traces[device] = reference.trace if history is None else reference.trace[-history:]
    found = []
    for segment in reference.segments:
        stretch: list[Piece] = []
        for piece in [*segment.pieces, None]:
            if piece is not None and piece.state != "unmapped":
                stretch.append(piece)
            elif stretch:
                found.append(_snapshot_segment(segment, stretch, device))
                stretch = []
    found.sort(key=lambda s: s["address"])
    return {
        "segments": found,
        "device_traces": traces,
        "allocator_settings": _settings(reference),
    }


def _snapshot_segment(segment: Segment, stretch: list[Piece], device: int) -> dict[str, Any]:
    states = {"live": "active_allocated", "pending": "active_pending_free", "free": "inactive"}
    return {
        "device": device,
        "address": stretch[0].address,
        "total_size": sum(piece.size for piece in stretch),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "blocks": [
            {
                "address": piece.address,
                "size": piece.size,
                "requested_size": piece.requested,
                "state": states[piece.state],
                "frames": [],
            }
            for piece in stretch
        ],
    }
