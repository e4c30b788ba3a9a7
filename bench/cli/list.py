"""``membench list``: the networks, techniques, suites and cards that there are, by name."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bench.cli.console import out, user_errors
from bench.errors import MembenchError, nearest

__all__ = ["list_"]

Row = dict[str, Any]


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="networks, techniques, suites or cards; all four if left out."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the names that suites and options can use."""
    with user_errors():
        tables = {name: _KINDS[name]() for name in _kinds(kind)}
    if json:
        print(json_module.dumps(tables))
    elif out().is_terminal:
        for name, rows in _without_sources(tables).items():
            _print_table(name, rows)
    else:
        for name, rows in _without_sources(tables).items():
            if len(tables) > 1:
                print(f"{name}:")
            for line in _lines(rows):
                print(f"  {line}" if len(tables) > 1 else line)


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return tuple(_KINDS)
    if kind not in _KINDS:
        raise MembenchError(f"there is no list of {kind!r}{nearest(kind, _KINDS)}")
    return (kind,)


def _networks() -> list[Row]:
    from memsave.networks import NETWORKS

    return [
        {
            "name": network.name,
            "summary": network.summary,
            "dimensions": network.spatial_dims,
            "source": network.source,
        }
        for network in NETWORKS.values()
    ]


def _techniques() -> list[Row]:
    from memsave.techniques import TECHNIQUES

    return [
        {
            "name": technique.name,
            "summary": technique.summary,
            "formula": technique.formula,
            "exact": technique.exact,
            "within": technique.within,
            "source": technique.source,
        }
        for technique in TECHNIQUES.values()
    ]


def _suites() -> list[Row]:
    from bench.suite import shipped_suites

    return [{"name": name, "path": str(path)} for name, path in shipped_suites().items()]


def _cards() -> list[Row]:
    from bench.predict.cards import all_cards

    return [
        {
            "name": card.name,
            "model": card.model,
            "compute_capability": ".".join(map(str, card.compute_capability)),
            "memory_bytes": card.memory_bytes,
            "capacity_bytes": card.capacity_bytes,
            "context_bytes": card.context_bytes,
            "context_cuda": card.context_cuda or "unknown",
            "calibrated": card.calibration is not None,
            "memory_source": card.memory_source,
            "context_source": card.context_source,
            "context_cuda_source": card.context_cuda_source,
        }
        for card in all_cards().values()
    ]


def _without_sources(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the tables without the columns that are a paragraph each; JSON has those."""
    return {
        name: [{k: v for k, v in row.items() if not k.endswith("_source")} for row in rows]
        for name, rows in tables.items()
    }


_KINDS: dict[str, Callable[[], list[Row]]] = {
    "networks": _networks,
    "techniques": _techniques,
    "suites": _suites,
    "cards": _cards,
}


def _heading(column: str) -> str:
    return column.removesuffix("_bytes").replace("_", " ")


def _cell(column: str, value: Any) -> str:
    """Return a value as people read it: bytes in GiB, yes and no."""
    from bench.units import format_bytes

    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_bytes(value) if column.endswith("_bytes") else str(value)


def _lines(rows: list[Row]) -> list[str]:
    """Return one line a row, columns aligned, never folded."""
    cells = [[_cell(column, value) for column, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _print_table(title: str, rows: list[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        # Names are for copying: never cut, nor folded while anything else can be.
        table.add_column(_heading(column), overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(Text(_cell(column, value)) for column, value in row.items()))
    out().print(table)
