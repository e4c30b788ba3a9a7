"""``memsave.streams``: the order of waits that a GPU needs, and host memory counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memsave import streams as module
from memsave.streams import CudaStreams, HostBuffer, PlainStreams, piece_sizes, streams_for

MIB = 2**20


class StandIn:
    """What ``CudaStreams`` asks of ``torch.cuda``, writing down the order in which it is asked."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = StandInStream(self, "main")

    def Stream(self, device: torch.device) -> StandInStream:  # torch's name
        self.log.append(f"new stream on {device}")
        return StandInStream(self, "second")

    def current_stream(self, device: torch.device) -> StandInStream:
        assert device == torch.device("cpu")
        return self.main

    @contextmanager
    def stream(self, stream: StandInStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")


class StandInStream:
    def __init__(self, cuda: StandIn, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: StandInStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.cuda.log.append(f"{self.name} records")
        return "event"

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self.name} waits for {event}")


def test_copies_run_on_the_second_stream_after_the_computation_and_are_waited_for() -> None:
    cuda = StandIn()
    streams = CudaStreams(cuda)
    pieces = tuple(torch.empty(n, dtype=torch.uint8) for n in piece_sizes(6))
    buffer = HostBuffer(streams.host, 6, pieces)
    block = torch.arange(6, dtype=torch.uint8)
    ticket = streams.copy_to_host(block, buffer)
    a_copy = ["second waits for main", "on second", "second records", "off second"]
    assert cuda.log == ["new stream on cpu", *a_copy]
    back = torch.zeros(6, dtype=torch.uint8)
    streams.copy_to_device(buffer, back)
    assert cuda.log[5:] == a_copy  # one stream for both directions
    assert back.tolist() == [0, 1, 2, 3, 4, 5]
    streams.wait(ticket)
    assert cuda.log[9:] == ["main waits for event"]


def test_pinned_memory_is_asked_for_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    empty = torch.empty

    def pageable(size: int, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append((size, pin_memory))
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", pageable)
    streams = CudaStreams(StandIn())
    buffer = streams.pinned(5 * MIB)
    assert asked == [(4 * MIB, True), (MIB, True)]
    assert streams.host.now_bytes == buffer.size_bytes == 5 * MIB
    del buffer
    assert (streams.host.now_bytes, streams.host.peak_bytes) == (0, 5 * MIB)
    streams.host.reset_peak()
    assert streams.host.peak_bytes == 0


@given(st.integers(min_value=1, max_value=2**45))
def test_pieces_hold_the_block_and_little_more(size_bytes: int) -> None:
    sizes = piece_sizes(size_bytes)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 8
    extra = sum(sizes) - size_bytes
    assert 0 <= extra < size_bytes / 128
    if size_bytes.bit_count() <= 8:
        assert extra == 0


def test_no_bytes_take_no_piece() -> None:
    assert piece_sizes(0) == []


def test_plain_streams_copy_there_and_back_at_once() -> None:
    streams = PlainStreams()
    buffer = streams.pinned(5)
    block = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    streams.wait(streams.copy_to_host(block, buffer))
    back = torch.zeros_like(block)
    streams.wait(streams.copy_to_device(buffer, back))
    assert torch.equal(back, block)


def test_a_device_is_served_by_what_was_installed_last_or_by_its_own() -> None:
    assert isinstance(streams_for(torch.device("cuda", 0)), CudaStreams)
    assert isinstance(streams_for(torch.device("cpu")), PlainStreams)
    outer, inner = PlainStreams(), PlainStreams()
    with module.use_streams(outer):
        with module.use_streams(inner):
            assert streams_for(torch.device("cuda", 0)) is inner
        assert streams_for(torch.device("cpu")) is outer
    assert streams_for(torch.device("cpu")) is not outer
