"""A slow allocator written straight from the rules, to hold the fast one against.

Every search is a scan over every piece of memory; nothing is shared with ``bench``. Its trace is
what PyTorch would have recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

MIB = 2**20
PAGE_OF_SMALL = 2 * MIB
FIRST_ADDRESS = 0x7E00_0000_0000
FIRST_RANGE = 0x6000_0000_0000
NO_LIMIT = 2**62


class ReferenceOutOfMemory(Exception):
    pass


@dataclass(eq=False)
class Piece:
    address: int
    size: int
    state: str  # "free", "live", "pending" or "unmapped"
    requested: int = 0
    born: int = 0
    waits_for: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(eq=False)
class Segment:
    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    pieces: list[Piece]


@dataclass(kw_only=True)
class ReferenceAllocator:
    capacity: int = NO_LIMIT
    range_bytes: int = 1 << 40
    max_split: int = NO_LIMIT
    max_rounding: int = 20 * MIB
    gc_threshold: float = 0.0
    allowed: int | None = None
    fraction: float = 1.0  # only told; ``allowed`` acts
    divisions: tuple[int, ...] = ()
    expandable: bool = False
    large_segment: int = 20 * MIB
    segments: list[Segment] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    searches: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    retries: int = 0
    placed: list[int] = field(default_factory=list)  # addresses of new segments, in order

    # --- what the driver does

    @property
    def reserved(self) -> int:
        return sum(p.size for s in self.segments for p in s.pieces if p.state != "unmapped")

    def _place(self, size: int) -> int:
        """Lowest hole, so that addresses are reused out of order, as a driver's are."""
        address = FIRST_ADDRESS
        for segment in sorted(self.segments, key=lambda s: s.address):
            if segment.expandable or segment.address < FIRST_ADDRESS:
                continue
            if segment.address - address >= size:
                break
            address = max(address, ceil((segment.address + segment.size) / (2 * MIB)) * 2 * MIB)
        return address

    # --- counters

    def _sum(self, states: tuple[str, ...], what: Callable[[Piece], int]) -> int:
        return sum(what(p) for s in self.segments for p in s.pieces if p.state in states)

    @property
    def requested(self) -> int:
        return self._sum(("live", "pending"), lambda piece: piece.requested)

    @property
    def allocated(self) -> int:
        return self._sum(("live",), lambda piece: piece.size)

    @property
    def active(self) -> int:
        return self._sum(("live", "pending"), lambda piece: piece.size)

    # --- sizes

    def round(self, size: int) -> int:
        if self.divisions and size >= 512:
            interval = min(max(size.bit_length() - 21, 0), 15)
            d = self.divisions[interval]
            if d > 1 and size > 512 * d:
                power = 1 << (size.bit_length() - 1)
                if size == power:
                    return size
                step = power // d
                return ceil(size / step) * step if step else 2 * power
        return max(512, ceil(size / 512) * 512)

    def segment_size(self, rounded: int) -> int:
        if rounded <= MIB:
            return 2 * MIB
        if rounded < 10 * MIB:
            return self.large_segment
        return ceil(rounded / (2 * MIB)) * 2 * MIB

    # --- malloc and free

    def malloc(self, size: int, stream: int = 0) -> Piece:
        rounded = self.round(size)
        small = rounded <= MIB
        found = self._search(small, stream, rounded)
        if found is None:
            self._collect_garbage()
            found = self._grow(small, stream, rounded)
        if found is None and self._release_oversize(small, stream, rounded):
            found = self._grow(small, stream, rounded)
        if found is None:
            self.release_all()
            self.retries += 1
            found = self._grow(small, stream, rounded)
        if found is None:
            self.trace.append(
                {"action": "oom", "size": rounded, "stream": stream, "device_free": 0}
            )
            raise ReferenceOutOfMemory
        return self._hand_out(*found, rounded, size)

    def _hand_out(self, segment: Segment, piece: Piece, rounded: int, size: int) -> Piece:
        rest = piece.size - rounded
        if segment.small or self.expandable:
            split = rest >= 512
        else:
            split = rounded < self.max_split and rest > MIB
        if split:
            tail = Piece(piece.address + rounded, rest, "free", born=self.searches[segment.small])
            segment.pieces.insert(segment.pieces.index(piece) + 1, tail)
            piece.size = rounded
        piece.state, piece.requested = "live", size
        self._record("alloc", piece.address, size, segment.stream)
        return piece

    def free(self, piece: Piece, used_on: set[int] | None = None) -> None:
        segment = self._segment_of(piece)
        self._record("free_requested", piece.address, piece.requested, segment.stream)
        waits_for = (used_on or set()) - {segment.stream}
        if waits_for:
            piece.state, piece.waits_for = "pending", waits_for
        else:
            self._complete(piece)

    def stream_done(self, stream: int | None = None) -> None:
        """What a malloc would find: that stream (or all) has finished its work."""
        for segment in list(self.segments):
            for piece in list(segment.pieces):
                if piece.state == "pending":
                    piece.waits_for -= piece.waits_for if stream is None else {stream}
                    if not piece.waits_for:
                        self._complete(piece)

    def _complete(self, piece: Piece) -> None:
        segment = self._segment_of(piece)
        self._record("free_completed", piece.address, piece.requested, segment.stream)
        piece.state, piece.requested = "free", 0
        piece.born = self.searches[segment.small]
        self._join(segment)

    def _join(self, segment: Segment) -> None:
        joined: list[Piece] = []
        for piece in segment.pieces:
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.state == piece.state
                and last.state in ("free", "unmapped")
            ):
                last.size += piece.size
                last.born = max(last.born, piece.born)
            else:
                joined.append(piece)
        segment.pieces = joined

    def _segment_of(self, piece: Piece) -> Segment:
        return next(s for s in self.segments if piece in s.pieces)

    # --- the search

    def _free_pieces(self, small: bool, stream: int | None) -> list[tuple[Segment, Piece]]:
        found = [
            (segment, piece)
            for segment in self.segments
            for piece in segment.pieces
            if piece.state == "free" and segment.small == small
            if stream is None or segment.stream == stream
        ]
        return sorted(found, key=lambda f: (f[0].stream, f[1].size, f[1].address))

    def _search(self, small: bool, stream: int, rounded: int) -> tuple[Segment, Piece] | None:
        if self._collects:
            self.searches[small] += 1
        fitting = [f for f in self._free_pieces(small, stream) if f[1].size >= rounded]
        if not fitting:
            return None
        chosen = 0
        if fitting[0][0].expandable and self.expandable:
            while chosen + 1 < len(fitting) and self._growable(*fitting[chosen + 1]) < (
                self._growable(*fitting[chosen])
            ):
                chosen += 1
        segment, piece = fitting[chosen]
        if rounded < self.max_split <= piece.size:
            return None
        if rounded >= self.max_split and piece.size >= rounded + self.max_rounding:
            return None
        return segment, piece

    def _growable(self, segment: Segment, piece: Piece) -> int:
        place = segment.pieces.index(piece) + 1
        if place < len(segment.pieces) and segment.pieces[place].state == "unmapped":
            return piece.size + segment.pieces[place].size
        return piece.size

    # --- new memory

    def _grow(self, small: bool, stream: int, rounded: int) -> tuple[Segment, Piece] | None:
        size = self.segment_size(rounded)
        if self.allowed is not None and self.reserved + size > self.allowed:
            return None
        if self.expandable:
            return self._map_enough(small, stream, rounded)
        if self.reserved + size > self.capacity:
            return None
        address = self._place(size)
        self.placed.append(address)
        piece = Piece(address, size, "free", born=self.searches[small])
        segment = Segment(address, size, stream, small, False, [piece])
        self.segments.append(segment)
        self._record("segment_alloc", address, size, stream)
        return segment, piece

    def _page(self, segment: Segment) -> int:
        return PAGE_OF_SMALL if segment.small else self.large_segment

    def _map_enough(self, small: bool, stream: int, rounded: int) -> tuple[Segment, Piece] | None:
        segment, start = self._lowest_run(small, stream, rounded)
        while True:
            piece = next(p for p in segment.pieces if p.address <= start < p.end)
            if piece.state == "free" and piece.size >= rounded:
                return segment, piece
            hole = (
                piece
                if piece.state == "unmapped"
                else next(p for p in segment.pieces if p.address == piece.end)
            )
            have = piece.size if piece.state == "free" else 0
            page = self._page(segment)
            size = min(ceil((rounded - have) / page) * page, hole.size)
            if self.reserved + size > self.capacity:
                return None
            place = segment.pieces.index(hole)
            mapped = Piece(hole.address, size, "free", born=self.searches[small])
            rest = Piece(hole.address + size, hole.size - size, "unmapped")
            segment.pieces[place : place + 1] = [mapped, rest] if rest.size else [mapped]
            self._join(segment)
            self._record("segment_map", hole.address, size, stream)

    def _lowest_run(self, small: bool, stream: int, rounded: int) -> tuple[Segment, int]:
        ranges = [
            s for s in self.segments if s.expandable and s.small == small and s.stream == stream
        ]
        for segment in sorted(ranges, key=lambda s: s.address):
            for place, piece in enumerate(segment.pieces):
                if piece.state != "unmapped":
                    continue
                first = place
                if place and segment.pieces[place - 1].state == "free":
                    first = place - 1
                space = 0
                for following in segment.pieces[first:]:
                    if following.state not in ("free", "unmapped"):
                        break
                    space += following.size
                if space >= rounded:
                    return segment, segment.pieces[first].address
        page = PAGE_OF_SMALL if small else self.large_segment
        size = ceil(self.range_bytes / page) * page
        taken = sum(1 for s in self.segments if s.expandable)
        address = FIRST_RANGE + taken * (1 << 42)
        while any(s.address == address for s in self.segments):
            address += 1 << 42
        self.placed.append(address)
        segment = Segment(address, size, stream, small, True, [Piece(address, size, "unmapped")])
        self.segments.append(segment)
        return segment, address

    # --- giving memory back

    @property
    def _collects(self) -> bool:
        return self.allowed is not None and self.gc_threshold > 0

    def _release(self, segment: Segment) -> None:
        self.segments.remove(segment)
        self._record("segment_free", segment.address, segment.size, segment.stream)

    def release_all(self) -> None:
        self.stream_done()
        for small in (False, True):
            for segment, piece in self._free_pieces(small, None):
                if segment.expandable:
                    self._unmap(segment, piece)
                elif len(segment.pieces) == 1:
                    self._release(segment)

    def _unmap(self, segment: Segment, piece: Piece) -> None:
        page = self._page(segment)
        start = segment.address + ceil((piece.address - segment.address) / page) * page
        end = segment.address + (piece.end - segment.address) // page * page
        if start >= end:
            return
        now = self.searches[segment.small]
        parts = [
            Piece(piece.address, start - piece.address, "free", born=now),
            Piece(start, end - start, "unmapped"),
            Piece(end, piece.end - end, "free", born=now),
        ]
        place = segment.pieces.index(piece)
        segment.pieces[place : place + 1] = [part for part in parts if part.size]
        self._record("segment_unmap", start, end - start, segment.stream)
        self._join(segment)
        if len(segment.pieces) == 1:
            self.segments.remove(segment)

    def _release_oversize(self, small: bool, stream: int, rounded: int) -> bool:
        if self.max_split == NO_LIMIT:
            return False
        wanted = max(rounded, self.max_split)
        pieces = self._free_pieces(small, stream)
        enough = [f for f in pieces if f[1].size >= wanted]
        if enough and not enough[0][0].expandable:
            self._release(enough[0][0])
            return True
        released = 0
        for segment, piece in reversed([f for f in pieces if f[1].size < wanted]):
            if released >= wanted or piece.size < self.max_split:
                break
            if not segment.expandable:
                released += piece.size
                self._release(segment)
        return released >= wanted

    def _collect_garbage(self) -> None:
        if not self._collects:
            return
        assert self.allowed is not None
        threshold = int(self.gc_threshold * self.allowed)
        target = self.reserved - threshold
        whole = [f for f in self._free_pieces(False, None) if len(f[0].pieces) == 1]
        ages = {id(s): self.searches[False] - p.born for s, p in whole}
        reclaimed = 0
        while reclaimed < target and whole:
            mean = sum(ages[id(s)] for s, _ in whole) / len(whole)
            old = [f for f in whole if ages[id(f[0])] >= mean]
            if not old:
                break
            for segment, piece in old:
                reclaimed += piece.size
                self._release(segment)
            whole = [f for f in whole if f not in old]

    # --- what PyTorch records

    def _record(self, action: str, address: int, size: int, stream: int) -> None:
        self.trace.append({"action": action, "addr": address, "size": size, "stream": stream})
