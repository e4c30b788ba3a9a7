"""The trace of a long loop from those of short ones, where it can be shown to repeat itself.

A recurrent network runs the same step for every slice. So its trace is found from three short
runs, of n, n + k and n + 2k steps, k steps being a period (1, or as many as lie between two
checkpoints): the first two say what a period adds, in forward, in backward and wherever a list of
the steps' results is made or released; that must then give the third one, event by event, bytes,
sites, categories and FLOPs included. If it does not, longer runs are tried, and at last the whole
loop is run.

What is assumed is induction: what holds from the first run to the third holds for more periods.
Tests compare it with whole traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.flops import Flops
from bench.predict.folding_periods import Insertion, insertions, lengthen
from bench.predict.folding_tokens import Tokens, TokenTable
from bench.predict.step_trace import Trace

__all__ = ["NOT_FOLDED", "Folded", "fold_trace", "run_lengths"]

NOT_FOLDED = "trace not folded: short runs of the repeated steps did not tell the whole one"

# The shortest run: the first steps and the last one are unlike the others. Gradients are taken over
# by the first step of a backward and added to by the second, and its last step has no state before.
_LEAST_PERIODS = 2
_LEAST_STEPS = 5
# Before giving up: as many runs, and in all of them this share of the steps.
_MOST_RUNS = 6
_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Folded:
    """A trace of ``steps`` steps, of which runs of ``ran`` steps told."""

    trace: Trace
    steps: int
    period: int
    ran: tuple[int, ...]

    @property
    def note(self) -> str:
        """What a record says of it."""
        *some, last = map(str, self.ran)
        return (
            f"trace folded: of {self.steps} repeated steps, runs of {', '.join(some)} and {last} "
            f"were traced and every further {_steps(self.period)} found to add the same"
        )


def run_lengths(steps: int, period: int) -> list[int]:
    """Return the numbers of steps to run, shortest first: a period apart, as ``steps`` itself is.

    None where running the whole loop would be about as quick.
    """
    lengths: list[int] = []
    length = steps % period + max(_LEAST_PERIODS, -(-_LEAST_STEPS // period)) * period
    while len(lengths) < _MOST_RUNS and sum(lengths) + length <= steps * _SHARE:
        lengths.append(length)
        length += period
    return lengths if len(lengths) >= 3 else []


def fold_trace(trace_of: Callable[[int], Trace], steps: int, period: int) -> Folded | None:
    """Return the trace of ``steps`` steps from shorter ones, None if it cannot be told from them.

    ``trace_of(n)`` runs n steps. ``period``: after how many steps the loop repeats itself.
    """
    table = TokenTable()
    runs: list[tuple[Trace, Tokens]] = []
    lengths = run_lengths(steps, period)
    for count, length in enumerate(lengths, start=1):
        trace = trace_of(length)
        runs.append((trace, table.encode(trace)))
        if count < 3:
            continue
        (short, a), (long, b), (judge, _) = runs[-3:]
        found = insertions(a, b)
        if found is None:
            continue
        more = (steps - lengths[count - 3]) // period
        if _lengthened(table, (short, a), (long, b), found, 2) == judge:
            whole = _lengthened(table, (short, a), (long, b), found, more)
            return None if whole is None else Folded(whole, steps, period, tuple(lengths[:count]))
    return None


def _lengthened(
    table: TokenTable,
    short: tuple[Trace, Tokens],
    long: tuple[Trace, Tokens],
    found: list[Insertion],
    periods: int,
) -> Trace | None:
    """Return the trace with ``periods`` periods more than ``short``; None if there can be none."""
    try:
        trace = table.decode(lengthen(short[1], long[1], found, periods))
    except LookupError:
        return None
    flops = (
        few + periods * (more - few)
        for few, more in zip(short[0].flops, long[0].flops, strict=True)
    )
    return replace(trace, flops=Flops(*flops), notes=short[0].notes)


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
