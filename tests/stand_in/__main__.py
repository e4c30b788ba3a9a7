"""``python -m tests.stand_in [--python PY] [--card NAME] -- ARGS``: an interpreter on the stand-in.

Runs ``PY ARGS`` with the stand-in GPU preloaded, and ends with its exit code. For example
``python -m tests.stand_in --python .venv-cuda/bin/python -- -m bench doctor``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.errors import MembenchError
from tests.stand_in.build import build
from tests.stand_in.pose import DEFAULT_CARD, environment

__all__ = ["add_options", "main", "run_on_stand_in"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; 2 where it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tests.stand_in", description=__doc__)
    add_options(parser)
    parser.add_argument("command", nargs="+", metavar="ARGS", help="for the interpreter, after --")
    chosen = parser.parse_args(arguments)
    try:
        return run_on_stand_in(chosen.python, chosen.card, chosen.command)
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--python`` and ``--card``."""
    python = os.environ.get("MEMBENCH_CUDA_PYTHON", sys.executable)
    parser.add_argument(
        "--python",
        default=python,
        help="interpreter with a torch built for CUDA 13 (default: $MEMBENCH_CUDA_PYTHON, else "
        "this one)",
    )
    parser.add_argument(
        "--card",
        default=DEFAULT_CARD,
        help="card whose memory, capability and multiprocessors it has (default: %(default)s)",
    )


def run_on_stand_in(python: str, card: str, arguments: Sequence[str]) -> int:
    """Run ``python`` with these arguments on the stand-in; return its exit code.

    All processes that it starts share the device. STANDIN_STATE, where it is set, names a folder
    through which others share it too. Raises MembenchError where it cannot be built.
    """
    libraries = build(python)
    with tempfile.TemporaryDirectory(prefix="stand-in-") as own:
        state = Path(os.environ.get("STANDIN_STATE", own)).resolve()
        state.mkdir(parents=True, exist_ok=True)
        variables = environment(libraries, state, card)
        code = subprocess.run([python, *arguments], env=variables, check=False).returncode
        return code if code >= 0 else 128 - code  # ended by a signal, as a shell says it


if __name__ == "__main__":
    sys.exit(main())
