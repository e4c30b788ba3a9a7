"""Every operator's allocations, predicted, held against torch's own CUDA host code.

``python -m tests.stand_in.census [--python PY] [--card NAME] [--only TEXT]`` runs the programs of
``tests.stand_in.operator_networks`` on the stand-in GPU with ``PY`` and on fake tensors here, and
prints those whose allocations of 64 KiB and more, or whose peaks, differ. Exit code 0: none does;
1: some do; 2: it cannot be done, and why. Programs that torch refuses on either side are named too.
The two should have one version of torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import MembenchError
from tests.stand_in.__main__ import add_options, run_on_stand_in
from tests.stand_in.census_record import read_lines

__all__ = ["difference", "main"]

_SHOWN_BYTES = 64 * 1024
_RECORD = ("-W", "ignore", "-m", "tests.stand_in.census_record")
_STARTS = 20  # a program may end the process; the next start goes on after it


def main(arguments: Sequence[str] | None = None) -> int:
    """Record both sides, print the differences."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stand_in.census", description=(__doc__ or "").partition("\n")[0]
    )
    add_options(parser)
    parser.add_argument("--only", default="", help="programs with this text in their name")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="census-") as folder:
        try:
            theirs, ours = _record(chosen, Path(folder))
        except MembenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if not theirs:
        print(f"error: no program has {chosen.only!r} in its name", file=sys.stderr)
        return 2
    found = {name: difference(ours[name], theirs[name]) for name in theirs if name in ours}
    differing = {name: said for name, said in found.items() if said}
    for name, said in differing.items():
        print(f"{name}: {said}")
    print(f"{len(found)} programs, {len(differing)} differ")
    return 1 if differing or found.keys() != theirs.keys() else 0


def _record(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs, ours = folder / "torch.jsonl", folder / "predicted.jsonl"
    only = ("--only", chosen.only)
    command = [*_RECORD, "torch", str(theirs), *only]
    for _ in range(_STARTS):
        if run_on_stand_in(chosen.python, chosen.card, command) == 0:
            break
    else:
        raise MembenchError(f"{chosen.python} ended {_STARTS} times before it was through")
    code = subprocess.run(
        [sys.executable, *_RECORD, "predicted", str(ours), *only], check=False
    ).returncode
    if code:
        raise MembenchError(f"recording what is predicted ended with {code}")
    return read_lines(theirs), read_lines(ours)


def difference(ours: Any, theirs: Any) -> str:
    """Say how two recordings of a program differ; empty where they do not."""
    if isinstance(ours, str) or isinstance(theirs, str):
        if isinstance(ours, str) and isinstance(theirs, str):
            return ""
        side, said = ("predicted", ours) if isinstance(ours, str) else ("torch", theirs)
        return f"{side}: {said}"
    peaks = _peak(ours) - _peak(theirs)
    if abs(peaks) >= _SHOWN_BYTES:
        return f"peak {peaks:+d} bytes"
    mine, its = ([size for size, _ in one if abs(size) >= _SHOWN_BYTES] for one in (ours, theirs))
    if mine == its:
        return ""
    return "order" if sorted(mine) == sorted(its) else "allocations"


def _peak(events: Sequence[tuple[int, str]]) -> int:
    live = top = 0
    for size, _ in events:
        live += size
        top = max(top, live)
    return top


if __name__ == "__main__":
    sys.exit(main())
