"""A card: what a GPU model gives a training step, as data. One JSON file each in ``cards/``.

A figure that nobody has measured stands there as an estimate with its source, and the records that
rest on it say so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from bench.errors import MembenchError, nearest
from bench.predict.shim import torch_build

__all__ = [
    "DEFAULT_MULTIPROCESSORS",
    "Card",
    "ConvolutionKind",
    "ConvolutionWorkspace",
    "WorkspaceRule",
]

ConvolutionKind = Literal["float32", "half"]

DEFAULT_MULTIPROCESSORS = 132
"""What a card's file that does not say is taken to have: as an H100 or H200."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*-[0-9]+gb")
# 32 MiB on compute capability 9.0, and on all later ones from torch 2.12 on; 2 x 4096 KiB +
# 8 x 16 KiB on the others. Seen with 2.11 and 2.13; 2.12 is taken to be as 2.13.
_CUBLAS_NEW_BYTES = 33_554_432
_CUBLAS_OLD_BYTES = 8_519_680
_ALL_NEWER_ARE_LARGE = (2, 12)


@cache
def _installed_torch() -> tuple[int, int]:
    """Return the release of the torch that is here, not imported; that of the rule without one."""
    torch = torch_build()
    return (torch and torch.release) or _ALL_NEWER_ARE_LARGE


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceRule:
    """What cuDNN takes during one convolution: a floor, and a part of its activation operands.

    Activation operands are the input, the output and their gradients, not the weights.
    """

    floor_bytes: int
    operand_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionWorkspace:
    """cuDNN's workspace by the operands' precision; ``half`` is fp16 and bf16."""

    float32: WorkspaceRule
    half: WorkspaceRule
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU model. ``memory_bytes`` is CUDA's total memory, a little less than nvidia-smi's.

    ``context_bytes``: what a process holds outside the caching allocator. ``calibration``: what
    was measured on a real card, if anything was; its form is not fixed yet.
    """

    name: str  # "<model>-<memory>gb"
    model: str  # as the driver names it
    compute_capability: tuple[int, int]
    memory_bytes: int
    memory_source: str
    context_bytes: int
    context_source: str
    convolution_workspace: ConvolutionWorkspace
    calibration: dict[str, Any] | None = None
    multiprocessors: int = DEFAULT_MULTIPROCESSORS  # reductions are laid out by it
    context_cuda: str = ""  # the CUDA version that context_bytes is from; empty: not known
    context_cuda_source: str = ""

    @property
    def capacity_bytes(self) -> int:
        """What the caching allocator may reserve: the memory less the context."""
        return self.memory_bytes - self.context_bytes

    @property
    def cublas_workspace_bytes(self) -> int:
        """What cuBLAS takes for each handle and stream, and keeps; exact, by this torch's rule."""
        large = self.compute_capability >= (9, 0)
        if _installed_torch() < _ALL_NEWER_ARE_LARGE:
            large = self.compute_capability == (9, 0)
        return _CUBLAS_NEW_BYTES if large else _CUBLAS_OLD_BYTES

    def convolution_workspace_bytes(self, kind: ConvolutionKind, operand_bytes: int) -> int:
        """Return cuDNN's workspace for a call whose activation operands have so many bytes."""
        rule = getattr(self.convolution_workspace, kind)
        return int(rule.floor_bytes + rule.operand_fraction * operand_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON-ready data."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Return a short hash of all that a prediction takes from the card, and of its sources.

        Not of ``context_cuda`` and ``multiprocessors``, which came later than the first records:
        theirs stay comparable.
        """
        data = self.to_dict()
        for name in ("context_cuda", "context_cuda_source", "multiprocessors"):
            del data[name]
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: Any, where: str = "card") -> Card:
        """Make the card that ``to_dict`` or a file gave.

        Raises MembenchError naming ``where`` and the field that is missing, unknown or wrong.
        """
        fields = _Fields(data, where)
        card = cls(
            name=fields.text("name"),
            model=fields.text("model"),
            compute_capability=fields.capability("compute_capability"),
            memory_bytes=fields.count("memory_bytes"),
            memory_source=fields.text("memory_source"),
            context_bytes=fields.count("context_bytes"),
            context_source=fields.text("context_source"),
            convolution_workspace=_convolution_workspace(fields.object("convolution_workspace")),
            calibration=fields.optional("calibration"),
            multiprocessors=fields.count_or("multiprocessors", DEFAULT_MULTIPROCESSORS),
            context_cuda=fields.text_or_empty("context_cuda"),
            context_cuda_source=fields.text_or_empty("context_cuda_source"),
        )
        fields.no_others()
        if not _NAME.fullmatch(card.name):
            raise fields.wrong("name", "a name such as 'rtx4090-24gb'")
        if card.context_bytes >= card.memory_bytes:
            raise fields.wrong("context_bytes", "less than memory_bytes")
        return card


def _convolution_workspace(fields: _Fields) -> ConvolutionWorkspace:
    workspace = ConvolutionWorkspace(
        float32=_workspace_rule(fields.object("float32")),
        half=_workspace_rule(fields.object("half")),
        source=fields.text("source"),
    )
    fields.no_others()
    return workspace


def _workspace_rule(fields: _Fields) -> WorkspaceRule:
    rule = WorkspaceRule(
        floor_bytes=fields.count("floor_bytes"),
        operand_fraction=fields.fraction("operand_fraction"),
    )
    fields.no_others()
    return rule


class _Fields:
    """A JSON object read field by field; every error names the file and the field."""

    def __init__(self, data: Any, where: str, prefix: str = "") -> None:
        self.where, self.prefix = where, prefix
        self.known: list[str] = []
        if not isinstance(data, dict):
            what = f"field {prefix.rstrip('.')!r}" if prefix else "the file"
            raise MembenchError(f"{where}: {what} must be a JSON object, got {data!r:.60}")
        self.data: dict[str, Any] = data

    def wrong(self, name: str, wanted: str) -> MembenchError:
        got = f"got {self.data[name]!r:.60}" if name in self.data else "it is missing"
        return MembenchError(f"{self.where}: field {self.prefix + name!r} must be {wanted}, {got}")

    def _get(self, name: str) -> Any:
        self.known.append(name)
        return self.data.get(name)

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, "a text")
        return value

    def text_or_empty(self, name: str) -> str:
        self.known.append(name)
        return "" if self.data.get(name, "") == "" else self.text(name)

    def count(self, name: str) -> int:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(name, "a whole number of bytes")
        return value

    def count_or(self, name: str, default: int) -> int:
        self.known.append(name)
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, "a whole number from 1 on")
        return value

    def fraction(self, name: str) -> float:
        value = self._get(name)
        # not (... >= 0) refuses NaN too, which Python's JSON reader lets through
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1000:
            raise self.wrong(name, "a number from 0 on")
        return float(value)

    def capability(self, name: str) -> tuple[int, int]:
        value = self._get(name)
        if not isinstance(value, list | tuple) or [type(v) for v in value] != [int, int]:
            raise self.wrong(name, "two whole numbers, such as [8, 9]")
        return value[0], value[1]

    def object(self, name: str) -> _Fields:
        return _Fields(self._get(name), self.where, f"{self.prefix}{name}.")

    def optional(self, name: str) -> dict[str, Any] | None:
        value = self._get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "a JSON object or null")
        return value

    def no_others(self) -> None:
        for name in self.data:
            if name not in self.known:
                hint = nearest(name, self.known)
                raise MembenchError(
                    f"{self.where}: field {self.prefix + name!r} is not known{hint}"
                )
