"""``membench plan``: what makes a volume fit a card."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bench.case import Precision
from bench.cli.console import err, user_errors
from bench.cli.network_options import (
    ModeOption,
    OptimizerOption,
    TargetOption,
    parse_arguments,
)
from bench.cli.plan_answers import of_folder, of_shape, print_answer
from bench.cli.volume_options import (
    DivisorOption,
    SpacingOption,
    VolumesOption,
    case_at,
    check_volumes,
    image_input,
    open_folder,
)
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.cli.plan_answers import Answer
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
        typer.Option(
            help="Of a network of your own: 1x1x128x128x128; once for each input. With --volumes "
            "batch and channels count."
        ),
    ] = None,
    volumes: VolumesOption = None,
    spacing: SpacingOption = None,
    divisor: DivisorOption = None,
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
        check_volumes(volumes, spacing, {"--shape": shape, "--target": target})
        asked = chosen_card(card, budget)
        precisions = parse_precisions(precision)
        from bench.named_case import named_case
        from bench.plan.folder_plan import make_folder_plan
        from bench.plan.remedies import remedies
        from bench.plan.search import make_plan
        from bench.plan.simulator import Simulator
        from bench.plan.slowdown import measured_times
        from bench.plan.suite_text import check_writable

        given: dict[str, Any] = {
            "arguments": parse_arguments(arguments),
            "loss": loss,
            "optimizer": optimizer,
            "mode": mode,
            "batch_size": batch,
        }
        folder = None
        if volumes is not None:
            image = image_input(network, input or (), batch=batch)
            folder = open_folder(network, arguments, volumes, spacing, divisor, image)
            case = case_at(network, folder.shapes[0].shape, image, **given)
        elif divisor is not None:
            raise MembenchError("--divisor pads volumes: give it together with --volumes")
        else:
            case = named_case(network, shape=shape, inputs=input or (), target=target, **given)
        search: dict[str, Any] = {
            "precisions": precisions,
            "allow_architecture": allow_architecture,
            "times": measured_times(results, asked.name),
        }
        if write_suite is not None:
            check_writable(write_suite)
        with Simulator(asked) as simulator:
            if folder is not None:
                answer = of_folder(make_folder_plan(case, folder, simulator, **search))
            else:
                found = make_plan(case, simulator, **search)
                answer = of_shape(
                    found, () if json or found.fitting else remedies(found, simulator)
                )
        if write_suite is not None:
            _write(write_suite, answer, best)
        if json:
            print(json_module.dumps(answer.data))
        else:
            print_answer(answer, top=top, code=code)
    if not answer.fits:
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


def _write(path: Path, answer: Answer, best: int) -> None:
    from bench.plan.suite_text import write_suite

    if not answer.usable:
        err().print(f"{path} was not written: nothing fits", soft_wrap=True, markup=False)
        return
    case = answer.usable[0].case
    sides = "x".join(map(str, case.requested_shape))
    title = f"Plan for {case.network} at {sides} on {answer.card.name}"
    write_suite(path, answer.usable[:best], answer.card.name, title)
    err().print(f"wrote {path}", soft_wrap=True, markup=False)
