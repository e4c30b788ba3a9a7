"""All that needs a GPU, in one go: ``python -m bench.gpu_session``.

Runs the tests marked ``gpu``, measures the card (``membench calibrate``), runs every shipped suite
on the GPU, and the best proposals of ``results/plans`` capped to the cards that they were made for,
records memory traces, times the kernels, predicts the same suites for that card with the tracer
``cuda`` and with the shim, and publishes the error. A part that fails does not stop the others. It
runs from a bare source tree: no git (``MEMBENCH_COMMIT`` names the commit), no installation, no
nox. Results, logs and a summary end up in one archive, rewritten after each part.

Every part is a piece of less than ten minutes: at ``--part-limit`` it is ended, and run again it
goes on where it stopped, with the cases it has no record of. A case that took most of two pieces
and did not end is recorded as ``timeout`` and not tried a third time. ``--dry-run`` lists the
parts, ``--only NAME`` runs one of them. Ctrl-C, SIGTERM and SIGHUP end the part and write the
archive.

Put the archive of an earlier piece where ``--archive`` says, and the next one goes on from it, on
another machine with the same card too: logs, outcomes and records come out of it. It must not lie
within the results.

Exit code 0: all passed; 1: a part failed; 2: there is no GPU, the arguments are wrong, or the
archive cannot be read or written; 128 + n: ended by signal n.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.calibrate.wanted import NEVER_CALIBRATED
from bench.errors import MembenchError, nearest
from bench.gpu import gpu_identity
from bench.gpu_session_archive import check_place, pack, shim_results, unpack
from bench.gpu_session_part import ROOT, Outcome, Part, Stop, run_part, say, stop_on_signals

__all__ = ["Outcome", "Part", "main", "pack", "plan", "run_part"]

KINDS = ("tests", "calibrate", "measure", "plans", "traces", "bench", "predict", "fidelity")
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


def plan(
    results: Path,
    card: str,
    kinds: Sequence[str] = KINDS,
    root: Path = ROOT,
    suites: Sequence[str] | None = None,
) -> list[Part]:
    """Return the commands of a session in order, see the module.

    ``suites`` are run in the order given, and what they call is calibrated; None is all that are
    shipped. Raises MembenchError for a suite that is not.
    """
    shipped = sorted(path.stem for path in (root / "suites").glob("*.yaml"))
    plans = sorted((root / "results/plans").glob("*.yaml"))
    seen = [suite for suite in suites or () if suite not in NEVER_CALIBRATED]
    suites = shipped if suites is None else suites
    for suite in suites:
        if suite not in shipped:
            raise MembenchError(f"no suite is called {suite!r}{nearest(suite, shipped)}")
    made = {
        "tests": lambda: [_python("tests", "pytest", *_PYTEST_OPTIONS, "tests")],
        "calibrate": lambda: [_calibrate(results, seen)],
        "measure": lambda: [_measure(suite, results) for suite in suites],
        "plans": lambda: [_plan(path, results) for path in plans],
        "traces": lambda: [_traces(suite, results) for suite in suites],
        "bench": lambda: [_python("bench", "pytest", *_BENCHMARK_OPTIONS)],
        "predict": lambda: [part for suite in suites for part in _predict(suite, results, card)],
        "fidelity": lambda: [_fidelity(results, card)],
    }
    return [part for kind in KINDS if kind in kinds for part in made[kind]()]


def _python(name: str, module: str, *arguments: str, **environment: str) -> Part:
    variables = tuple(sorted(environment.items()))
    return Part(name, (sys.executable, "-m", module, *arguments), variables)


def _membench(name: str, *arguments: str, **environment: str) -> Part:
    """Return a command that keeps to a time limit."""
    return replace(_python(name, "bench", *arguments, **environment), keeps_limit=True)


def _calibrate(results: Path, suites: Sequence[str]) -> Part:
    """Calibrate for these suites, for all that may be seen where none is named."""
    chosen = [argument for suite in suites for argument in ("--suite", suite)]
    return _membench("calibrate", "calibrate", "-o", str(results / "cards"), *chosen)


def _measure(suite: str, results: Path) -> Part:
    options = ("--device", "cuda", "--results", str(results), "--resume")
    return _membench(f"measure-{suite}", "run", suite, *options)


def _plan(suite: Path, results: Path) -> Part:
    """Run the best proposals of a plan, capped to the card that they were made for."""
    options = ("--device", "cuda", "--card", suite.stem, "--results", str(results), "--resume")
    return _membench(f"plans-{suite.stem}", "run", str(suite), *options)


def _traces(suite: str, results: Path) -> Part:
    options = ("--suites", suite, "--results", str(results))
    return replace(_python(f"traces-{suite}", "bench.trace_session", *options), keeps_limit=True)


def _predict(suite: str, results: Path, card: str) -> list[Part]:
    """Predict with the GPU's own torch on its own device, and as a machine without a GPU would."""
    options = ("run", suite, "--device", "predict", "--card", card, "--resume")
    cards = str(results / "cards")
    shim = str(shim_results(results))
    return [
        _membench(f"predict-{suite}", *options, "--results", str(results), MEMBENCH_CARDS=cards),
        _membench(
            f"predict-shim-{suite}",
            *(*options, "--results", shim),
            MEMBENCH_CARDS=cards,
            MEMBENCH_TRACER="cuda-shim",
        ),
    ]


