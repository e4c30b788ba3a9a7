"""Recipes that train a network in one stage, as its paper does: loss, optimizer, rate, input.

``RECIPES`` is the literal table; the loss is the network's own. What a network sees of a volume is
random crops or, for FLARE21's two stages, the whole volume or the box around its labels at the one
size that the stage ever sees, as ``bench.infer`` gives it: so that the weights are of use there.
Random crops are the only augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError, nearest
from bench.infer.pipeline import MARGIN_PERCENT
from bench.infer.stages import ARRAY_AXES, REGION, SEGMENTATION
from bench.preprocess import Box, resize, resize_labels
from bench.recipes.progress import Progress, Tell, fits_the_device, overlap
from bench.schedules import find_schedule
from bench.shapes import check_poolable
from bench.training import Batch, train
from bench.training_data import LabelledVolume, in_order, random_crops, whole
from memsave.networks import NetworkSpec, find_network

__all__ = ["RECIPES", "OneStage", "Recipe", "find_recipe", "network_options", "train_one_stage"]

Sees = Literal["crops", "volume", "box"]
Keep = Callable[[nn.Module], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a paper trains a network.

    ``shape``: of crops, x, y, slices; of FLARE21's stages, the array's. ``any_label``: every label
    is class 1. ``classes``: what the weights must have to be of use; None: as many as the labels.
    """

    network: str
    sees: Sees
    shape: tuple[int, int, int]
    batch: int
    optimizer: str
    rate: float
    schedule: str
    epochs: int
    any_label: bool = False
    classes: int | None = None


