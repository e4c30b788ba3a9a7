"""All that needs a GPU, in one go: ``python -m bench.gpu_session``.

Runs the tests marked ``gpu``, measures the card (``membench calibrate``), runs every shipped suite
on the GPU, records memory traces, times the kernels, predicts the same suites for that card with
the tracer ``cuda`` and with the shim, and publishes the error. A part that fails does not stop the
others. It runs from a bare source tree: no git (``MEMBENCH_COMMIT`` names the commit), no
installation, no nox. Results, logs and a summary end up in one archive, rewritten after each part.

Every part is a piece of less than ten minutes: at ``--part-limit`` it is ended, and run again it
goes on where it stopped. ``--dry-run`` lists them, ``--only NAME`` runs one of them. Logs and
outcomes of earlier pieces stay in the archive.

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
KINDS = ("tests", "calibrate", "measure", "traces", "bench", "predict", "fidelity")
_PYTEST_OPTIONS = (
    *("-m", "gpu"),
    # A test file whose imports this machine lacks must not keep the others from running, nor a
    # warning of versions that are not the pinned ones.
    *("--continue-on-collection-errors", "-W", "default"),
)
_BENCHMARK_OPTIONS = (
    *("tests/benchmarks", "--benchmark-enable", "--benchmark-disable-gc", "--benchmark-warmup=off"),
    *("-W", "default"),
)
_PART_LIMIT_S = 590.0
_CARD_UNKNOWN = "CARD"  # what a dry run prints without a GPU


@dataclass(frozen=True, slots=True)
class Part:
    """One command of the session."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


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
    """Return the commands of a session in order, see the module.

    ``suites`` are run in the order given; None is all that are shipped.
    Raises MembenchError for a suite that is not.
    """
    shipped = sorted(path.stem for path in (root / "suites").glob("*.yaml"))
    suites = shipped if suites is None else suites
    for suite in suites:
        if suite not in shipped:
            raise MembenchError(f"no suite is called {suite!r}{nearest(suite, shipped)}")
    made = {
        "tests": lambda: [_python("tests", "pytest", *_PYTEST_OPTIONS, "tests")],
        "calibrate": lambda: [_calibrate(results)],
        "measure": lambda: [_measure(suite, results) for suite in suites],
        "traces": lambda: [_traces(suite, results) for suite in suites],
        "bench": lambda: [_python("bench", "pytest", *_BENCHMARK_OPTIONS)],
        "predict": lambda: [part for suite in suites for part in _predict(suite, results, card)],
        "fidelity": lambda: [_fidelity(results, card)],
    }
    return [part for kind in KINDS if kind in kinds for part in made[kind]()]


def _python(name: str, module: str, *arguments: str, **environment: str) -> Part:
    variables = tuple(sorted(environment.items()))
    return Part(name, (sys.executable, "-m", module, *arguments), variables)


def _calibrate(results: Path) -> Part:
    limit = str(int(_PART_LIMIT_S * 0.9))
    cards = str(results / "cards")
    return _python("calibrate", "bench", "calibrate", "-o", cards, "--time-limit", limit)


def _measure(suite: str, results: Path) -> Part:
    options = ("--device", "cuda", "--results", str(results), "--resume")
    return _python(f"measure-{suite}", "bench", "run", suite, *options)


def _traces(suite: str, results: Path) -> Part:
    options = ("--suites", suite, "--results", str(results))
    return _python(f"traces-{suite}", "bench.trace_session", *options)


def _predict(suite: str, results: Path, card: str) -> list[Part]:
    """Predict with the GPU's own torch on its own device, and as a machine without a GPU would."""
    options = ("bench", "run", suite, "--device", "predict", "--card", card, "--resume")
    cards = str(results / "cards")
    shim = str(_shim_results(results))
    return [
        _python(f"predict-{suite}", *options, "--results", str(results), MEMBENCH_CARDS=cards),
        _python(
            f"predict-shim-{suite}",
            *(*options, "--results", shim),
            MEMBENCH_CARDS=cards,
            MEMBENCH_TRACER="cuda-shim",
        ),
    ]


