"""Folding made-up traces: what is amiss is found, and where a longer trace grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from bench.flops import Flops
from bench.predict import folding, folding_periods
from bench.predict.folding import fold_trace
from bench.predict.folding_periods import Insertion, insertions, lengthen
from bench.predict.folding_tokens import NO_BYTES, Tokens, TokenTable
from bench.predict.step_trace import Site, Trace

# -- one event, byte, site, category or FLOP amiss, and there is no fold ----------------

SITE = Site("cell", "op", "a.py:1")


def toy(steps: int, extra_bytes: Callable[[int], int] = lambda _: 0) -> Trace:
    """A buffer of all steps; per step one kept map; backward releases them newest first."""
    trace = Trace(events=[("phase", "forward"), ("cublas", 0, SITE)])

    def alloc(size: int) -> int:
        trace.events.append(("alloc", len(trace.sites), size, 0))
        trace.sites.append(SITE)
        trace.categories.append("activation")
        return len(trace.sites) - 1

    buffer = alloc(100 * steps + extra_bytes(steps))
    kept = []
    for _ in range(steps):
        kept.append(alloc(512))
        trace.events.append(("convolution", 2048, "half", SITE))
    trace.events.append(("phase", "backward"))
    for identity in reversed(kept):
        gradient = alloc(256)
        trace.events += [("free", identity), ("free", gradient)]
    trace.events.append(("free", buffer))
    trace.flops = Flops(3 * steps, 0, 9 * steps)
    return trace


def test_a_toy_loop_folds_and_says_from_what() -> None:
    found = fold_trace(toy, 100, 1)
    assert found is not None
    assert found.trace == toy(100)
    assert found.note == (
        "trace folded: of 100 repeated steps, runs of 5, 6 and 7 were traced and every further "
        "step found to add the same"
    )
    pairs = fold_trace(toy, 101, 2)
    assert pairs is not None
    assert pairs.trace == toy(101)
    assert "runs of 7, 9 and 11 were traced and every further 2 steps" in pairs.note


def drop_event(trace: Trace) -> None:
    del trace.events[-2]


def other_bytes(trace: Trace) -> None:
    trace.events[3] = ("alloc", 1, 513, 0)


def other_operands(trace: Trace) -> None:
    trace.events[4] = ("convolution", 2049, "half", SITE)


def other_site(trace: Trace) -> None:
    trace.sites[-1] = dataclasses.replace(SITE, source_line="a.py:2")


def other_category(trace: Trace) -> None:
    trace.categories[1] = "temporary"


def other_order(trace: Trace) -> None:
    trace.events[-3], trace.events[-2] = trace.events[-2], trace.events[-3]


def other_flops(trace: Trace) -> None:
    trace.flops = trace.flops._replace(total=trace.flops.total + 1)


@pytest.mark.parametrize(
    "change",
    [
        drop_event,
        other_bytes,
        other_operands,
        other_site,
        other_category,
        other_order,
        other_flops,
    ],
)
@pytest.mark.parametrize("changed_run", [5, 6, 7])
def test_one_thing_amiss_in_a_run_and_it_is_not_folded_from_it(
    changed_run: int, change: Callable[[Trace], None]
) -> None:
    def trace_of(steps: int) -> Trace:
        trace = toy(steps)
        if steps == changed_run:
            change(trace)
        return trace

    found = fold_trace(trace_of, 100, 1)
    assert found is not None  # from later runs
    assert changed_run not in found.ran[-3:]
    assert found.trace == toy(100)
    assert fold_trace(trace_of, 30, 1) is None  # where 18 steps are all that may be run


@pytest.mark.parametrize(
    "extra", [lambda n: n * n, lambda n: 512 * (n > 6)], ids=["square", "jump"]
)
def test_bytes_that_do_not_grow_in_proportion_are_not_folded(extra: Callable[[int], int]) -> None:
    found = fold_trace(lambda n: toy(n, extra), 30, 1)
    assert found is None


def test_a_period_that_repeats_wrongly_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what folding repeats lacks its last event."""

    def forgetful(*args: Any) -> Tokens:
        longer = lengthen(*args)
        return Tokens(longer.numbers[:-2] + longer.numbers[-1:], [*longer.bytes[:-2], NO_BYTES])

    assert fold_trace(toy, 30, 1) is not None
    monkeypatch.setattr(folding, "lengthen", forgetful)
    assert fold_trace(toy, 30, 1) is None


def test_tokens_that_release_what_is_not_alive_are_no_trace() -> None:
    table = TokenTable()
    encoded = table.encode(toy(2))
    encoded.numbers.append(encoded.numbers[-1])
    encoded.bytes.append(NO_BYTES)
    with pytest.raises(LookupError):
        table.decode(encoded)
    short, long = (table.encode(toy(n)) for n in (2, 3))
    short.numbers[-1:] = [*short.numbers[-1:], encoded.numbers[-1]]
    short.bytes.append(NO_BYTES)
    made = folding._lengthened(table, (toy(2), short), (toy(3), long), [], 1)
    assert made is None


def test_a_release_of_what_was_never_allocated_is_no_trace() -> None:
    table = TokenTable()
    trace = toy(1)
    trace.events.append(("free", 0))
    with pytest.raises(LookupError, match="0 is freed but not alive"):
        table.encode(trace)


# -- where a trace grows --------------------------------------------------------------------------


def tokens(text: str) -> Tokens:
    return Tokens([ord(c) for c in text], [NO_BYTES] * len(text))


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        ("ababx", "abababx", [Insertion(4, 2)]),
        ("abab", "ababab", [Insertion(4, 2)]),
        ("xababyccz", "xabababycccz", [Insertion(5, 2), Insertion(8, 1)]),
        ("aabaabx", "aabaabaabx", [Insertion(6, 3)]),  # not the a's
        ("abc", "abc", []),
        ("abc", "abxc", None),  # not there before
        ("ab", "abab c", None),
        ("abab", "ab", None),
        ("abcabcd", "abcabcabce", None),
    ],
)
def test_what_a_longer_trace_has_more_repeats_what_stands_before_it(
    short: str, long: str, expected: list[Insertion] | None
) -> None:
    found = insertions(tokens(short), tokens(long))
    assert found == expected
    if found is not None:
        assert lengthen(tokens(short), tokens(long), found, 1).numbers == tokens(long).numbers
        assert lengthen(tokens(short), tokens(long), found, 0).numbers == tokens(short).numbers


def test_a_search_that_leads_nowhere_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding_periods, "_MOST_LOOPS", 2)
    assert insertions(tokens("aabbccx"), tokens("aaabbbcccx")) is None


def test_bytes_grow_with_the_periods_and_repeats_have_those_of_what_they_repeat() -> None:
    short, long = Tokens([1, 2, 2, 3], [10, 5, 5, 7]), Tokens([1, 2, 2, 2, 3], [14, 6, 6, 6, 7])
    found = insertions(short, long)
    assert found == [Insertion(3, 1)]
    longer = lengthen(short, long, found, 3)
    assert longer == Tokens([1, 2, 2, 2, 2, 2, 3], [22, 8, 8, 8, 8, 8, 7])
