"""The caching allocator's settings, as ``PYTORCH_ALLOC_CONF`` spells them.

Source: the option names, units and limits of torch 2.13 (c10/core/AllocatorConfig.h), in which
``PYTORCH_CUDA_ALLOC_CONF`` is the older name of the same variable. "mb" in an option's name is
2^20 bytes there, and so it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import MembenchError, nearest
from bench.units import MIB

__all__ = ["ROUNDUP_INTERVALS", "AllocatorSettings", "parse_alloc_conf", "settings_from_snapshot"]

ROUNDUP_INTERVALS = 16  # one per power of two from 1 MiB to 32 GiB; the last holds all above it
_DEFAULT_LARGE_SEGMENT_BYTES = 20 * MIB
_SMALLEST_LARGE_SEGMENT_MIB = 10  # exclusive: requests from 10 MiB on get a segment of their own

_MOST_REGISTER_THREADS = 128

# Options that PyTorch knows and that do not change where a block goes: switches, then numbers.
_SWITCHES_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)
_NUMBERS_WITHOUT_EFFECT = frozenset(
    {
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
    }
)
_WITH_EFFECT = frozenset(
    {
        "backend",
        "expandable_segments",
        "garbage_collection_threshold",
        "large_segment_size_mb",
        "max_non_split_rounding_mb",
        "max_split_size_mb",
        "per_process_memory_fraction",
        "roundup_power2_divisions",
    }
)
_KNOWN = _WITH_EFFECT | _SWITCHES_WITHOUT_EFFECT | _NUMBERS_WITHOUT_EFFECT


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """The settings that decide where a block goes; the defaults are PyTorch's.

    ``roundup_power2_divisions`` is empty (off) or has one entry for each power of two from 1 MiB
    (the first, also for all below) to 32 GiB (the last, also for all above).
    ``garbage_collection_threshold`` acts only with ``per_process_memory_fraction`` below 1.
    """

    max_split_size_bytes: int | None = None  # None: every block may be split
    max_non_split_rounding_bytes: int = _DEFAULT_LARGE_SEGMENT_BYTES
    garbage_collection_threshold: float = 0.0  # 0: off
    roundup_power2_divisions: tuple[int, ...] = ()
    expandable_segments: bool = False
    large_segment_size_bytes: int = _DEFAULT_LARGE_SEGMENT_BYTES
    per_process_memory_fraction: float = 1.0

    def to_conf(self) -> str:
        """Return the settings as ``PYTORCH_ALLOC_CONF`` would, defaults left out."""
        default = AllocatorSettings()
        parts = []
        if self.expandable_segments:
            parts.append("expandable_segments:True")
        if self.large_segment_size_bytes != default.large_segment_size_bytes:
            parts.append(f"large_segment_size_mb:{self.large_segment_size_bytes // MIB}")
        if self.max_split_size_bytes is not None:
            parts.append(f"max_split_size_mb:{self.max_split_size_bytes // MIB}")
        if self.max_non_split_rounding_bytes != self.large_segment_size_bytes:
            parts.append(f"max_non_split_rounding_mb:{self.max_non_split_rounding_bytes // MIB}")
        if any(self.roundup_power2_divisions):
            each = (f"{1 << i}:{d}" for i, d in enumerate(self.roundup_power2_divisions))
            parts.append(f"roundup_power2_divisions:[{','.join(each)}]")
        if self.garbage_collection_threshold:
            parts.append(f"garbage_collection_threshold:{self.garbage_collection_threshold}")
        if self.per_process_memory_fraction != 1.0:
            parts.append(f"per_process_memory_fraction:{self.per_process_memory_fraction}")
        return ",".join(parts)


def parse_alloc_conf(text: str) -> AllocatorSettings:
    """Return the settings that a ``PYTORCH_ALLOC_CONF`` string asks for; "" gives the defaults.

    Errors: MembenchError for an option or value that PyTorch would refuse, and for what it takes
    and is not simulated: ``backend:cudaMallocAsync``, which is another allocator,
    ``throw_on_cudamalloc_oom:True``, which refuses requests by rules of its own, a share of 0 of
    the memory, and numbers with anything after them.
    """
    options = _options(text)
    _check_without_effect(options)
    large = _large_segment_bytes(options)
    rounding = _mib(options, "max_non_split_rounding_mb", at_least=large // MIB)
    if options.get("backend", "native") != "native":
        raise _bad(f"backend:{options['backend']}", "only the native backend can be simulated")
    return AllocatorSettings(
        max_split_size_bytes=_mib(options, "max_split_size_mb", at_least=large // MIB),
        max_non_split_rounding_bytes=large if rounding is None else rounding,
        garbage_collection_threshold=_fraction(options, "garbage_collection_threshold", 0.0),
        roundup_power2_divisions=_divisions(options.get("roundup_power2_divisions", "")),
        expandable_segments=_switch(options, "expandable_segments"),
        large_segment_size_bytes=large,
        per_process_memory_fraction=_fraction(options, "per_process_memory_fraction", 1.0),
    )


def settings_from_snapshot(recorded: Mapping[str, Any]) -> AllocatorSettings:
    """Return the settings that a memory snapshot says were in force.

    ``recorded`` is its ``allocator_settings``: the configuration string, which alone holds the
    newer options, and the older ones spelled out, which win.

    Errors: MembenchError where a value is not of its kind.
    """
    text = recorded.get("PYTORCH_ALLOC_CONF") or recorded.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    base = parse_alloc_conf(str(text))
    try:
        split = int(recorded.get("max_split_size", base.max_split_size_bytes or -1))
        divisions = recorded.get("roundup_power2_divisions")
        return AllocatorSettings(
            max_split_size_bytes=split if 0 < split < 1 << 62 else None,
            max_non_split_rounding_bytes=base.max_non_split_rounding_bytes,
            garbage_collection_threshold=float(
                recorded.get("garbage_collection_threshold", base.garbage_collection_threshold)
            ),
            roundup_power2_divisions=(
                base.roundup_power2_divisions if divisions is None else _recorded(divisions)
            ),
            expandable_segments=bool(recorded.get("expandable_segments", base.expandable_segments)),
            large_segment_size_bytes=base.large_segment_size_bytes,
            per_process_memory_fraction=base.per_process_memory_fraction,
        )
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise MembenchError(f"the trace's allocator settings cannot be read: {error}") from None


def _recorded(divisions: Mapping[str, Any]) -> tuple[int, ...]:
    """Read ``{"1": 0, "2": 0, ...}``, keyed by the interval's start in MiB."""
    values = [0] * ROUNDUP_INTERVALS
    for start, division in divisions.items():
        values[_interval(int(start))] = int(division)
    return tuple(values) if any(values) else ()


