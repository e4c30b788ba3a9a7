"""``membench train``: the papers' training recipes, a command each, on volumes of one's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench.cli.console import out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from torch import nn

    from bench.recipes.progress import Progress

__all__ = ["train"]

TrainDevice = Literal["auto", "cuda", "cpu"]

train = typer.Typer(
    name="train",
    help="Train a network as its paper does, on labelled volumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Volumes = Annotated[Path, typer.Argument(help="A NIfTI volume, or a folder of them.")]
Labels = Annotated[Path, typer.Argument(help="Its labels, or a folder of files of equal names.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the weights to this file.")]
Device = Annotated[
    TrainDevice, typer.Option(help="Where to train; auto: on a GPU if there is one.")
]
Spacing = Annotated[float | None, typer.Option(help="Resample to voxels of this side, in mm.")]
Every = Annotated[int, typer.Option(help="Steps between two evaluations, each of which is saved.")]
Seed = Annotated[int, typer.Option(help="Of the weights, the movements and the order.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the weights file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]


@train.command()
def cclstm(
    volume: Volumes,
    labels: Labels,
    output: Output,
    slices: Annotated[int, typer.Option(help="Random slices that the U-Net is trained on.")] = 1000,
    volumes: Annotated[int, typer.Option(help="Volumes that the whole is trained on.")] = 1500,
    frozen_volumes: Annotated[
        int, typer.Option(help="The first of these, for which the U-Net is frozen.")
    ] = 1000,
    checkpoint_every: Annotated[
        int, typer.Option(help="Slices between two states that are kept; 0: keep all.")
    ] = 4,
    rotation: Annotated[float, typer.Option(help="Most degrees about each axis.")] = 10.0,
    translation: Annotated[float, typer.Option(help="Most voxels along each axis.")] = 20.0,
    base_width: Annotated[int, typer.Option(help="Channels of the finest U-Net level.")] = 64,
    levels: Annotated[int, typer.Option(help="Levels of the U-Net.")] = 5,
    unet_rate: Annotated[float, typer.Option(help="Learning rate of the U-Net alone.")] = 0.01,
    rate: Annotated[float, typer.Option(help="Learning rate of the whole.")] = 1e-5,
    evaluate_every: Every = 25,
    spacing: Spacing = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Train the full-volume C-LSTM in two stages: the U-Net on slices, then the recurrence.

    Any label but 0 is the foreground. The numbers are the paper's unless told otherwise.
    """

    def run(place: str, tell: Callable[[Progress], None]) -> dict[str, Any]:
        from bench.recipes.cclstm import NETWORK, TwoStages, train_two_stages
        from bench.recipes.progress import check_weights_file, save_weights
        from bench.recipes.volumes import read_volumes

        options = TwoStages(
            slices=slices,
            volumes=volumes,
            frozen_volumes=frozen_volumes,
            checkpoint_every=checkpoint_every or None,
            degrees=rotation,
            voxels=translation,
            base_width=base_width,
            levels=levels,
            unet_rate=unet_rate,
            rate=rate,
            evaluate_every=evaluate_every,
            seed=seed,
        )
        options.check()
        check_weights_file(output, force)

        def keep(model: nn.Module) -> None:
            save_weights(output, NETWORK, model.state_dict(), options=options.network_options)

        data = read_volumes(volume, labels, spacing)
        model = train_two_stages(data, options, device=place, tell=tell, keep=keep)
        keep(model)
        return {"network": NETWORK, "recipe": asdict(options)}

    _train(run, output, device, json)


def _one_stage(
    context: typer.Context,
    volume: Volumes,
    labels: Labels,
    output: Output,
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    steps_per_epoch: Annotated[
        int | None, typer.Option(help="Batches in an epoch; each volume once unless told.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="Size of random crops, 64x64x64: x, y, slices.")
    ] = None,
    evaluate_every: Every = 25,
    spacing: Spacing = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Train the network as its paper does: its loss, optimizer and learning-rate schedule."""

    def run(place: str, tell: Callable[[Progress], None]) -> dict[str, Any]:
        from bench.recipes.one_stage import (
            OneStage,
            find_recipe,
            network_options,
            train_one_stage,
        )
        from bench.recipes.progress import check_weights_file, save_weights
        from bench.recipes.volumes import read_volumes

        recipe = find_recipe(str(context.info_name))
        options = OneStage(
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            crop=_crop(crop),
            evaluate_every=evaluate_every,
            seed=seed,
        )
        check_weights_file(output, force)
        data = read_volumes(volume, labels, spacing)
        chosen = network_options(recipe, data, options)

        def keep(model: nn.Module) -> None:
            save_weights(output, recipe.network, model.state_dict(), options=chosen)

        model = train_one_stage(recipe, data, options, device=place, tell=tell, keep=keep)
        keep(model)
        return {"network": recipe.network, "recipe": {**asdict(recipe), **_given(options)}}

    _train(run, output, device, json)


for _network in ("dense_vnet", "light_unet", "pocketnet_3d", "fcn"):  # bench.recipes.one_stage's
    train.command(_network, short_help=f"Train {_network} as its paper does.")(_one_stage)


def _given(options: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if value is not None}


def _crop(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    from bench.shapes import parse_shape

    x, y, z = parse_shape(text, sides=(3,))
    return x, y, z


def _train(
    run: Callable[[str, Callable[[Progress], None]], dict[str, Any]],
    output: Path,
    device: TrainDevice,
    json: bool,
) -> None:
    """Run a recipe, telling of it on stderr as it goes; then print what came out."""
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.dice is not None:
            print(_line(progress), file=sys.stderr)

    with user_errors():
        about = run(_place(device), tell)
    if json:
        import json as json_module

        readings = [asdict(progress) for progress in told]
        print(json_module.dumps({**about, "weights": str(output), "steps": readings}))
        return
    for stage in dict.fromkeys(progress.stage for progress in told):
        of_stage = [progress for progress in told if progress.stage == stage]
        out().print(_summary(of_stage), soft_wrap=True, markup=False)
    out().print(f"weights: {output}", soft_wrap=True, markup=False)


def _place(device: TrainDevice) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    visible = torch.cuda.is_available()
    if device == "cuda" and not visible:
        raise MembenchError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda:0" if visible else "cpu"


def _summary(told: list[Progress]) -> str:
    first, last = told[0], told[-1]
    return (
        f"{first.stage}: {last.step} steps, loss {first.loss:.4f} to {last.loss:.4f}, "
        f"Dice {_dice(last)}"
    )


def _line(progress: Progress) -> str:
    return (
        f"{progress.stage} step {progress.step}: loss {progress.loss:.4f}, "
        f"Dice {_dice(progress)}, learning rate {progress.learning_rate:.3g}"
    )


def _dice(progress: Progress) -> str:
    return "-" if progress.dice is None else " ".join(f"{d:.4f}" for d in progress.dice)
