"""``membench replay``: a recorded memory trace through the allocator simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.predict.replay import ReplayResult

__all__ = ["replay"]


def replay(
    file: Annotated[
        Path,
        typer.Argument(help="A pickle of torch.cuda.memory._dump_snapshot, or a reduced trace."),
    ],
    card: Annotated[
        str | None, typer.Option(help="Also say whether the run fits this card (see: list cards).")
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(help="Also say whether the run fits this much allocator memory, as 24GiB."),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option(help="Replay this device of several; by default the one with most events."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = (
        False
    ),
) -> None:
    """Replay a memory trace through the allocator simulator and compare; exit code 1 if it differs.

    A run that does not fit the card or capacity asked about is a result, with exit code 0.
    """
    with user_errors():
        result = _replay(file, card, capacity, device)
    if json:
        import json as json_module

        print(json_module.dumps(result.to_dict()))
    else:
        _print(result, card, capacity)
    if not result.exact:
        err().print("the replay differs from the record", soft_wrap=True)
        raise typer.Exit(1)


def _replay(
    file: Path, card_name: str | None, capacity: str | None, device: int | None
) -> ReplayResult:
    from bench.predict.cards import find_card
    from bench.predict.replay import replay as replay_trace
    from bench.predict.trace_file import read_trace
    from bench.units import parse_bytes

    if card_name is not None and capacity is not None:
        raise MembenchError(
            f"--card {card_name} and --capacity {capacity} both name a capacity: give one of them"
        )
    capacity_bytes = device_total_bytes = None
    if card_name is not None:
        card = find_card(card_name)
        capacity_bytes, device_total_bytes = card.capacity_bytes, card.memory_bytes
    elif capacity is not None:
        capacity_bytes = parse_bytes(capacity)
        if not capacity_bytes:
            raise MembenchError(f"--capacity {capacity} is no memory at all: give a size above 0")
    return replay_trace(read_trace(file, device), capacity_bytes, device_total_bytes)


def _print(result: ReplayResult, card: str | None, capacity: str | None) -> None:
    console = out()
    console.print(
        f"{result.addresses_exact}/{result.allocations} allocations at the recorded address"
    )
    rows = (
        ("start", result.reserved_start_bytes, result.recorded_reserved_start_bytes),
        ("peak", result.reserved_peak_bytes, result.recorded_reserved_peak_bytes),
        ("end", result.reserved_end_bytes, result.recorded_reserved_end_bytes),
    )
    for moment, replayed, recorded in rows:
        verdict = "as recorded" if replayed == recorded else f"recorded {_both(recorded)}"
        console.print(f"reserved at {moment:5} {_both(replayed)}, {verdict}", soft_wrap=True)
    if result.fits is None:
        return
    where = f"the card {card}" if card is not None else f"a capacity of {capacity}"
    if result.fits:
        console.print(f"fits {where}", soft_wrap=True)
    else:
        at = result.oom_at_event
        console.print(f"does not fit {where}: out of memory at event {at}", soft_wrap=True)


def _both(size_bytes: int) -> str:
    from bench.units import format_bytes

    return f"{format_bytes(size_bytes)} ({size_bytes} B)"