def _fidelity(results: Path, card: str) -> Part:
    """Compare with predictions made anew, kept beside the results for the next piece."""
    options = (
        "--output",
        str(results / "reports"),
        "--keep",
        str(shim_results(results) / "fidelity"),
    )
    cards = str(results / "cards")
    return _membench("fidelity", "fidelity", str(results / card), *options, MEMBENCH_CARDS=cards)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the session; return its exit code."""
    options = _parse(arguments)
    results, archive = options.results.resolve(), options.archive.resolve()
    try:
        check_place(archive, results)
        plan(results, _CARD_UNKNOWN, options.parts, suites=options.suites)  # before a GPU is asked
        card = _CARD_UNKNOWN if options.dry_run else gpu_identity().card
        parts = _chosen(plan(results, card, options.parts, suites=options.suites), options.only)
        if options.dry_run:
            for part in parts:
                print(f"{part.name}: {_shown(part.within(options.part_limit))}")
            return 0
        limits = _Limits(options.time_limit, options.part_limit)
        with stop_on_signals() as stop:
            outcomes = _run_all(parts, card, results, archive, limits, stop)
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _concluded(card, outcomes, len(parts), archive, stop)


def _chosen(parts: list[Part], only: Sequence[str] | None) -> list[Part]:
    """Return the parts that ``--only`` names, all without it."""
    names = [part.name for part in parts]
    for name in sorted(set(only or ()) - set(names)):
        raise MembenchError(f"no part is called {name!r}{nearest(name, names)}")
    return [part for part in parts if only is None or part.name in only]


def _concluded(card: str, outcomes: list[Outcome], planned: int, archive: Path, stop: Stop) -> int:
    """Say how the parts ended; return the exit code."""
    failed = [outcome for outcome in outcomes if outcome.exit_code != 0]
    say(f"\n{card}: {len(outcomes) - len(failed)} of {planned} parts passed")
    for outcome in outcomes:
        say(f"  {outcome.name}: {outcome.reason or 'ok'}, {outcome.seconds} s")
    say(f"results, logs and summary: {archive}")
    if stop.signal is not None:
        say(f"interrupted by {signal.Signals(stop.signal).name}; the same command goes on")
        return 128 + stop.signal
    return 1 if failed or len(outcomes) < planned else 0


@dataclass(frozen=True, slots=True)
class _Limits:
    session_s: float | None
    part_s: float


def _run_all(
    parts: list[Part], card: str, results: Path, archive: Path, limits: _Limits, stop: Stop
) -> list[Outcome]:
    deadline = None if limits.session_s is None else time.monotonic() + limits.session_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        known = unpack(archive, results, logs, card)
        for part in parts:
            left_s = limits.part_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0 or stop.signal is not None:
                break
            limit_s = min(left_s, limits.part_s)
            part = part.within(limit_s)
            say(f"\n== {part.name}: {_shown(part)}")
            outcomes.append(run_part(part, logs / f"{part.name}.log", limit_s, stop))
            known |= {outcome.name: asdict(outcome) for outcome in outcomes}
            summary: dict[str, object] = {
                "card": card,
                "commit": os.environ.get("MEMBENCH_COMMIT"),
                "planned": [p.name for p in parts],
                "outcomes": list(known.values()),
            }
            pack(archive, results, logs, summary)
    return outcomes


def _shown(part: Part) -> str:
    return " ".join(
        [*(f"{n}={shlex.quote(v)}" for n, v in part.environment), shlex.join(part.command)]
    )


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
