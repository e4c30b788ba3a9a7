"""The C-LSTM's training in two stages: the 2D U-Net on single slices, then the recurrence.

Source: van de Leemput, Patel, Manniesing, "Full Volumetric Brain Tissue Segmentation in
Non-Contrast CT using Memory Efficient Convolutional LSTMs", NIPS 2018 workshop.

Stage one trains the U-Net alone towards p = (tanh(u_g) + 1) / 2 on 1000 random slices (SGD 0.01,
momentum 0.99). Stage two starts from its weights and trains the whole on 1500 volumes (RMSprop
1e-5, momentum 0), the step function checkpointed; for the first 1000 the U-Net is frozen. Both
minimise binary cross-entropy, on volumes rotated by up to 10 degrees and moved by up to 20 voxels,
about and along each axis.

Our choices: p of stage one; a frozen U-Net's BatchNorm is in evaluation; each volume is z-scored by
its own voxels, and each draw is of a random volume; a state is kept for every 4th slice; the last
weights are kept, where the paper keeps the best of a validation set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.errors import MembenchError
from bench.recipes.movement import Floats, random_movement
from bench.recipes.progress import Progress, Tell, fits_the_device, overlap
from bench.shapes import pad_to
from bench.training import Batch, Reading, train
from bench.training_data import LabelledVolume
from bench.workload import Workload
from memsave.networks import find_network

__all__ = [
    "NETWORK",
    "Subject",
    "TwoStages",
    "prepare",
    "recurrent_steps",
    "recurrent_workload",
    "train_recurrence",
    "train_two_stages",
    "train_unet",
]

NETWORK = "conv_lstm"
_UNET = "conv_lstm_unet"
_LOSS = "binary_cross_entropy"
Keep = Callable[[nn.Module], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStages:
    """The recipe's numbers, the paper's unless told otherwise."""

    slices: int = 1000  # steps of stage one
    volumes: int = 1500  # steps of stage two
    frozen_volumes: int = 1000  # of these, with the U-Net frozen
    checkpoint_every: int | None = 4  # slices between two states that are kept; None: keep all
    degrees: float = 10.0
    voxels: float = 20.0
    base_width: int = 64
    levels: int = 5
    unet_rate: float = 0.01
    unet_momentum: float = 0.99
    rate: float = 1e-5
    evaluate_every: int = 25
    seed: int = 0

    @property
    def network_options(self) -> dict[str, Any]:
        """The options of both networks."""
        return {"base_width": self.base_width, "levels": self.levels}

    def check(self) -> None:
        """Raise MembenchError for a number that will not do."""
        least = {"slices": 1, "volumes": 1, "frozen_volumes": 0, "evaluate_every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise MembenchError(f"{name} must be {low} or more, got {getattr(self, name)}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise MembenchError(
                f"checkpoint_every must be 1 or more slices, got {self.checkpoint_every}"
            )
        for name in ("degrees", "voxels"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise MembenchError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A volume and the mask of all its labels, padded to what the network pools."""

    image: Floats  # x, y, slices
    mask: Floats  # 0 and 1


def prepare(volume: LabelledVolume, options: TwoStages) -> Subject:
    """Return the volume padded at its upper ends, with its lowest value and background."""
    image, mask = volume.image[0].numpy(), (volume.labels > 0).float().numpy()
    divisor = find_network(NETWORK).divisor(options.network_options)
    sides = pad_to(image.shape, divisor)
    around = [(0, side - own) for side, own in zip(sides, image.shape, strict=True)]
    return Subject(
        image=np.pad(image, around, constant_values=image.min()), mask=np.pad(mask, around)
    )


def train_two_stages(
    volumes: Sequence[LabelledVolume],
    options: TwoStages,
    *,
    device: str = "cpu",
    tell: Tell = lambda _progress: None,
    keep: Keep = lambda _model: None,
) -> nn.Module:
    """Return ``conv_lstm``, trained in both stages.

    ``tell`` hears of every step; the Dice is that of the first volume, unmoved. ``keep`` gets the
    network after stage one and at each evaluation of stage two, to save its weights.
    Errors: MembenchError for numbers that will not do and a GPU too small; DivergedError.
    """
    options.check()
    subjects = [prepare(volume, options) for volume in volumes]
    with fits_the_device():
        unet = train_unet(subjects, options, device, tell)
        return train_recurrence(subjects, options, device, unet, tell, keep)


