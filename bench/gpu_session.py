"""All that needs a GPU, in one go: ``python -m bench.gpu_session``.

Runs the tests marked ``gpu``, every shipped suite on the GPU, and the same suites predicted for
that card, so that measured and predicted records lie side by side. A part that fails does not
stop the others. It runs from a bare source tree: no git (``MEMBENCH_COMMIT`` names the commit), no
installation, no nox. Results, logs and a summary end up in one archive, rewritten after each
part, so that a session that is cut off keeps what it has.

Exit code 0: all passed; 1: a part failed; 2: there is no GPU, or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.errors import MembenchError, nearest
from bench.gpu import gpu_identity

__all__ = ["Outcome", "Part", "main", "pack", "plan", "run_part"]

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("tests", "measure", "predict")
_PYTEST_OPTIONS = (
    *("-m", "gpu"),
    # A test file whose imports this machine lacks must not keep the others from running, nor a
    # warning of versions that are not the pinned ones.
    *("--continue-on-collection-errors", "-W", "default"),
)
_CARD_UNKNOWN = "CARD"  # what a dry run prints without a GPU


@dataclass(frozen=True, slots=True)
class Part:
    """One command of the session."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended. ``exit_code`` below 0: ended by that signal."""

    name: str
    exit_code: int
    seconds: float


def plan(
    results: Path,
    card: str,
    kinds: Sequence[str] = KINDS,
    root: Path = ROOT,
    suites: Sequence[str] | None = None,
) -> list[Part]:
    """Return the commands of a session in order: tests, suites on the GPU, suites predicted.

    ``suites`` are run in the order given; None is all that are shipped.
    Raises MembenchError for a suite that is not.
    """
    python = sys.executable
    shipped = sorted(path.stem for path in (root / "suites").glob("*.yaml"))
    suites = shipped if suites is None else suites
    for suite in suites:
        if suite not in shipped:
            raise MembenchError(f"no suite is called {suite!r}{nearest(suite, shipped)}")
    parts: list[Part] = []
    if "tests" in kinds:
        parts.append(Part("tests", (python, "-m", "pytest", *_PYTEST_OPTIONS, "tests")))
    for kind, options in (
        ("measure", ("--device", "cuda")),
        ("predict", ("--device", "predict", "--card", card)),
    ):
        if kind in kinds:
            parts += [
                Part(
                    f"{kind}-{suite}",
                    (python, "-m", "bench", "run", suite, *options, "--results", str(results)),
                )
                for suite in suites
            ]
    return parts


def run_part(part: Part, log: Path, limit_s: float | None = None, root: Path = ROOT) -> Outcome:
    """Run one command in ``root``, its output both here and in ``log``; end it at its limit."""
    began = time.monotonic()
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    process = subprocess.Popen(
        part.command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timer = threading.Timer(limit_s or 0.0, _end, (process,))
    if limit_s is not None:
        timer.start()
    try:
        assert process.stdout is not None
        with process.stdout, log.open("w") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        code = process.wait()
    finally:
        timer.cancel()
        _end(process)
    return Outcome(part.name, code, round(time.monotonic() - began, 1))


def _end(process: subprocess.Popen[str]) -> None:
    """End a part and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(archive: Path, results: Path, logs: Path, summary: dict[str, object]) -> None:
    """Write results, logs and the summary into one tar.gz, in place of an earlier one."""
    (logs / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(archive.name + ".part")
    with tarfile.open(unfinished, "w:gz") as tar:
        tar.add(logs, "logs")
        if results.is_dir():
            tar.add(results, "results")
    unfinished.replace(archive)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the session; return its exit code."""
    options = _parse(arguments)
    results, archive = options.results.resolve(), options.archive.resolve()
    try:
        plan(results, _CARD_UNKNOWN, options.parts, suites=options.suites)  # before a GPU is asked
        card = _CARD_UNKNOWN if options.dry_run else gpu_identity().card
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = plan(results, card, options.parts, suites=options.suites)
    if options.dry_run:
        for part in parts:
            print(f"{part.name}: {shlex.join(part.command)}")
        return 0
    outcomes = _run_all(parts, card, results, archive, options.time_limit)
    failed = [outcome for outcome in outcomes if outcome.exit_code != 0]
    print(f"\n{card}: {len(outcomes) - len(failed)} of {len(parts)} parts passed")
    for outcome in outcomes:
        print(f"  {outcome.name}: exit code {outcome.exit_code}, {outcome.seconds} s")
    print(f"results, logs and summary: {archive}")
    return 1 if failed or len(outcomes) < len(parts) else 0


def _run_all(
    parts: list[Part], card: str, results: Path, archive: Path, limit_s: float | None
) -> list[Outcome]:
    deadline = None if limit_s is None else time.monotonic() + limit_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            print(f"\n== {part.name}: {shlex.join(part.command)}", flush=True)
            outcomes.append(run_part(part, Path(folder) / f"{part.name}.log", left_s))
            summary: dict[str, object] = {
                "card": card,
                "commit": os.environ.get("MEMBENCH_COMMIT"),
                "planned": [p.name for p in parts],
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
            pack(archive, results, Path(folder), summary)
    return outcomes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_session",
        description="Run the GPU's tests, every suite on the GPU, and the same suites predicted.",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="for the records")
    parser.add_argument(
        "--archive", type=Path, default=ROOT / "dist" / "gpu-session.tar.gz", help="tar.gz to write"
    )
    parser.add_argument("--parts", nargs="+", choices=KINDS, default=KINDS, help="run only these")
    parser.add_argument("--suites", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="end the session after this long"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
