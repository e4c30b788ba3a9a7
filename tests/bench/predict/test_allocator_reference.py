"""The fast allocator against one written straight from the rules, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from tests.bench.predict.random_runs import SETUPS, Action, Setup, random_actions
from tests.bench.predict.reference_allocator import (
    FIRST_ADDRESS,
    Piece,
    ReferenceAllocator,
    ReferenceOutOfMemory,
)

_STATES = {0: "free", 2: "unmapped"}


class _Pair:
    """Both allocators, given the same actions; the fast one is told the segments' addresses."""

    def __init__(self, setup: Setup) -> None:
        self.reference = setup.reference()
        self.fast = CachingAllocator(setup.capacity, setup.settings, place_segment=self._place)
        if setup.capacity is None:
            self.reference.range_bytes = self.fast._range_bytes
        self._told = 0
        self.live: list[tuple[Piece, Block]] = []
        self.ooms = 0

    def _place(self, _size: int, _pool: str, _stream: int) -> int:
        self._told += 1
        return self.reference.placed[self._told - 1]

    def run(self, action: Action) -> None:
        match action:
            case ("alloc", size, stream):
                self._malloc(size, stream)
            case ("free", share) if self.live:
                piece, block = self.live.pop(int(share * len(self.live)))
                self.reference.free(piece)
                self.fast.free(block)
            case ("free_later", share, stream) if self.live:
                piece, block = self.live.pop(int(share * len(self.live)))
                self.reference.free(piece, {stream})
                self.fast.record_stream(block, stream)
                self.fast.free(block)
            case ("stream_done", stream):
                self.reference.stream_done(stream)
                self.fast.complete_events(stream)
                self._malloc(1, stream)  # PyTorch looks at events at the next allocation
            case ("empty_cache",):
                self.reference.release_all()
                self.fast.empty_cache()

    def _malloc(self, size: int, stream: int) -> None:
        try:
            piece = self.reference.malloc(size, stream)
        except ReferenceOutOfMemory:
            with pytest.raises(OutOfMemory):
                self.fast.malloc(size, stream)
            self.ooms += 1
            return
        block = self.fast.malloc(size, stream)
        assert block is not None
        assert (block.address, block.size) == (piece.address, piece.size)
        self.live.append((piece, block))

    def assert_equal(self) -> None:
        assert _layout(self.fast) == _reference_layout(self.reference)
        fast, reference = self.fast, self.reference
        assert fast.reserved_bytes == reference.reserved
        assert fast.active_bytes == reference.active
        assert fast.allocated_bytes == reference.allocated
        assert fast.requested_bytes == reference.requested
        assert fast.num_alloc_retries == reference.retries


def _layout(fast: CachingAllocator) -> list[tuple[int, int, int, bool, str]]:
    return sorted(
        (b.address, b.size, b.stream, b.pool.small, _STATES.get(b.state, "live"))
        for b in fast.blocks()
    )


def _reference_layout(reference: ReferenceAllocator) -> list[tuple[int, int, int, bool, str]]:
    return sorted(
        (p.address, p.size, s.stream, s.small, p.state.replace("pending", "live"))
        for s in reference.segments
        for p in s.pieces
    )


@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_both_allocators_place_every_block_alike(name: str, seed: int) -> None:
    pair = _Pair(SETUPS[name])
    for action in random_actions(seed, 120):
        pair.run(action)
        pair.assert_equal()


@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if setup.capacity])
def test_random_runs_reach_the_limits_that_their_setup_is_about(name: str) -> None:
    """Guards the test above: without releases and out-of-memory it would show little."""
    ooms = retries = partial_releases = 0
    for seed in range(4):
        pair = _Pair(SETUPS[name])
        for action in random_actions(seed, 150):
            retries_before, events_before = pair.reference.retries, len(pair.reference.trace)
            pair.run(action)
            retried = pair.reference.retries - retries_before
            new = {entry["action"] for entry in pair.reference.trace[events_before:]}
            retries += retried
            partial_releases += action[0] == "alloc" and not retried and "segment_free" in new
        ooms += pair.ooms
    assert ooms > 0
    if name.startswith("collecting") or name in ("max_split", "max_split_rounding"):
        assert partial_releases > 0
    else:
        assert retries > ooms


def test_the_reference_reuses_addresses() -> None:
    """Ties break by address, which shows only if later segments may lie lower."""
    reference = ReferenceAllocator()
    first, _second = reference.malloc(24 * 2**20), reference.malloc(24 * 2**20)
    reference.free(first)
    reference.release_all()
    assert reference.malloc(20 * 2**20).address == FIRST_ADDRESS
