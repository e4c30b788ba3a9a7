"""The archive of a GPU session: results, logs and outcomes, written and gone on from.

On a machine that has nothing but the archive, the next piece finds in it the records of the pieces
before. What is there already is kept: of a file of records both have their lines afterwards, and
any other file stays as it is.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from bench.errors import MembenchError

__all__ = ["check_place", "pack", "shim_results", "unpack"]

_SUMMARY = "logs/summary.json"


def shim_results(results: Path) -> Path:
    """Return the folder for the shim's records: a report takes every record within its folder."""
    return results.with_name(f"{results.name}.shim")


def check_place(archive: Path, results: Path) -> None:
    """Raise MembenchError for an archive within the results, which would have to hold itself."""
    for folder in (results, shim_results(results)):
        if archive.is_relative_to(folder):
            raise MembenchError(
                f"the archive {archive} lies within the results {folder}, which it is to hold: "
                "choose another place with --archive"
            )


def pack(archive: Path, results: Path, logs: Path, summary: dict[str, object]) -> None:
    """Write results, logs and the summary into one tar.gz, in place of an earlier one.

    Raises MembenchError when it cannot be written; an earlier one is then kept.
    """
    unfinished = archive.with_name(archive.name + ".part")
    try:
        (logs / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(unfinished, "w:gz") as tar:
            tar.add(logs, "logs")
            for folder, name in _folders(results):
                if folder.is_dir():
                    tar.add(folder, name)
        unfinished.replace(archive)
    except OSError as error:
        raise MembenchError(
            f"cannot write the archive {archive}: {error.strerror or error}; "
            f"the records are in {results}"
        ) from None


def _folders(results: Path) -> tuple[tuple[Path, str], ...]:
    return ((results, "results"), (shim_results(results), "results.shim"))


def unpack(archive: Path, results: Path, logs: Path, card: str) -> dict[str, dict[str, Any]]:
    """Put back what earlier pieces on the same card left; return their outcomes by part.

    Raises MembenchError for a file that is no archive of a session, or was cut off.
    """
    if not archive.is_file():
        return {}
    try:
        with tarfile.open(archive) as tar:
            found = tar.extractfile(_SUMMARY)
            summary = json.load(found) if found is not None else {}
            if summary.get("card") != card:
                return {}
            for member in tar.getmembers():
                place = _place(PurePosixPath(member.name), results, logs)
                content = tar.extractfile(member) if place is not None else None
                if place is not None and content is not None:
                    _put_back(place, content.read())
            return {outcome["name"]: outcome for outcome in summary["outcomes"]}
    except (
        *(OSError, EOFError, tarfile.TarError, zlib.error),
        *(KeyError, ValueError, TypeError, AttributeError),
    ) as error:
        raise MembenchError(f"{archive} is no archive of a session: {error}; remove it") from None


def _place(name: PurePosixPath, results: Path, logs: Path) -> Path | None:
    """Return where a member belongs; None for one that is nothing of a session's."""
    if name.parent == PurePosixPath("logs") and name.suffix == ".log":
        return logs / name.name
    for folder, top in _folders(results):
        if name.parts[:1] == (top,) and ".." not in name.parts:
            return folder.joinpath(*name.parts[1:])
    return None


def _put_back(path: Path, archived: bytes) -> None:
    """Write a file that is missing, or the archive's lines before those of a file of records."""
    content = archived
    if path.exists():
        if path.suffix != ".jsonl":
            return
        here = path.read_bytes()
        content = _joined(archived, here)
        if content == here:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _joined(archived: bytes, here: bytes) -> bytes:
    """Return the lines of both; those here come last, as of a case the last record counts."""
    ours, theirs = here.split(b"\n"), archived.split(b"\n")
    if set(theirs) <= {*ours, b""}:
        return here
    known = set(theirs)
    return b"\n".join([*filter(None, theirs), *(n for n in ours if n and n not in known), b""])
