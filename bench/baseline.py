"""A baseline: the figures that a change is held against, as a file that a pull request can show.

JSON, sorted, one holder of bytes a line, without dates or commits: two baselines of the same
figures are the same file. Cases stand under what they were made with, which ``membench check``
requires to be alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from bench.errors import MembenchError
from bench.figures import Figures, Origin, read_results_figures
from bench.record import Holder, Status

__all__ = ["BASELINE_VERSION", "baseline_text", "read_baseline", "write_baseline"]

BASELINE_VERSION = 1
_MARK = "membench_baseline"
_FIGURES = (
    *("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "needs_bytes", "time_s"),
)
_HOLDER = tuple(f.name for f in dataclasses.fields(Holder))


def read_baseline(path: Path) -> list[Figures]:
    """Return the figures of a baseline file, or of a folder of them.

    A results file, or a folder with results below it, is taken too: their last records.

    Errors: MembenchError naming the file, for one that is neither, or of a later version.
    """
    if path.is_dir() and not any(path.rglob("*.jsonl")):
        files = sorted(path.glob("*.json"))
        if files:
            return [one for file in files for one in _read_file(file)]
    return _read_file(path) if path.is_file() else read_results_figures([path])


def write_baseline(path: Path, figures: Sequence[Figures], *, allow_fewer: bool = False) -> None:
    """Write ``figures`` to ``path``, whole or not at all.

    Errors: MembenchError when a case failed or timed out, since it has no figures; when ``path``
    is something else than a baseline; when it has cases that ``figures`` lack, unless
    ``allow_fewer``; when it cannot be written.
    """
    broken = [one for one in figures if one.status not in ("ok", "oom")]
    if broken:
        first = broken[0]
        raise MembenchError(
            f"{_cases(broken)} without figures, so no baseline: {first.case} {first.status}: "
            f"{first.reason}; mend and run again, or leave it out with --case"
        )
    if not figures:
        raise MembenchError("no cases, so no baseline: give results that membench run wrote")
    if path.exists():
        _check_old(path, figures, allow_fewer)
    text = baseline_text(figures)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise MembenchError(
            f"cannot write the baseline {path}: {error.strerror or error}; "
            "choose another place with -o"
        ) from None


def baseline_text(figures: Iterable[Figures]) -> str:
    """Return the file's text: the same for the same figures, in whatever order they come."""
    by_origin: dict[Origin, dict[str, Any]] = {}
    for one in sorted(figures, key=lambda one: (one.origin, one.case)):
        by_origin.setdefault(one.origin, {})[one.case] = _case_data(one)
    origins = [
        {name: value for name, value in dataclasses.asdict(origin).items() if value != ""}
        | {"cases": cases}
        for origin, cases in by_origin.items()
    ]
    return _pretty({_MARK: BASELINE_VERSION, "made_with": origins}) + "\n"


def _case_data(one: Figures) -> dict[str, Any]:
    figures = {name: getattr(one, name) for name in _FIGURES}
    holders = sorted(one.holders, key=lambda h: tuple(getattr(h, name) for name in _HOLDER))
    return {
        "status": one.status,
        **({"reason": one.reason} if one.reason else {}),
        "definition_hash": one.definition_hash,
        **{name: value for name, value in figures.items() if value is not None},
        "peak_holders": [dataclasses.asdict(holder) for holder in holders],
    }


def _pretty(value: Any, indent: str = "") -> str:
    """Return JSON, indented, but for what holds nothing nested: that is one line."""
    if not value or not isinstance(value, (dict, list)) or _is_holder(value):
        return json.dumps(value)
    deeper = indent + "  "
    if isinstance(value, list):
        parts = [_pretty(part, deeper) for part in value]
        return "[\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}]"
    pairs = [f"{json.dumps(name)}: {_pretty(part, deeper)}" for name, part in value.items()]
    return "{\n" + ",\n".join(deeper + pair for pair in pairs) + f"\n{indent}}}"


def _is_holder(value: Any) -> bool:
    return isinstance(value, dict) and tuple(value) == _HOLDER


def _read_file(path: Path) -> list[Figures]:
    data = _json_object(path)
    if data is None or _MARK not in data:
        if path.suffix == ".json":
            raise MembenchError(f"{path} is not a baseline: make one with membench baseline")
        return read_results_figures([path])
    if data[_MARK] != BASELINE_VERSION:
        raise MembenchError(
            f"{path} is a baseline of version {data[_MARK]!r}, this membench reads "
            f"{BASELINE_VERSION}: write it again with membench baseline"
        )
    try:
        return [one for group in data["made_with"] for one in _group_figures(group)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MembenchError(
            f"{path} is not a whole baseline ({error!r}): write it again with membench baseline"
        ) from None


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MembenchError(f"cannot read the baseline {path}: {error.strerror}") from None
    except ValueError:  # several lines of JSON, or none
        return None
    return data if isinstance(data, dict) else None


def _group_figures(group: dict[str, Any]) -> list[Figures]:
    origin = Origin(**{name: value for name, value in group.items() if name != "cases"})
    return [_one_figures(case, data, origin) for case, data in group["cases"].items()]


def _one_figures(case: str, data: dict[str, Any], origin: Origin) -> Figures:
    figures = {name: data.get(name) for name in _FIGURES}
    for name, value in figures.items():
        whole = type(value) is int or (name == "time_s" and type(value) is float)
        if value is not None and not whole:
            raise ValueError(f"{name} of {case} is {value!r}")
    if data["status"] not in get_args(Status):
        raise ValueError(f"status of {case} is {data['status']!r}")
    return Figures(
        case=case,
        origin=origin,
        status=data["status"],
        reason=data.get("reason", ""),
        definition_hash=data["definition_hash"],
        holders=tuple(Holder(**holder) for holder in data["peak_holders"]),
        **figures,
    )


def _check_old(path: Path, figures: Sequence[Figures], allow_fewer: bool) -> None:
    """Refuse to write over what is no baseline, or over cases that would be lost."""
    data = _json_object(path)
    if data is None or _MARK not in data:
        raise MembenchError(f"{path} is there and is not a baseline: choose another place with -o")
    if allow_fewer:
        return
    kept = {_identity(one) for one in figures}
    lost = [one for one in _read_file(path) if _identity(one) not in kept]
    if lost:
        raise MembenchError(
            f"{path} has {_cases(lost)} that the results lack, as {lost[0].title}: "
            "run them too, or let them go with --allow-fewer"
        )


def _identity(one: Figures) -> tuple[str, ...]:
    origin = one.origin
    return (origin.suite, origin.evidence, origin.card, origin.capped_to, one.case)


def _cases(figures: Sequence[Figures]) -> str:
    return "1 case" if len(figures) == 1 else f"{len(figures)} cases"