def train_unet(
    subjects: Sequence[Subject], options: TwoStages, device: str, tell: Tell
) -> dict[str, Tensor]:
    """Train stage one; return the state dict of the U-Net."""
    case = replace(
        _case(_UNET, options),
        optimizer="sgd",
        optimizer_options={"lr": options.unet_rate, "momentum": options.unet_momentum},
    )
    workload = build_workload(case, lambda _phase: None, device)
    readings = train(
        workload,
        _random_slices(subjects, options),
        steps=options.slices,
        evaluate=lambda model: (_dice_by_slice(model, subjects[0], device),),
        evaluate_every=options.evaluate_every,
    )
    for reading in readings:
        tell(Progress.of("unet", reading))
    return dict(_part(workload.model, "unet").state_dict())


def train_recurrence(
    subjects: Sequence[Subject],
    options: TwoStages,
    device: str,
    unet: dict[str, Tensor],
    tell: Tell = lambda _progress: None,
    keep: Keep = lambda _model: None,
) -> nn.Module:
    """Train stage two from the U-Net of stage one; return the recurrent network."""
    workload = recurrent_workload(options, device, unet)
    model: Any = workload.model
    keep(model)
    for reading in recurrent_steps(workload, subjects, options, device):
        tell(Progress.of("recurrence", reading))
        if reading.scores is not None:
            keep(model)
    model.freeze_unet(False)
    return workload.model


def recurrent_workload(options: TwoStages, device: str, unet: dict[str, Tensor]) -> Workload:
    """Return what stage two trains: the U-Net's weights are in, the optimizer has them all."""
    uses = (
        ()
        if options.checkpoint_every is None
        else (TechniqueUse(name="checkpoint_steps", options={"every": options.checkpoint_every}),)
    )
    case = replace(
        _case(NETWORK, options),
        techniques=uses,
        optimizer="rmsprop",
        optimizer_options={"lr": options.rate, "momentum": 0.0},
    )
    workload = build_workload(case, lambda _phase: None, device)
    _part(workload.model, "unet").load_state_dict(unet)
    return workload


def recurrent_steps(
    workload: Workload, subjects: Sequence[Subject], options: TwoStages, device: str
) -> Iterator[Reading]:
    """Yield stage two's readings; the U-Net is frozen for the first ``frozen_volumes``."""
    model: Any = workload.model
    model.freeze_unet(options.frozen_volumes > 0)
    readings = train(
        workload,
        _random_volumes(subjects, options),
        steps=options.volumes,
        evaluate=lambda model: (_dice(model, subjects[0], device),),
        evaluate_every=options.evaluate_every,
    )
    for reading in readings:
        yield reading
        if reading.step == options.frozen_volumes:
            model.freeze_unet(False)


def _case(network: str, options: TwoStages) -> Case:
    # Its own batch is not trained with, so it is the smallest that there is.
    shape = find_network(network).divisor(options.network_options)
    return Case(
        network=network,
        variant="recipe",
        requested_shape=shape,
        shape=shape,
        network_options=options.network_options,
        loss=_LOSS,
        seed=options.seed,
    )


def _part(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _random_slices(subjects: Sequence[Subject], options: TwoStages) -> Iterator[Batch]:
    generator = np.random.default_rng(options.seed)
    while True:
        subject = subjects[int(generator.integers(len(subjects)))]
        movement = random_movement(generator, options.degrees, options.voxels)
        z = int(generator.integers(subject.image.shape[2]))
        yield _tensor(movement.image(subject.image, z)), _tensor(movement.mask(subject.mask, z))


def _random_volumes(subjects: Sequence[Subject], options: TwoStages) -> Iterator[Batch]:
    generator = np.random.default_rng([options.seed, 2])  # not the movements of stage one again
    while True:
        subject = subjects[int(generator.integers(len(subjects)))]
        movement = random_movement(generator, options.degrees, options.voxels)
        yield _tensor(movement.image(subject.image)), _tensor(movement.mask(subject.mask))


def _tensor(voxels: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(voxels))[None, None]


def _dice(model: nn.Module, subject: Subject, device: str) -> float:
    found = model(_tensor(subject.image).to(device)) > 0.5
    return overlap(found.cpu(), _tensor(subject.mask) > 0.5)


def _dice_by_slice(model: nn.Module, subject: Subject, device: str) -> float:
    slices = range(subject.image.shape[2])
    found = [(model(_tensor(subject.image[..., z]).to(device)) > 0.5).cpu() for z in slices]
    return overlap(torch.stack(found, dim=-1), _tensor(subject.mask) > 0.5)
