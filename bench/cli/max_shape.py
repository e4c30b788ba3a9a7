"""``membench max-shape``: the largest volume that trains or predicts on a card."""

from __future__ import annotations

import json as json_module
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.case import Precision
from bench.cli.console import out, user_errors
from bench.cli.network_options import (
    ModeOption,
    OptimizerOption,
    parse_arguments,
    parse_techniques,
)
from bench.cli.volume_options import (
    DivisorOption,
    SpacingOption,
    VolumesOption,
    case_at,
    check_volumes,
    image_divisor,
    image_input,
    open_folder,
)
from bench.errors import MembenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.case import Case
    from bench.imported import InputSpec
    from bench.plan.largest import Grow, Largest, LargestSearch
    from bench.plan.volumes import FolderFit, FolderSearch
    from bench.predict.cards import Card

    Found = Largest | FolderFit
    Search = LargestSearch | FolderSearch

__all__ = ["max_shape"]

_INPLANE = "256x256"
# The columns of --all-cards where the user names no techniques.
_COLUMNS = ("", "inplace_abn", "recomputed_norm_act", "checkpoint", "offload")


def max_shape(
    network: Annotated[
        str,
        typer.Option(help="One of ours, package.module:factory, or path/to/file.py:factory."),
    ],
    card: Annotated[str | None, typer.Option(help="Of this card (see: list cards).")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of a card: 20GiB for the whole process.")
    ] = None,
    all_cards: Annotated[
        bool, typer.Option("--all-cards", help="A table: every card, several techniques.")
    ] = False,
    inplane: Annotated[
        str | None,
        typer.Option(help=f"x and y, the slices are sought; {_INPLANE} for 3D if left out."),
    ] = None,
    isotropic: Annotated[
        bool, typer.Option("--isotropic", help="Equal sides instead; so always in 2D.")
    ] = False,
    volumes: VolumesOption = None,
    spacing: SpacingOption = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a network of your own: batch, channels and the proportions of the sides, "
            "1x4x128x128x64; with --volumes batch and channels count."
        ),
    ] = None,
    techniques: Annotated[
        str | None, typer.Option(help="checkpoint,inplace_abn; or JSON with their options.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="fp16 and bf16 are mixed.")] = "fp32",
    mode: ModeOption = "train",
    arguments: Annotated[
        str, typer.Option(help='The network\'s options or arguments as JSON: {"classes": 4}.')
    ] = "{}",
    loss: Annotated[str | None, typer.Option(help="By name, or module:callable.")] = None,
    optimizer: OptimizerOption = "adam",
    batch: Annotated[int, typer.Option(min=1, help="The batch size.")] = 1,
    divisor: DivisorOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Find the largest volume that fits; exit code 1 if not even the smallest does."""
    with user_errors():
        from bench.plan.largest import LargestSearch
        from bench.plan.simulator import Simulator
        from bench.plan.volumes import FolderSearch

        if inplane is not None and isotropic:
            raise MembenchError("--inplane or --isotropic: give one of the two")
        check_volumes(volumes, spacing, {"--inplane": inplane, "--isotropic": isotropic})
        cards = _cards(card, budget, all_cards)
        image = image_input(network, input or (), batch=batch)
        if volumes is not None:
            folder = open_folder(network, arguments, volumes, spacing, divisor, image)
            shape: tuple[int, ...] = folder.shapes[0].shape
            search: Callable[..., Search] = partial(FolderSearch, folder=folder)
        else:
            divisors = image_divisor(network, arguments, divisor, image)
            grow = _grow(inplane, isotropic, divisors, image)
            shape = grow(1)
            search = partial(LargestSearch, grow=grow)
        texts = _COLUMNS if techniques is None and all_cards else (techniques or "",)
        given: dict[str, Any] = {
            "arguments": parse_arguments(arguments),
            "loss": loss,
            "optimizer": optimizer,
            "precision": precision,
            "mode": mode,
            "batch_size": batch,
        }
        cases = [
            case_at(network, shape, image, techniques=parse_techniques(text), **given)
            for text in texts
        ]
        with Simulator(cards[0]) as simulator:
            searches = [search(case, simulator=simulator) for case in cases]
            rows = _find(searches, cases, cards)
        found = [one for row in rows for one in row]
        _print(found, rows, all_cards=all_cards, json=json)
    if not any(one.shape for one in found):
        raise typer.Exit(1)


def _cards(card: str | None, budget: str | None, every: bool) -> list[Card]:
    from bench.cli.plan import chosen_card
    from bench.predict.cards import all_cards

    if not every:
        return [chosen_card(card, budget)]
    if card is not None or budget is not None:
        raise MembenchError("--all-cards is for every card: leave out --card and --budget")
    return sorted(all_cards().values(), key=lambda c: c.memory_bytes)


def _grow(
    inplane: str | None, isotropic: bool, divisors: tuple[int, ...], image: InputSpec | None
) -> Grow:
    from bench.plan.largest import cube_of, slices_of
    from bench.plan.patches import in_proportion
    from bench.shapes import parse_inplane

    if len(divisors) == 2 and inplane is not None:
        raise MembenchError("--inplane leaves the slices to be sought; this network is 2D")
    if image is not None and inplane is None and not isotropic:
        return in_proportion(image.shape[2:], divisors)
    if isotropic or len(divisors) == 2:
        return cube_of(divisors)
    return slices_of(parse_inplane(inplane or _INPLANE), divisors)


def _find(
    searches: Sequence[Search], cases: Sequence[Case], cards: Sequence[Card]
) -> list[list[Found]]:
    """Return a row for each case; techniques that the network has no place for have none."""
    from concurrent.futures import ThreadPoolExecutor

    def row(search: Search, case: Case) -> list[Found]:
        # Largest first: what a larger card needed often says what a smaller one does.
        largest_first = sorted(cards, key=lambda card: -card.capacity_bytes)
        try:
            found = {card.name: search.find(card) for card in largest_first}
        except MembenchError:
            if len(cases) == 1 or not case.techniques:
                raise
            return []
        return [found[card.name] for card in cards]

    with ThreadPoolExecutor(max_workers=len(cases)) as threads:
        return [one for one in threads.map(row, searches, cases) if one]


def _print(
    found: Sequence[Found], rows: Sequence[Sequence[Found]], *, all_cards: bool, json: bool
) -> None:
    if json:
        data: Any = [one.to_dict() for one in found]
        print(json_module.dumps(data if all_cards else data[0]))
    elif all_cards:
        out().print(_table(rows))
        out().print("Predicted, not measured.", markup=False)
    else:
        for line in _lines(found[0]):
            out().print(line, soft_wrap=True, markup=False)


def _lines(one: Found) -> list[str]:
    from bench.cli.volume_lines import folder_lines
    from bench.plan.volumes import FolderFit
    from bench.shapes import format_shape
    from bench.units import format_bytes

    if isinstance(one, FolderFit):
        return folder_lines(one)
    techniques = "+".join(use.name for use in one.case.techniques) or "no techniques"
    what = f"{one.case.network}, {techniques}, {one.case.precision}, {one.case.mode}"
    if one.shape is None:
        smallest = format_shape(one.case.shape)
        needs = format_bytes(one.record.needs_bytes or 0)
        has = format_bytes(one.card.capacity_bytes)
        line = f"{what}: nothing fits {one.card.name}; {smallest} needs {needs} of the caching "
        return [line + f"allocator, there are {has} (predicted)"]
    reserved = format_bytes(one.record.peak_reserved_bytes or 0)
    process = format_bytes(one.record.process_bytes or 0)
    lines = [
        f"{what}: {format_shape(one.shape)} fits {one.card.name} (predicted)",
        f"  peak reserved {reserved}, of the process {process}",
    ]
    if one.next_shape is not None:
        lines.append(f"  the next one, {format_shape(one.next_shape)}, does not fit")
    if one.reached_limit:
        lines.append("  larger ones were not tried: membench takes no larger shape")
    if not one.monotonic:
        lines.append("  but the one after that does: memory is not monotonic here")
    return lines


def _table(rows: Sequence[Sequence[Found]]) -> Any:
    from rich.table import Table

    from bench.cli.volume_lines import folder_cell
    from bench.plan.volumes import FolderFit
    from bench.shapes import format_shape

    first = rows[0][0]
    what = "largest volumes"
    if isinstance(first, FolderFit):
        what = f"of {first.share.folder.total} volumes those that fit, a patch for the others:"
    case = first.case
    table = Table(
        title=f"{what} of {case.network}, {case.precision}, {case.mode}", title_justify="left"
    )
    table.add_column("card")
    for row in rows:
        names = "+".join(use.name for use in row[0].case.techniques)
        table.add_column(names or "no techniques", justify="right")
    for of_card in zip(*rows, strict=True):
        cells = [
            folder_cell(one)
            if isinstance(one, FolderFit)
            else (format_shape(one.shape) if one.shape else "none")
            for one in of_card
        ]
        table.add_row(of_card[0].card.name, *cells)
    return table