def _options(text: str) -> dict[str, str]:
    """Split ``a:1,b:[1:2,>:3]`` into its options, the names checked."""
    options: dict[str, str] = {}
    depth = start = 0
    squeezed = "".join(text.split())
    for position, char in enumerate(squeezed + ","):
        depth += {"[": 1, "]": -1}.get(char, 0)
        if depth not in (0, 1):
            raise _bad(squeezed, "its brackets do not match")
        if char != "," or depth:
            continue
        part, start = squeezed[start:position], position + 1
        name, colon, value = part.partition(":")
        if not part and position == len(squeezed):  # nothing at all, or a comma at the end
            break
        if name not in _KNOWN:
            why = f"unknown option{nearest(name, _KNOWN)}" if part else "an option is missing"
            raise _bad(part or squeezed, why)
        if not colon or not value:
            raise _bad(part, f"write {name}:<value>")
        options[name] = value
    if depth:
        raise _bad(squeezed, "its brackets do not match")
    return options


def _check_without_effect(options: Mapping[str, str]) -> None:
    """Refuse the values that PyTorch would refuse of options that move no block."""
    for name in sorted(_SWITCHES_WITHOUT_EFFECT & options.keys()):
        if _switch(options, name) and name == "throw_on_cudamalloc_oom":
            raise _bad(f"{name}:True", "what it refuses is not simulated: leave it out")
    for name in sorted(_NUMBERS_WITHOUT_EFFECT & options.keys()):
        value, option = options[name], f"{name}:{options[name]}"
        number = _whole(value, option)
        if name == "pinned_reserve_segment_size_mb" and not number:
            raise _bad(option, "it must be at least 1")
        if name == "pinned_num_register_threads":
            _power_of_two(value, option)
            if number > _MOST_REGISTER_THREADS:
                raise _bad(option, f"it must be at most {_MOST_REGISTER_THREADS}")


def _large_segment_bytes(options: Mapping[str, str]) -> int:
    smallest = _SMALLEST_LARGE_SEGMENT_MIB + 1
    large = _mib(options, "large_segment_size_mb", at_least=smallest)
    return _DEFAULT_LARGE_SEGMENT_BYTES if large is None else large


def _mib(options: Mapping[str, str], name: str, *, at_least: int) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    value = _whole(text, f"{name}:{text}")
    if value < at_least:
        raise _bad(f"{name}:{text}", f"it must be at least {at_least}")
    return value * MIB


def _fraction(options: Mapping[str, str], name: str, default: float) -> float:
    text = options.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise _bad(f"{name}:{text}", "it must be a number") from None
    if not (0.0 < value < 1.0 or (value == 1.0 and default == 1.0)):
        at_most = " or be 1" if default == 1.0 else ""
        raise _bad(f"{name}:{text}", f"it must lie between 0 and 1{at_most}")
    return value


def _switch(options: Mapping[str, str], name: str) -> bool:
    text = options.get(name, "False")
    if text not in ("True", "False"):
        raise _bad(f"{name}:{text}", "it must be True or False")
    return text == "True"


def _divisions(text: str) -> tuple[int, ...]:
    """Read ``4`` (everywhere) or ``[256:1,512:2,>:8]`` (from 256 MiB on, from 512 MiB on, above).

    What stands first also holds for every interval below it; an interval that is not named keeps 0,
    and a list of nothing changes nothing.
    """
    if not text:
        return ()
    option = f"roundup_power2_divisions:{text}"
    if not text.startswith("["):
        return (_power_of_two(text, option),) * ROUNDUP_INTERVALS
    values = [0] * ROUNDUP_INTERVALS
    last: int | None = None
    listed = text[1:-1].removesuffix(",")
    for pair in listed.split(",") if listed else ():
        start, colon, division_text = pair.partition(":")
        division = 0 if division_text == "0" else _power_of_two(division_text, option)
        if start == ">" and colon:
            above = 1 if last is None else last + 1
            values[above:] = [division] * (ROUNDUP_INTERVALS - above)
            continue
        index = _interval(_power_of_two(start, option))
        if last is None:
            values[:index] = [division] * index
        values[index] = division
        last = index
    return tuple(values) if any(values) else ()


def _interval(start_mib: int) -> int:
    return min(max(start_mib.bit_length() - 1, 0), ROUNDUP_INTERVALS - 1)


def _power_of_two(text: str, option: str) -> int:
    value = _whole(text, option)
    if value < 1 or value & (value - 1):
        raise _bad(option, f"{text} is not a power of two")
    return value


def _whole(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise _bad(option, f"{text!r} is not a whole number")
    return int(text)


def _bad(option: str, why: str) -> MembenchError:
    return MembenchError(f"PYTORCH_ALLOC_CONF: cannot use {option!r}: {why}")
