"""Checkpoint placement: what the dynamic programming finds, against every placement there is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.errors import OptionError
from memsave.placement import (
    Block,
    Placement,
    Segment,
    least_peak,
    peak_of,
    place,
    trade_offs,
)

Region = tuple[int, int, bool]  # start, stop, recomputed


def _regions(count: int, start: int = 0, longest: int | None = None) -> Iterator[list[Region]]:
    """Every way to cut the blocks into regions."""
    if start == count:
        yield []
        return
    for stop in range(start + 1, min(count, start + (longest or count)) + 1):
        for recomputed in (False, True) if stop == start + 1 else (True,):
            for rest in _regions(count, stop, longest):
                yield [(start, stop, recomputed), *rest]


def _simulated_peak(blocks: Sequence[Block], regions: list[Region]) -> int:
    """Run the forward and the backward of a training step on names of tensors; the peak in bytes.

    Every holder holds names; what is alive is the union of what is held. Written without a look
    at the formulas of the module.
    """
    size = {("inside", i): block.inside_bytes for i, block in enumerate(blocks)}
    size |= {("result", i): block.result_bytes for i, block in enumerate(blocks)}
    size |= {("gradient", i): block.result_bytes for i, block in enumerate(blocks)}
    reads = [((i - 1,) if i else ()) if b.reads is None else b.reads for i, b in enumerate(blocks)]
    held: dict[object, set[tuple[str, int]]] = {}
    for start, stop, recomputed in regions:
        inputs = {("result", j) for i in range(start, stop) for j in reads[i] if j < start}
        held[start, stop] = inputs if recomputed else inputs | {("inside", start)}
    gradients = {("gradient", len(blocks) - 1)}
    gradients |= {("gradient", j) for j in range(len(blocks)) if not any(j in r for r in reads)}
    peak = 0
    for start, stop, recomputed in reversed(regions):
        kept_inputs = held.pop((start, stop))
        for i in range(start, stop):
            held[i] = {("inside", i)} | {("result", j) for j in reads[i]}
        for i in reversed(range(start, stop)):
            # the gradient of a result whose readers come later has been made; others' not yet
            here = {g for g in gradients if g[1] <= i}
            alive = set().union(here, *held.values())
            peak = max(peak, sum(size[name] for name in alive) + blocks[i].work_bytes)
            del held[i]
            gradients |= {("gradient", j) for j in reads[i]}
            gradients.discard(("gradient", i))
        del kept_inputs, recomputed
    return peak


def _brute_force(
    blocks: Sequence[Block], budget_bytes: int, longest: int | None = None
) -> tuple[int, int] | None:
    """Return the least (cost, peak) of all placements within the budget."""
    found = []
    for regions in _regions(len(blocks), longest=longest):
        peak = _simulated_peak(blocks, regions)
        cost = sum(b.cost for start, stop, again in regions if again for b in blocks[start:stop])
        if peak <= budget_bytes:
            found.append((cost, peak))
    return min(found, default=None)


_SIZES = st.integers(0, 9)


@st.composite
def _chains(draw: st.DrawFn) -> list[Block]:
    return [
        Block(
            inside_bytes=draw(_SIZES),
            result_bytes=draw(_SIZES),
            cost=draw(_SIZES),
            work_bytes=draw(st.integers(0, 3)),
        )
        for _ in range(draw(st.integers(1, 7)))
    ]


@st.composite
def _u_nets(draw: st.DrawFn) -> list[Block]:
    """Levels down and up again; every block up reads the one before and the skip of its level."""
    levels = draw(st.integers(2, 4))
    blocks = draw(_chains())
    blocks = (blocks * 7)[: 2 * levels - 1]
    made = []
    for i, block in enumerate(blocks):
        skip = 2 * (levels - 1) - i
        reads = (i - 1, skip) if i >= levels else None
        made.append(
            Block(
                inside_bytes=block.inside_bytes,
                result_bytes=block.result_bytes,
                cost=block.cost + i % 2,
                work_bytes=block.work_bytes,
                reads=reads,
            )
        )
    return made


def _check_least(blocks: list[Block], share: float, longest: int | None) -> None:
    plain = peak_of(blocks, ())
    budget = int(plain * share)
    expected = _brute_force(blocks, budget, longest)
    found = place(blocks, budget, longest=longest)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.cost == expected[0]
        assert found.cost == sum(blocks[i].cost for i in found.recomputed)
        assert found.peak_bytes == peak_of(blocks, found.segments) <= budget
        assert all(stop - start <= (longest or len(blocks)) for start, stop in found.segments)


@settings(max_examples=150, deadline=None)
@given(_chains(), st.floats(0.2, 1.0), st.sampled_from([None, 1, 2]))
def test_in_a_chain_no_placement_within_the_budget_costs_less(
    blocks: list[Block], share: float, longest: int | None
) -> None:
    _check_least(blocks, share, longest)


@settings(max_examples=100, deadline=None)
@given(_u_nets(), st.floats(0.2, 1.0), st.sampled_from([None, 1]))
def test_in_a_u_net_no_placement_within_the_budget_costs_less(
    blocks: list[Block], share: float, longest: int | None
) -> None:
    _check_least(blocks, share, longest)


@settings(max_examples=60, deadline=None)
@given(st.one_of(_chains(), _u_nets()))
def test_the_least_peak_is_that_of_the_best_of_all_placements(blocks: list[Block]) -> None:
    peaks = [_simulated_peak(blocks, regions) for regions in _regions(len(blocks))]
    found = least_peak(blocks)
    assert found.peak_bytes == min(peaks)
    assert place(blocks, found.peak_bytes - 1) is None
    expected = _brute_force(blocks, found.peak_bytes)
    assert expected is not None
    assert found.cost == expected[0]


@settings(max_examples=150, deadline=None)
@given(st.one_of(_chains(), _u_nets()), st.sampled_from([None, 1]))
def test_the_trade_offs_are_what_every_budget_could_ask_for(
    blocks: list[Block], longest: int | None
) -> None:
    """Each budget from the least peak to the plain one, asked for alone."""
    least = least_peak(blocks, longest=longest)
    asked = [
        place(blocks, budget, longest=longest)
        for budget in range(peak_of(blocks, ()), least.peak_bytes - 1, -1)
    ]

    found = trade_offs(blocks, longest=longest, most=10**6)

    apart = list(dict.fromkeys((p.cost, p.peak_bytes) for p in asked if p is not None))
    assert [(p.cost, p.peak_bytes) for p in found] == apart
    assert found[0].cost == 0
    assert found[-1].peak_bytes == least.peak_bytes


def test_many_trade_offs_are_thinned_out_but_for_the_first_and_the_last() -> None:
    blocks = [
        Block(inside_bytes=97 + 13 * i % 29, result_bytes=1, cost=10 + 7 * i % 11)
        for i in range(24)
    ]
    every, few = trade_offs(blocks, longest=1, most=10**6), trade_offs(blocks, longest=1, most=8)

    assert len(few) <= 8 < len(every)
    assert set(few) <= set(every)
    assert (few[0], few[-1]) == (every[0], every[-1])


def _equal(count: int) -> list[Block]:
    return [Block(inside_bytes=10, result_bytes=1, cost=1) for _ in range(count)]


def test_a_chain_worked_by_hand() -> None:
    """Four blocks of 10 and 1: plain 40 inside, 3 results read, 1 gradient."""
    blocks = _equal(4)
    assert peak_of(blocks, ()) == 40 + 3 + 1
    # one block recomputed: its 10 are not there while the last one's backward runs
    assert peak_of(blocks, [(0, 1)]) == 30 + 3 + 1
    # the first two as one region: the result between them is not kept either
    assert peak_of(blocks, [(0, 2)]) == 20 + 2 + 1
    # the last one: recomputed at once, nothing is saved
    assert peak_of(blocks, [(3, 4)]) == 44
    assert place(blocks, 44) == Placement(segments=(), peak_bytes=44, cost=0)
    assert place(blocks, 34) == Placement(segments=((0, 1),), peak_bytes=34, cost=1)
    # two of them: 20 inside of the others, and then 10 inside of one at a time
    two = place(blocks, 24)
    assert two is not None
    assert two.cost == 2
    # the least: three of them by themselves. One block's 10 at a time, 3 results, a gradient
    apart = Placement(segments=((0, 1), (1, 2), (2, 3)), peak_bytes=14, cost=3)
    assert least_peak(blocks) == apart


def test_a_skip_is_alive_from_its_block_to_its_reader() -> None:
    """Block 0 is read by blocks 1 and 2: joined with 1 it is still held by 2, not by 1."""
    blocks = [
        Block(inside_bytes=10, result_bytes=4, cost=1),
        Block(inside_bytes=10, result_bytes=1, cost=1),
        Block(inside_bytes=10, result_bytes=1, cost=1, reads=(0, 1)),
    ]
    # plain: 30 inside, results 4 and 1, the last one's gradient
    assert peak_of(blocks, ()) == 30 + 5 + 1
    # behind block 2: 10 inside, 4 and 1 read, 1 of gradient. At block 1: 20, the 4 made again,
    # and the gradients of both
    assert peak_of(blocks, [(0, 2)]) == 20 + 4 + 5


def test_the_square_root_of_equal_blocks_is_found() -> None:
    """100 equal blocks with free results: ten regions of ten would keep 100 results for one run."""
    blocks = [Block(inside_bytes=0, result_bytes=1, cost=1) for _ in range(100)]
    best = least_peak(blocks)
    # about 2 sqrt(100), and a region of its own at the end that is not recomputed costs less
    assert best.peak_bytes <= 20
    assert best.cost < 100


def test_forty_blocks_of_unlike_sizes_take_no_time() -> None:
    """A U-Net of 39 blocks; a second allows for a busy machine, it takes a few hundredths."""
    levels = 20
    blocks = [
        Block(
            inside_bytes=(7919 * i) % 101 << 20,
            result_bytes=(104729 * i) % 53 << 20,
            cost=(1299709 * i) % 97 << 30,
            reads=(i - 1, 2 * (levels - 1) - i) if i >= levels else None,
        )
        for i in range(2 * levels - 1)
    ]
    begun = time.process_time()
    assert place(blocks, peak_of(blocks, ()) // 2, longest=1) is not None
    assert time.process_time() - begun < 5


def test_no_blocks_need_nothing() -> None:
    assert place([], 0) == Placement(segments=(), peak_bytes=0, cost=0)


@pytest.mark.parametrize("segments", [[(1, 1)], [(0, 2), (1, 3)], [(2, 3), (0, 1)], [(3, 5)]])
def test_regions_that_cannot_be_are_refused(segments: list[Segment]) -> None:
    with pytest.raises(OptionError, match="regions must be"):
        peak_of(_equal(4), segments)


@pytest.mark.parametrize("read", [1, 2, -1])
def test_a_block_reads_only_what_ran_before(read: int) -> None:
    blocks = [*_equal(1), Block(inside_bytes=1, result_bytes=1, cost=1, reads=(read,))]
    with pytest.raises(OptionError, match=f"only read blocks before it, got {read}"):
        place(blocks, 100)


def test_bytes_below_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="0 or more"):
        Block(inside_bytes=-1, result_bytes=0, cost=0)
