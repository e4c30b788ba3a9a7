"""What was measured on a real card: the section ``calibration`` of its file, and what follows.

``membench calibrate`` writes it. A call that was measured takes what it took. Another one takes
what those most like it took, and says whether it lies between them (``interpolated``) or outside
(``extrapolated``); without any that are like it, it is the card's estimate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.errors import MembenchError
from bench.predict.library_calls import ConvolutionCall, OperatorCall

__all__ = [
    "CALIBRATION_SCHEMA",
    "Basis",
    "Calibration",
    "CallMemory",
    "ConvolutionReading",
    "Versions",
    "read_calibration",
]

CALIBRATION_SCHEMA = 1

Basis = Literal["measured", "interpolated", "extrapolated", "estimated"]
_NEIGHBOURS = 8  # the calls most like the one asked about, between which it is placed
_Group = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The software that a calibration was measured with."""

    torch: str | None = None
    cudnn: str | None = None
    driver: str | None = None

    def differences(self, torch: str | None, cudnn: str | None, driver: str | None) -> list[str]:
        """Return ``"torch 2.11.0, here 2.13.0"`` for each that is known on both sides and differs.

        Of torch's version the build after ``+`` does not count.
        """
        pairs = (
            ("torch", _release(self.torch), _release(torch)),
            ("cuDNN", self.cudnn, cudnn),
            ("driver", self.driver, driver),
        )
        return [f"{name} {a}, here {b}" for name, a, b in pairs if a and b and a != b]


def _release(version: str | None) -> str | None:
    return None if version is None else version.partition("+")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionReading:
    """What a call took beside its operands and result: the first time, and ever after.

    With ``cudnn.benchmark`` the first call tries algorithms out, with the largest workspace that
    fits; without it the two differ where cuDNN's first choice could not run.
    """

    call: ConvolutionCall
    benchmark: bool
    workspace_bytes: int
    first_bytes: int


@dataclass(frozen=True, slots=True)
class CallMemory:
    """What a call takes at most, and on what that figure rests."""

    first_bytes: int
    workspace_bytes: int
    basis: Basis