RECIPES: dict[str, Recipe] = {
    "light_unet": Recipe(
        network="light_unet", sees="volume", shape=REGION.shape, batch=1, optimizer="sgd",
        rate=0.01, schedule="poly", epochs=600, any_label=True, classes=2,
    ),
    "dense_vnet": Recipe(
        network="dense_vnet", sees="box", shape=SEGMENTATION.shape, batch=1, optimizer="sgd",
        rate=0.01, schedule="poly", epochs=600, classes=5,
    ),
    "pocketnet_3d": Recipe(
        network="pocketnet_3d", sees="crops", shape=(256, 256, 5), batch=4, optimizer="adam",
        rate=1e-3, schedule="halve_on_plateau", epochs=100,
    ),
    "fcn": Recipe(
        network="fcn", sees="crops", shape=(96, 96, 96), batch=1, optimizer="adam",
        rate=4e-4, schedule="plateau", epochs=300,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStage:
    """What a user may change; None: as the recipe has it."""

    epochs: int | None = None
    steps_per_epoch: int | None = None  # None: each volume once
    crop: tuple[int, int, int] | None = None  # x, y, slices
    network_options: dict[str, Any] = field(default_factory=dict)
    evaluate_every: int = 25
    seed: int = 0


def find_recipe(network: str) -> Recipe:
    """Return the recipe of ``network``; MembenchError with near names where there is none."""
    if network not in RECIPES:
        raise MembenchError(f"no recipe trains {network!r}{nearest(network, RECIPES)}")
    return RECIPES[network]


def network_options(
    recipe: Recipe, volumes: Sequence[LabelledVolume], options: OneStage
) -> dict[str, Any]:
    """Return the network's options, its classes being those of the labels.

    Errors: MembenchError for labels that the recipe's classes do not hold.
    """
    highest = max(int(volume.labels.max()) for volume in volumes)
    classes = 2 if recipe.any_label else highest + 1
    if recipe.classes is None:
        return {"classes": classes, **options.network_options}
    if classes > recipe.classes:
        raise MembenchError(
            f"a label is {highest}, but {recipe.network} has {recipe.classes} classes, 0 to "
            f"{recipe.classes - 1}: relabel the volumes"
        )
    return dict(options.network_options)


def train_one_stage(
    recipe: Recipe,
    volumes: Sequence[LabelledVolume],
    options: OneStage,
    *,
    device: str = "cpu",
    tell: Tell = lambda _progress: None,
    keep: Keep = lambda _model: None,
) -> nn.Module:
    """Return the network, trained. ``tell`` hears of every step, with the Dice of each class but 0.

    The Dice is that of the first volume, whole. ``keep`` gets the network at each evaluation.
    Errors: MembenchError for what cannot be used and a GPU too small; DivergedError.
    """
    spec = find_network(recipe.network)
    chosen = network_options(recipe, volumes, options)
    samples, judged = _samples(recipe, spec, chosen, volumes, options)
    epochs = recipe.epochs if options.epochs is None else options.epochs
    per_epoch = options.steps_per_epoch
    if per_epoch is None:
        per_epoch = -(-len(volumes) // recipe.batch)
    divisor = spec.divisor(chosen)
    case = Case(
        network=recipe.network,
        variant="recipe",
        requested_shape=divisor,  # its own batch is not trained with, so it is the smallest
        shape=divisor,
        network_options=chosen,
        loss=spec.loss,
        optimizer=recipe.optimizer,
        optimizer_options={"lr": recipe.rate},
        seed=options.seed,
    )
    with fits_the_device():
        workload = build_workload(case, lambda _phase: None, device)
        assert workload.optimizer is not None  # it trains
        of_schedule = {"epochs": max(1, epochs)} if recipe.schedule == "poly" else {}
        readings = train(
            workload,
            samples,
            steps=epochs * per_epoch,
            seed=options.seed,
            schedule=find_schedule(recipe.schedule)(workload.optimizer, **of_schedule),
            steps_per_epoch=per_epoch,
            evaluate=lambda model: _dice(model, judged, device),
            evaluate_every=options.evaluate_every,
        )
        for reading in readings:
            tell(Progress.of(recipe.network, reading))
            if reading.scores is not None:
                keep(workload.model)
    return workload.model


def _samples(
    recipe: Recipe,
    spec: NetworkSpec,
    chosen: dict[str, Any],
    volumes: Sequence[LabelledVolume],
    options: OneStage,
) -> tuple[Iterator[Batch], Batch]:
    """Return endless batches, and what the Dice is taken of."""
    if recipe.sees != "crops":
        if options.crop is not None:
            raise MembenchError(f"{recipe.network} is trained on no crops: leave --crop out")
        resized = [_resized(recipe, volume) for volume in volumes]
        return _shuffled(resized, options.seed), resized[0]
    order = spec.input_sides((0, 1, 2))
    sides = options.crop or recipe.shape
    check_poolable(sides, spec.divisor(chosen), recipe.network)
    sources = [
        random_crops(volume, sides, recipe.batch, options.seed + i)
        for i, volume in enumerate(volumes)
    ]
    judged = in_order(whole(volumes[0], spec.divisor(chosen)), order)
    crops = (in_order(batch, order) for batch in _alternating(sources, options.seed))
    return crops, judged


def _alternating(sources: Sequence[Iterator[Batch]], seed: int) -> Iterator[Batch]:
    """Yield the next batch of each source once, in a new random order each time."""
    generator = np.random.default_rng(seed)
    while True:
        for i in generator.permutation(len(sources)):
            yield next(sources[i])


def _shuffled(samples: Sequence[Batch], seed: int) -> Iterator[Batch]:
    generator = np.random.default_rng(seed)
    while True:
        for i in generator.permutation(len(samples)):
            yield samples[i]


def _resized(recipe: Recipe, volume: LabelledVolume) -> Batch:
    """Return image and labels as the pipeline's stage sees them: (1, 1, slices, y, x)."""
    from scipy import ndimage

    image, labels = volume.image[0].numpy(), volume.labels.numpy().astype(np.uint8)
    if recipe.sees == "box":
        (found,) = ndimage.find_objects((labels > 0).astype(np.uint8)) or (None,)
        if found is None:
            raise MembenchError(f"{volume.name} has no label but 0: there is no box to train on")
        box = Box(
            (found[0].start, found[1].start, found[2].start),
            (found[0].stop, found[1].stop, found[2].stop),
        ).grown(MARGIN_PERCENT, labels.shape)
        image, labels = image[box.slices], labels[box.slices]
    slices, y, x = recipe.shape
    classes = resize_labels(
        (labels > 0).astype(np.uint8) if recipe.any_label else labels, (x, y, slices)
    )
    batch = (
        torch.from_numpy(resize(image, (x, y, slices)))[None, None],
        torch.from_numpy(classes.astype(np.int64))[None],
    )
    return in_order(batch, ARRAY_AXES)


def _dice(model: nn.Module, judged: Batch, device: str) -> list[float]:
    """Return the Dice of each class but the background; what was padded does not count."""
    images, labels = judged
    scores: Tensor = model(images.to(device))
    found = scores.argmax(dim=1).cpu()
    known = labels >= 0
    return [overlap((found == c) & known, labels == c) for c in range(1, scores.shape[1])]
