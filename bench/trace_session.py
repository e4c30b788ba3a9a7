"""Memory traces of the important cases, recorded on a GPU: ``python -m bench.trace_session``.

For every suite and each of its networks and precisions the smallest case is run with the
allocator's history on; what it did is kept as a reduced trace, ``<card>/traces/<suite>/*.json.gz``
under the folder of results, against which the simulator is held. A trace that is there is not made
again. With ``--time-limit`` no case has more than half of it, so that none takes all of the time.

Exit code 0: all are there; 1: some could not be made, each named, or there was no time for them; 2:
there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.calibrate.wanted import representatives
from bench.case import Case
from bench.errors import MembenchError
from bench.predict.trace_file import read_trace
from bench.predict.trace_writer import write_reduced_trace
from bench.runner import TimeLimit

__all__ = ["main", "record_traces", "trace_path"]

Measure = Callable[[Case, Path], object]
"""Run a case and write its snapshot to the path."""


def trace_path(results: Path, card: str, suite: str, case: Case) -> Path:
    """Return where a case's trace is kept."""
    return results / card / "traces" / suite / f"{case.name.replace('/', '-')}.json.gz"


def record_traces(
    suites: Sequence[str],
    results: Path,
    card: str,
    measure: Measure,
    limit: TimeLimit | None = None,
) -> tuple[list[Path], list[str]]:
    """Record what is not there yet; return the new files and a line for each that failed."""
    from bench.suite import load_suite

    made: list[Path] = []
    failed: list[str] = []
    for suite in suites:
        for case in representatives(load_suite(suite).cases()):
            path = trace_path(results, card, suite, case)
            if path.exists():
                continue
            try:
                _record(case, suite, card, path, lambda c, p: measure(_within(c, limit), p))
                made.append(path)
                print(f"trace: {path}", flush=True)
            except MembenchError as error:
                failed.append(f"{case.name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
    return made, failed


def _within(case: Case, limit: TimeLimit | None) -> Case:
    if limit is None:
        return case
    if limit.left_s() <= 0:
        raise MembenchError("no time left: run it again")
    limit_s = min(case.time_limit_s, limit.left_s(), limit.seconds / 2)
    return dataclasses.replace(case, time_limit_s=limit_s)


def _record(case: Case, suite: str, card: str, path: Path, measure: Measure) -> None:
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "snapshot.pickle"
        measure(case, snapshot)
        about = {
            "source": {"suite": suite, "case": case.name, "card": card},
            "definition": case.to_definition(),
        }
        write_reduced_trace(path, read_trace(snapshot), about)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the traces on the GPU that is here; return the exit code."""
    from bench.export.measured import measure_snapshot
    from bench.gpu import gpu_identity
    from bench.suite import shipped_suites

    parser = argparse.ArgumentParser(prog="python -m bench.trace_session")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--suites", nargs="+", metavar="NAME", default=sorted(shipped_suites()))
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    options = parser.parse_args(arguments)
    limit = None if options.time_limit is None else TimeLimit.from_now(options.time_limit)
    try:
        card = gpu_identity().card
        _, failed = record_traces(options.suites, options.results, card, measure_snapshot, limit)
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept, the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
