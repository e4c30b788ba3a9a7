"""A record: what one case gave. Raw readings, integer bytes; reports compute the rest.

Fields are only ever added. A missing reading is None, never 0 or -1.
requested <= allocated <= active <= reserved <= process.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from bench.case import known_fields
from bench.errors import MembenchError
from bench.timeline import Timeline

__all__ = [
    "PHASES",
    "SCHEMA_VERSION",
    "SMALL_HOLDERS",
    "Category",
    "Environment",
    "Evidence",
    "Holder",
    "Parts",
    "Peaks",
    "Record",
    "Status",
    "append_line",
    "append_record",
    "last_records",
    "read_records",
    "results_file",
]

SCHEMA_VERSION = 1
SMALL_HOLDERS = "(smaller ones together)"  # the operator of holders added up by category
PHASES = ("model", "forward", "backward", "optimizer")

Status = Literal["ok", "oom", "failed", "timeout", "skipped"]
Evidence = Literal["measured", "predicted"]
Tracer = Literal["cuda", "cuda-shim", "cpu"]
Category = Literal[
    "parameter", "gradient", "optimizer_state", "activation", "input", "temporary", "workspace"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The allocator's highest counters while one phase ran, in bytes."""

    peak_requested_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_active_bytes: int | None = None
    peak_reserved_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What ``process_bytes`` is made of; the known parts add up to it.

    ``tensors_bytes``: blocks held by tensors at the allocated peak. ``workspace_bytes``: blocks
    held by library workspaces at that moment (None when measured: the allocator cannot tell them
    from tensors). ``allocator_bytes``: reserved above both. ``context_bytes``: what the process
    holds outside the caching allocator.
    """

    tensors_bytes: int | None = None
    allocator_bytes: int | None = None
    workspace_bytes: int | None = None
    context_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds bytes at the allocated peak, added up over equal allocations."""

    module: str  # dotted name inside the model, "" for the model itself or outside it
    operator: str
    source_line: str  # "file.py:12", of the forward code when the backward allocated
    category: Category
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """All that shaped a record besides its case. None: not known, or not there."""

    membench: str
    torch: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    triton: str | None = None
    driver: str | None = None
    gpu: str | None = None
    gpu_uuid: str | None = None
    python: str | None = None
    platform: str | None = None
    allocator_settings: str = ""
    card_hash: str | None = None  # of the card's data, where it was predicted for one
    cudnn_benchmark: bool | None = None
    suite: str | None = None
    suite_hash: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    seed: int | None = None
    started_at: str | None = None  # UTC, ISO 8601
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One case's outcome. ``reason`` is empty if and only if ``status`` is ``"ok"``."""

    case: str
    network: str
    variant: str
    techniques: tuple[str, ...]
    exact: bool
    precision: str
    shape: tuple[int, ...]
    requested_shape: tuple[int, ...]
    mode: str
    batch_size: int
    status: Status
    reason: str
    evidence: Evidence
    definition: dict[str, Any]
    environment: Environment
    parameters: int | None = None
    tracer: Tracer | None = None
    card: str | None = None
    capped_to: str | None = None
    capacity_bytes: int | None = None
    needs_bytes: int | None = None
    peak_requested_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_active_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    peak_host_bytes: int | None = None  # of host memory that offloading took; None: it took none
    parts: Parts = Parts()
    uncalibrated: tuple[str, ...] = ()
    phases: dict[str, Peaks] = field(default_factory=dict)
    peak_holders: tuple[Holder, ...] = ()
    timeline: Timeline | None = None  # of predicted records
    forward_flops: int | None = None  # 2 x multiply-adds, see bench.flops
    step_flops: int | None = None  # of the whole step, with what is recomputed
    recomputation_factor: float | None = None  # step_flops over those of keeping everything
    step_times_s: tuple[float, ...] = ()
    volumes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status {self.status!r}, not one of {', '.join(get_args(Status))}")
        if self.evidence not in get_args(Evidence):
            raise ValueError(f"evidence {self.evidence!r}, neither measured nor predicted")
        if (self.status == "ok") == bool(self.reason):
            raise ValueError(f"status {self.status!r} with reason {self.reason!r}")
        if self.status == "ok" and self.process_bytes is None:
            raise ValueError("an ok record needs process_bytes")

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Make a record from its JSON object; fields of later versions are ignored.

        Raises ValueError, TypeError or AttributeError when it is not a record's.
        """
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
        missing = [name for name in required if name not in data]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        values = _known(cls, data)
        for key in ("techniques", "uncalibrated", "step_times_s", "volumes"):
            values[key] = tuple(values.get(key, ()))
        for key in ("shape", "requested_shape"):
            values[key] = tuple(_whole(key, side) for side in values[key])
        values["environment"] = Environment(**_known(Environment, data["environment"]))
        notes = values["environment"].notes
        values["environment"] = dataclasses.replace(values["environment"], notes=tuple(notes))
        values["parts"] = Parts(**_known(Parts, data.get("parts") or {}))
        values["phases"] = {
            name: Peaks(**_known(Peaks, peaks)) for name, peaks in data.get("phases", {}).items()
        }
        values["peak_holders"] = tuple(
            Holder(**_known(Holder, h)) for h in data.get("peak_holders", ())
        )
        timeline = data.get("timeline")
        values["timeline"] = Timeline.from_dict(timeline) if timeline else None
        return cls(**values)


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``cls``; those in bytes must be whole numbers, or None."""
    values = known_fields(cls, data)
    for name in _byte_fields(cls):
        value = values.get(name)
        if value is not None:
            _whole(name, value)
    return values


