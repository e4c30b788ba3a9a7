"""The pre-commit hook: ``python -m bench.pre_commit SUITE --baseline FILE [--tolerance 1%] ...``.

Predicts the suite anew, into a folder that is gone afterwards, and holds it against the baseline.
Its exit code is that of ``membench check``: 0, 1 on a regression, 2 on misuse.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence

__all__ = ["main"]

_RAN = (0, 1)  # 1: a case failed, which the check names


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict, check, and return the exit code."""
    asked = _parser().parse_args(arguments)
    chosen = [("--card", asked.card), ("--case", asked.case)]
    options = [part for name, value in chosen if value for part in (name, value)]
    with tempfile.TemporaryDirectory(prefix="membench-") as results:
        run = ["run", asked.suite, "--device", "predict", "--results", results, *options]
        code = _membench(run, quiet=True)
        if code not in _RAN:
            return code
        held = ["--baseline", asked.baseline, "--tolerance", asked.tolerance]
        case = ["--case", asked.case] if asked.case else []
        return _membench(["check", results, *held, *case])


def _membench(arguments: list[str], *, quiet: bool = False) -> int:
    out = subprocess.DEVNULL if quiet else None  # errors go to stderr
    return subprocess.run([sys.executable, "-m", "bench", *arguments], stdout=out).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="membench-check", description=__doc__)
    parser.add_argument("suite", help="a suite file, or the name of a shipped suite")
    parser.add_argument("--baseline", required=True, help="what membench baseline wrote")
    parser.add_argument("--tolerance", default="1%", help="how much a peak may grow")
    parser.add_argument("--card", default="", help="predict for this card, not the suite's")
    parser.add_argument("--case", default="", help="only the cases that match this glob")
    return parser


if __name__ == "__main__":
    sys.exit(main())