@dataclass(slots=True)
class Calibration:
    """Readings of one card, ready to be asked."""

    versions: Versions
    context_bytes: Mapping[str, int]  # by network and precision, "fcn/fp32"
    convolutions: Mapping[tuple[ConvolutionCall, bool], ConvolutionReading]
    operators: Mapping[OperatorCall, int]
    _groups: dict[_Group, list[ConvolutionReading]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups: defaultdict[_Group, list[ConvolutionReading]] = defaultdict(list)
        for reading in self.convolutions.values():
            for group in _groups_of(reading.call, reading.benchmark):
                groups[group].append(reading)
        self._groups = dict(groups)

    @property
    def watched(self) -> frozenset[str]:
        """The operators that took more than their results."""
        return frozenset(call.operator for call, size in self.operators.items() if size)

    def convolution(self, call: ConvolutionCall, benchmark: bool) -> CallMemory | None:
        """Return what the call takes; None where nothing like it was measured."""
        reading = self.convolutions.get((call, benchmark))
        if reading is not None:
            return CallMemory(reading.first_bytes, reading.workspace_bytes, "measured")
        for group in _groups_of(call, benchmark):
            if group in self._groups:
                return _between(call, self._groups[group])
        return None

    def operator(self, call: OperatorCall) -> tuple[int, Basis]:
        """Return what the call takes beside its results.

        One that was not measured takes the part of its operands' bytes that the call of the same
        operator and types with the nearest bytes took.
        """
        if call in self.operators:
            return self.operators[call], "measured"
        alike = [
            (abs(_log2(known.operand_bytes) - _log2(call.operand_bytes)), known.operand_bytes, size)
            for known, size in self.operators.items()
            if known.operator == call.operator and _types(known) == _types(call)
        ]
        if not alike:
            return 0, "extrapolated"
        _, operand_bytes, size = min(alike)
        return round(size * call.operand_bytes / max(1, operand_bytes)), "extrapolated"


def _types(call: OperatorCall) -> tuple[str, ...]:
    return tuple(dtype for _, dtype in call.tensors)


def _groups_of(call: ConvolutionCall, benchmark: bool) -> Iterable[_Group]:
    """Return the groups that a call belongs to, the one of most alike calls first."""
    family = (call.direction, call.transposed, call.dtype, benchmark, len(call.input))
    pointwise = set(call.weight[2:]) == {1}
    yield (*family, call.channels_last, call.depthwise, pointwise)
    yield family


def _features(call: ConvolutionCall) -> tuple[float, ...]:
    """Return what makes two calls alike: channels, kernel and voxels, in powers of two."""
    return (
        _log2(call.input[1] // call.groups),
        _log2(call.output[1]),
        _log2(math.prod(call.weight[2:])),
        _log2(call.input[0] * math.prod(call.input[2:])),
        _log2(math.prod(call.stride)),
    )


def _between(call: ConvolutionCall, readings: list[ConvolutionReading]) -> CallMemory:
    """Place a call between two of the calls most like it, or scale the one that is nearest."""
    wanted, size = _features(call), call.operand_bytes
    ranked = sorted(
        readings,
        key=lambda reading: (
            sum(abs(a - b) for a, b in zip(_features(reading.call), wanted, strict=True)),
            reading.call,
        ),
    )[:_NEIGHBOURS]
    below = max(
        (r for r in ranked if r.call.operand_bytes <= size),
        key=lambda r: r.call.operand_bytes,
        default=None,
    )
    above = min(
        (r for r in ranked if r.call.operand_bytes >= size),
        key=lambda r: r.call.operand_bytes,
        default=None,
    )
    if below is None or above is None:
        nearest = ranked[0]
        factor = size / nearest.call.operand_bytes
        first, later = nearest.first_bytes * factor, nearest.workspace_bytes * factor
        return CallMemory(round(first), round(later), "extrapolated")
    span = above.call.operand_bytes - below.call.operand_bytes
    share = (size - below.call.operand_bytes) / span if span else 0.0
    return CallMemory(
        round(below.first_bytes + share * (above.first_bytes - below.first_bytes)),
        round(below.workspace_bytes + share * (above.workspace_bytes - below.workspace_bytes)),
        "interpolated",
    )


def _log2(number: int) -> float:
    return math.log2(max(1, number))


def read_calibration(data: Mapping[str, Any] | None, card: str) -> Calibration | None:
    """Read the section of a card's file; None where there is none.

    Held-out readings are left alone: no prediction may rest on them.
    Raises MembenchError saying which card's calibration cannot be read, and why.
    """
    if data is None:
        return None
    schema = data.get("schema_version")
    if schema != CALIBRATION_SCHEMA:
        raise MembenchError(
            f"the calibration of card {card} has schema_version {schema!r}, this membench reads "
            f"{CALIBRATION_SCHEMA}: run membench calibrate again"
        )
    try:
        readings = [_reading(row) for row in data["convolutions"]]
        return Calibration(
            versions=Versions(**{name: data.get(name) for name in ("torch", "cudnn", "driver")}),
            context_bytes={str(k): int(v) for k, v in data["context"]["networks_bytes"].items()},
            convolutions={(r.call, r.benchmark): r for r in readings},
            operators={
                OperatorCall(row["operator"], row["arguments"]): int(row["temporary_bytes"])
                for row in data["operators"]
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise MembenchError(
            f"the calibration of card {card} cannot be read: {what}; run membench calibrate again"
        ) from None


def _reading(row: Mapping[str, Any]) -> ConvolutionReading:
    return ConvolutionReading(
        call=ConvolutionCall.from_dict(dict(row)),
        benchmark=bool(row["benchmark"]),
        workspace_bytes=int(row["workspace_bytes"]),
        first_bytes=int(row["first_bytes"]),
    )