@cache
def _byte_fields(cls: type) -> tuple[str, ...]:  # asked for every holder of every record
    return tuple(f.name for f in dataclasses.fields(cls) if f.name.endswith("_bytes"))


def _whole(name: str, value: object) -> int:
    if type(value) is not int or value < 0:  # True is an int too
        raise ValueError(f"{name} is {value!r}, not a whole number from 0 on")
    return value


def results_file(folder: Path, card: str, suite: str, evidence: Evidence) -> Path:
    """Return ``folder/<card>/<suite>.<measured|predicted>.jsonl``."""
    return folder / card / f"{suite}.{evidence}.jsonl"


def append_record(path: Path, record: Record) -> None:
    """Append one line, in one write, and have it on disk when this returns.

    A line that a killed run left unfinished is closed first, so it costs only itself. Raises
    MembenchError when the file takes no more, as on a full disk.
    """
    try:
        append_line(path, record.to_json())
    except OSError as error:
        raise MembenchError(
            f"cannot write the record of {record.case} to {path}: {error.strerror or error}; "
            "the records before it are kept: mend that and go on with --resume"
        ) from None


def append_line(path: Path, text: str) -> None:
    """Append one line to a file, in one write, closing first a line left unfinished; OSErrors pass.

    It is on disk when this returns.
    """
    line = text + "\n"
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order; a last line that was cut off is left out.

    Raises MembenchError naming the line when any other line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MembenchError(f"cannot read results {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Record.from_dict(json.loads(line))
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, json.JSONDecodeError) and _cut_off(line, error):
                continue
            raise MembenchError(f"{path}, line {number}: not a record: {error}") from None


def _cut_off(line: str, error: json.JSONDecodeError) -> bool:
    """Whether a line is the beginning of a record that a killed run did not finish writing.

    Such a line is right up to its end: the decoder stops there, or at the start of the text, name
    or number that the end cuts in two.
    """
    if not line.startswith("{"):
        return False
    rest = line[error.pos :]
    return not rest or "Unterminated string" in error.msg or (len(rest) < 8 and rest[-1] != "}")


def last_records(records: Iterable[Record]) -> list[Record]:
    """Return the last record of each case, in order of first appearance.

    Measured and predicted, other suites, other cards and emulated cards are cases of their own.
    """
    last: dict[tuple[str | None, ...], Record] = {}
    for record in records:
        suite = record.environment.suite
        last[(suite, record.case, record.evidence, record.card, record.capped_to)] = record
    return list(last.values())
