"""The section ``calibration`` of a card's file as it grows, reading by reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import MembenchError
from bench.predict.calibration import CALIBRATION_SCHEMA
from bench.predict.cards import Card
from bench.predict.library_calls import ConvolutionCall, OperatorCall

__all__ = ["Section", "load_section", "save_card"]

_SOFTWARE = ("torch", "cuda", "cudnn", "driver", "gpu")


@dataclass(slots=True)
class Section:
    """What has been measured so far, and with which software."""

    software: dict[str, Any]  # torch, cuda, cudnn, driver, gpu
    readings: dict[tuple[ConvolutionCall, bool], dict[str, Any]] = field(default_factory=dict)
    held_out: dict[tuple[ConvolutionCall, bool], dict[str, Any]] = field(default_factory=dict)
    operators: dict[OperatorCall, int] = field(default_factory=dict)
    seen_operators: set[str] = field(default_factory=set)  # digests of all that were tried
    context: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    suites: tuple[str, ...] = ()
    remaining: int = 0
    measured_at: str | None = None

    def add_operator(self, call: OperatorCall, reading: dict[str, Any]) -> None:
        """Keep an operator's reading; one that could not be taken is known to have been tried."""
        self.seen_operators.add(digest(call))
        if "skipped" not in reading:
            self.operators[call] = reading["workspace_bytes"]

    def has_operator(self, call: OperatorCall) -> bool:
        """Whether the call has been tried."""
        return digest(call) in self.seen_operators

    def add_context(self, network: str, reading: dict[str, Any]) -> None:
        """Keep one network's reading; of the bare context and of cuDNN's the highest stands."""
        self.context.setdefault("tried", []).append(network)
        if "skipped" in reading:
            self.notes.append(f"context of {network}: {reading['skipped']}")
        for name in ("bare_bytes", "cudnn_bytes", "cublas_workspace_bytes"):
            known = [v for v in (self.context.get(name), reading.get(name)) if v is not None]
            self.context[name] = max(known) if known else None
        if reading.get("network_bytes") is not None:
            self.context.setdefault("networks_bytes", {})[network] = reading["network_bytes"]
        self.notes += [note for note in reading.get("notes", ()) if note not in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return the section as the card's file holds it.

        Operators that never took anything are left out, but for the digests of their calls.
        """
        context = dict(self.context)
        cublas = context.pop("cublas_workspace_bytes", None)
        taking = {call.operator for call, size in self.operators.items() if size}
        return {
            "schema_version": CALIBRATION_SCHEMA,
            **self.software,
            "measured_at": self.measured_at,
            "suites": list(self.suites),
            "complete": self.remaining == 0,
            "remaining": self.remaining,
            "context": {"networks_bytes": {}, **context},
            "cublas_workspace_bytes": cublas,
            "convolutions": _rows(self.readings, skipped=False),
            "held_out": _rows(self.held_out, skipped=False),
            "not_measured": _rows(self.readings, skipped=True) + _rows(self.held_out, skipped=True),
            "operators": [
                {**call._asdict(), "temporary_bytes": size}
                for call, size in self.operators.items()
                if call.operator in taking
            ],
            "operators_tried": sorted(self.seen_operators),
            "notes": self.notes,
        }


def digest(call: OperatorCall) -> str:
    """Return a short hash of a call."""
    return hashlib.sha256(f"{call.operator} {call.arguments}".encode()).hexdigest()[:12]


def _rows(
    readings: dict[tuple[ConvolutionCall, bool], dict[str, Any]], *, skipped: bool
) -> list[dict[str, Any]]:
    return [
        {**call.to_dict(), "benchmark": benchmark, **reading}
        for (call, benchmark), reading in readings.items()
        if ("skipped" in reading) == skipped
    ]


def load_section(path: Path, software: dict[str, Any]) -> Section:
    """Return what the card's file holds already, if it was measured with the same software.

    Otherwise an empty section, with a note of what it takes the place of.
    Raises MembenchError for a file that cannot be read.
    """
    software = {name: software.get(name) for name in _SOFTWARE}
    try:
        data = json.loads(path.read_text(encoding="utf-8")).get("calibration")
    except (FileNotFoundError, NotADirectoryError):
        return Section(software)
    except (OSError, ValueError, AttributeError) as error:
        raise MembenchError(f"{path}: the card cannot be read: {error}") from None
    if not data:
        return Section(software)
    if not isinstance(data, dict):
        raise MembenchError(f"{path}: its calibration is no JSON object: remove the file")
    theirs = {name: data.get(name) for name in _SOFTWARE}
    if theirs != software or data.get("schema_version") != CALIBRATION_SCHEMA:
        changed = ", ".join(f"{n} {theirs[n]}" for n in _SOFTWARE if theirs[n] != software[n])
        return Section(software, notes=[f"measured anew: the one before was with {changed}"])
    return _restored(data, software, path)


def _restored(data: dict[str, Any], software: dict[str, Any], path: Path) -> Section:
    section = Section(software)
    try:
        section.notes = list(data["notes"])
        for name, into in (("convolutions", section.readings), ("held_out", section.held_out)):
            into.update(_reading(row) for row in data[name])
        section.readings.update(_reading(row) for row in data["not_measured"])
        for row in data["operators"]:
            call = OperatorCall(row["operator"], row["arguments"])
            section.operators[call] = row["temporary_bytes"]
        section.seen_operators = set(data["operators_tried"])
        section.suites = tuple(data["suites"])
        section.context = {
            **data["context"],
            "cublas_workspace_bytes": data["cublas_workspace_bytes"],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MembenchError(
            f"{path}: its calibration cannot be gone on with ({error!r}): remove the file"
        ) from None
    return section


def _reading(row: dict[str, Any]) -> tuple[tuple[ConvolutionCall, bool], dict[str, Any]]:
    kept: dict[str, Any] = {
        k: row[k] for k in ("first_bytes", "workspace_bytes", "skipped") if k in row
    }
    return (ConvolutionCall.from_dict(row), row["benchmark"]), kept


def _cuda_of(torch_version: str) -> str:
    """Return ``"13.0"`` for ``2.11.0+cu130``, nothing for a build that does not say."""
    match = re.search(r"\+cu([0-9]+)([0-9])$", torch_version)
    return f"{match[1]}.{match[2]}" if match else ""


def save_card(card: Card, section: Section, path: Path) -> Card:
    """Write the card with its calibration, in place of an earlier file; return it.

    Its context is the largest that was measured, where one was.
    Raises MembenchError where the file cannot be written.
    """
    networks = section.context.get("networks_bytes") or {}
    measured: dict[str, Any] = {"calibration": section.to_dict()}
    if networks:
        software = section.software
        measured |= {
            "context_bytes": max(networks.values()),
            "context_source": "Measured by membench calibrate: the largest of "
            f"{len(networks)} networks, torch {software['torch']}, cuDNN {software['cudnn']}, "
            f"driver {software['driver']}",
            "context_cuda": _cuda_of(str(software["torch"])),
            "context_cuda_source": f"torch {software['torch']}",
        }
    card = dataclasses.replace(card, **measured)
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise MembenchError(
            f"cannot write the card {path}: {error.strerror or error}; choose another with -o"
        ) from None
    return card
