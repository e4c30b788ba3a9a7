"""Predicted runs written to files, in the form that the file's ending names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.prediction import Prediction

__all__ = ["FORMATS", "check_path", "write_snapshot_file", "write_trace"]

FORMATS = {
    ".pickle": "a snapshot for PyTorch's memory page and `membench replay`",
    ".json": "trace events for Perfetto and chrome://tracing",
}


def check_path(path: Path) -> None:
    """Raise MembenchError unless ``path`` ends as a format does and its folder is there."""
    if path.suffix not in FORMATS:
        forms = ", or ".join(f"FILE{ending}, {what}" for ending, what in FORMATS.items())
        raise MembenchError(f"{path} has no ending that names a format: write {forms}")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise MembenchError(f"cannot write {path}: {why}")


def write_trace(path: Path, prediction: Prediction) -> int:
    """Write all that the allocator would do; return how many entries that is.

    After a request that did not fit the trace ends, with it.

    Errors: MembenchError for an ending of no known format, and where the file cannot be written.
    """
    from bench.export.chrome import chrome_trace
    from bench.export.recording import record_run
    from bench.export.snapshot import snapshot
    from bench.predict.alloc_conf import parse_alloc_conf
    from bench.predict.workspaces import fill_workspaces

    check_path(path)
    record, card = prediction.record, prediction.card
    capacity = record.capacity_bytes or card.capacity_bytes
    settings = parse_alloc_conf(prediction.allocator_settings)
    trace = fill_workspaces(prediction.trace(), card, prediction.case.cudnn_benchmark)
    recording = record_run(trace, capacity, settings)
    if path.suffix == ".pickle":
        write_snapshot_file(path, snapshot(recording, trace, settings, capacity))
    else:
        about = {
            "case": record.case,
            "card": card.name,
            "evidence": record.evidence,
            "tracer": record.tracer,
            "membench": record.environment.membench,
        }
        _write(path, lambda: json.dumps(chrome_trace(recording, trace, about)).encode())
    return len(recording.entries)


def write_snapshot_file(path: Path, data: dict[str, Any]) -> None:
    """Pickle a snapshot of plain data."""
    _write(path, lambda: pickle.dumps(data, protocol=4))


def _write(path: Path, content: Callable[[], bytes]) -> None:
    try:
        path.write_bytes(content())
    except OSError as error:
        raise MembenchError(f"cannot write {path}: {error.strerror or error}") from None