def _shim_results(results: Path) -> Path:
    """Return the folder for the shim's records: a report takes every record within its folder."""
    return results.with_name(f"{results.name}.shim")


def _fidelity(results: Path, card: str) -> Part:
    options = (str(results / card), "--output", str(results / "reports"))
    cards = str(results / "cards")
    return _python("fidelity", "bench", "fidelity", *options, MEMBENCH_CARDS=cards)


def run_part(part: Part, log: Path, limit_s: float | None = None, root: Path = ROOT) -> Outcome:
    """Run one command in ``root``, its output both here and in ``log``; end it at its limit."""
    began = time.monotonic()
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    process = subprocess.Popen(
        part.command,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            **dict(part.environment),
        },
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
        for folder, name in ((results, "results"), (_shim_results(results), "results.shim")):
            if folder.is_dir():
                tar.add(folder, name)
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
    if options.only:
        unknown = sorted(set(options.only) - {part.name for part in parts})
        if unknown:
            known = nearest(unknown[0], [part.name for part in parts])
            print(f"error: no part is called {unknown[0]!r}{known}", file=sys.stderr)
            return 2
        parts = [part for part in parts if part.name in options.only]
    if options.dry_run:
        for part in parts:
            print(f"{part.name}: {_shown(part)}")
        return 0
    limits = _Limits(options.time_limit, options.part_limit)
    try:
        outcomes = _run_all(parts, card, results, archive, limits)
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [outcome for outcome in outcomes if outcome.exit_code != 0]
    print(f"\n{card}: {len(outcomes) - len(failed)} of {len(parts)} parts passed")
    for outcome in outcomes:
        print(f"  {outcome.name}: exit code {outcome.exit_code}, {outcome.seconds} s")
    print(f"results, logs and summary: {archive}")
    return 1 if failed or len(outcomes) < len(parts) else 0


@dataclass(frozen=True, slots=True)
class _Limits:
    session_s: float | None
    part_s: float


def _run_all(
    parts: list[Part], card: str, results: Path, archive: Path, limits: _Limits
) -> list[Outcome]:
    deadline = None if limits.session_s is None else time.monotonic() + limits.session_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        earlier = _unpack(archive, Path(folder), card)
        for part in parts:
            left_s = limits.part_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                break
            print(f"\n== {part.name}: {_shown(part)}", flush=True)
            limit_s = min(left_s, limits.part_s)
            outcomes.append(run_part(part, Path(folder) / f"{part.name}.log", limit_s))
            earlier |= {outcome.name: asdict(outcome) for outcome in outcomes}
            summary: dict[str, object] = {
                "card": card,
                "commit": os.environ.get("MEMBENCH_COMMIT"),
                "planned": [p.name for p in parts],
                "outcomes": list(earlier.values()),
            }
            pack(archive, results, Path(folder), summary)
    return outcomes


def _shown(part: Part) -> str:
    return " ".join(
        [*(f"{n}={shlex.quote(v)}" for n, v in part.environment), shlex.join(part.command)]
    )


def _unpack(archive: Path, logs: Path, card: str) -> dict[str, dict[str, object]]:
    """Put the logs of earlier pieces on the same card into ``logs``; return their outcomes."""
    if not archive.is_file():
        return {}
    try:
        with tarfile.open(archive) as tar:
            found = tar.extractfile("logs/summary.json")
            summary = json.load(found) if found is not None else {}
            if summary.get("card") != card:
                return {}
            for member in tar.getmembers():
                name = Path(member.name)
                content = tar.extractfile(member)
                if name.parent == Path("logs") and name.suffix == ".log" and content is not None:
                    (logs / name.name).write_bytes(content.read())
            return {outcome["name"]: outcome for outcome in summary["outcomes"]}
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise MembenchError(f"{archive} is no archive of a session: {error}; remove it") from None


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
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts, by name")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="end the session after this long"
    )
    parser.add_argument(
        "--part-limit", type=float, metavar="SECONDS", default=_PART_LIMIT_S, help="of each part"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
