"""``membench predict``: what one network needs on a card, with no suite file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.case import Precision
from bench.cli.console import out, user_errors
from bench.cli.network_options import (
    ModeOption,
    OptimizerOption,
    TargetOption,
    parse_arguments,
    parse_techniques,
)

if TYPE_CHECKING:
    from bench.prediction import Prediction

__all__ = ["predict"]

_DEFAULT_CARD = "a100-80gb"  # bench.prediction's, which imports more than --help should


def predict(
    network: Annotated[
        str,
        typer.Option(help="package.module:factory, path/to/file.py:factory, or one of ours."),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(help="1x1x128x128x128, or 1x77:int64; once for each input of the network."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Sides of the one image instead: 256x256x152.")
    ] = None,
    arguments: Annotated[
        str, typer.Option(help='The factory\'s arguments as JSON: {"out_channels": 3}.')
    ] = "{}",
    loss: Annotated[
        str | None, typer.Option(help="A loss by name, or module:callable; sum if left out.")
    ] = None,
    optimizer: OptimizerOption = "adam",
    card: Annotated[str, typer.Option(help="Predict for this card (see: list cards).")] = (
        _DEFAULT_CARD
    ),
    precision: Annotated[Precision, typer.Option(help="fp16 and bf16 are mixed.")] = "fp32",
    techniques: Annotated[
        str, typer.Option(help="checkpoint,inplace_abn; or JSON with their options.")
    ] = "",
    mode: ModeOption = "train",
    batch: Annotated[int, typer.Option(min=1, help="With --shape: the batch size.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps that memory is taken over.")] = 2,
    target: TargetOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say who holds the bytes at the peak.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write every allocation: FILE.pickle or FILE.json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON record, nothing else.")] = (
        False
    ),
) -> None:
    """Predict what a network of anyone's needs on a card; exit code 1 if it does not fit."""
    with user_errors():
        from bench.export import check_path
        from bench.named_case import named_case
        from bench.prediction import predict_case

        if trace is not None:
            check_path(trace)
        case = named_case(
            network,
            shape=shape,
            inputs=input or (),
            arguments=parse_arguments(arguments),
            loss=loss,
            optimizer=optimizer,
            precision=precision,
            techniques=parse_techniques(techniques),
            mode=mode,
            steps=steps,
            batch_size=batch,
            target=target,
        )
        prediction = predict_case(case, card)
        if trace is not None:
            prediction.save_trace(trace)
        _print(prediction, explain, json)
    if prediction.status != "ok":
        raise typer.Exit(1)


def _print(prediction: Prediction, explain: bool, json: bool) -> None:
    from bench.prediction_text import figures_text

    if json:
        print(prediction.record.to_json())
        return
    text = figures_text(prediction.record)
    if explain:
        text += "\n\n" + prediction.explain()
    out().print(text, soft_wrap=True, markup=False)
