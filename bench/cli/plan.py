"""``membench plan``: what makes a volume fit a card."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bench.case import Precision
from bench.cli.console import err, out, user_errors
from bench.cli.network_options import (
    ModeOption,
    OptimizerOption,
    TargetOption,
    parse_arguments,
)
from bench.errors import MembenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.plan.search import Plan, Proposal
    from bench.plan.simulator import Simulator
    from bench.predict.cards import Card

__all__ = ["chosen_card", "parse_precisions", "plan"]


def plan(
    network: Annotated[
        str,
        typer.Option(help="One of ours, package.module:factory, or path/to/file.py:factory."),
    ],
    shape: Annotated[
        str | None, typer.Option(help="x, y, slices: 256x256x234; padded as the network needs.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="Of a network of your own: 1x1x128x128x128; once for each input."),
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="The card it should fit (see: list cards).")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of a card: 20GiB for the whole process.")
    ] = None,
    arguments: Annotated[
        str, typer.Option(help='The network\'s options or arguments as JSON: {"classes": 4}.')
    ] = "{}",
    loss: Annotated[str | None, typer.Option(help="By name, or module:callable.")] = None,
    optimizer: OptimizerOption = "adam",
    precision: Annotated[
        str, typer.Option(help="Those to try, from fp32, fp16 and bf16.")
    ] = "fp32,fp16",
    mode: ModeOption = "train",
    batch: Annotated[int, typer.Option(min=1, help="With --shape: the batch size.")] = 1,
    target: TargetOption = None,
    allow_architecture: Annotated[
        bool,
        typer.Option("--allow-architecture", help="Also compact blocks and pocket widths."),
    ] = False,
    results: Annotated[
        Path, typer.Option(help="Folder of results, whose measured times go before estimates.")
    ] = Path("results"),
    top: Annotated[
        int, typer.Option(min=0, help="How many proposals are printed; 0: all that fit.")
    ] = 20,
    best: Annotated[int, typer.Option(min=1, help="How many proposals --write-suite writes.")] = 5,
    write_suite: Annotated[
        Path | None, typer.Option(help="Write the suite that measures the best proposals.")
    ] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print the lines of Python of the best proposal.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of all proposals, nothing else.")
    ] = False,
) -> None:
    """Search what makes a volume fit a card; exit code 1 if nothing does."""
    with user_errors():
        if json and code:
            raise MembenchError("--json prints JSON and nothing else: leave out --code")
        asked = chosen_card(card, budget)
        precisions = parse_precisions(precision)
        from bench.named_case import named_case
        from bench.plan.search import make_plan
        from bench.plan.simulator import Simulator
        from bench.plan.slowdown import measured_times

        case = named_case(
            network,
            shape=shape,
            inputs=input or (),
            arguments=parse_arguments(arguments),
            loss=loss,
            optimizer=optimizer,
            mode=mode,
            batch_size=batch,
            target=target,
        )
        with Simulator(asked) as simulator:
            found = make_plan(
                case,
                simulator,
                precisions=precisions,
                allow_architecture=allow_architecture,
                times=measured_times(results, asked.name),
            )
            lines = [] if json or found.fitting else _what_would_do(found, simulator)
        if write_suite is not None:
            _write(write_suite, found, card, best)
        _print(found, lines, top=top, code=code, json=json)
    if not found.fitting:
        raise typer.Exit(1)


def chosen_card(card: str | None, budget: str | None) -> Card:
    """Return the card asked for, or one of a budget.

    Errors: MembenchError for none or both of them, an unknown card and a size that is none.
    """
    from bench.plan.search import budget_card
    from bench.predict.cards import find_card
    from bench.units import parse_bytes

    if (card is None) == (budget is None):
        raise MembenchError(
            "say what it should fit: --card rtx4090-24gb or --budget 20GiB, one of the two"
        )
    return find_card(card) if card is not None else budget_card(parse_bytes(budget or ""))


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Return the precisions of ``fp32,fp16``, each once.

    Errors: MembenchError for none, and for another name.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in names if name not in ("fp32", "fp16", "bf16")]
    if wrong or not names:
        raise MembenchError(f"--precision {text!r}: give some of fp32, fp16, bf16, with commas")
    return cast(tuple[Precision, ...], names)


def _write(path: Path, found: Plan, card: str | None, best: int) -> None:
    from bench.plan.suite_text import write_suite

    if not found.fitting:
        err().print(f"{path} was not written: nothing fits", soft_wrap=True, markup=False)
        return
    case = found.fitting[0].case
    sides = "x".join(map(str, case.requested_shape))
    title = f"Plan for {case.network} at {sides} on {found.card.name}"
    write_suite(path, found.fitting[:best], card, title)
    err().print(f"wrote {path}", soft_wrap=True, markup=False)


def _what_would_do(found: Plan, simulator: Simulator) -> list[str]:
    from bench.plan.remedies import remedies

    return remedies(found, simulator)


def _print(found: Plan, lines: list[str], *, top: int, code: bool, json: bool) -> None:
    if json:
        print(json_module.dumps([proposal.to_dict() for proposal in found.proposals]))
        return
    if found.fitting:
        shown = found.fitting[: top or None]
        out().print(_table(found, shown))
        if len(shown) < len(found.fitting):
            more = len(found.fitting) - len(shown)
            out().print(f"{more} more fit: --top 0 or --json shows them", markup=False)
        out().print(
            "Predicted. slowdown: of a step, over the same network at the same precision with "
            "everything kept; estimated from FLOPs and bytes moved, unless marked measured.",
            soft_wrap=True,
            markup=False,
        )
    for line in lines:
        out().print(line, soft_wrap=True, markup=False)
    if code and found.fitting:
        from bench.plan.code_text import code_text

        print()
        print(code_text(found.fitting[0].case), end="")


def _table(found: Plan, shown: Sequence[Proposal]) -> Any:
    from rich.table import Table

    from bench.units import format_bytes

    first = found.proposals[0].case
    sides = "x".join(map(str, first.shape))
    table = Table(
        title=f"{first.network} at {sides}, {first.mode}, on {found.card.name}: "
        f"{len(found.fitting)} of {len(found.proposals)} combinations fit",
        title_justify="left",
    )
    table.add_column("proposal", overflow="fold")
    table.add_column("precision")
    table.add_column("exact")
    for heading in ("peak reserved", "process", "headroom", "slowdown"):
        table.add_column(heading, justify="right")
    for proposal in shown:
        slowdown = "-" if proposal.slowdown is None else f"{proposal.slowdown:.2f}x"
        marked = " measured" if proposal.slowdown_evidence == "measured" else ""
        table.add_row(
            proposal.case.variant,
            proposal.case.precision,
            "yes" if proposal.exact else "no",
            format_bytes(proposal.peak_reserved_bytes),
            format_bytes(proposal.process_bytes),
            format_bytes(proposal.headroom_bytes),
            slowdown + marked,
        )
    return table
