"""The full-volume convolutional LSTM: a 2D U-Net inside a recurrent cell that walks over slices.

Source: van de Leemput, Patel, Manniesing, "Full Volumetric Brain Tissue Segmentation in
Non-Contrast CT using Memory Efficient Convolutional LSTMs", NIPS 2018 workshop. Per slice z, with
* a 3x3 convolution: u = unet(x_z); i, f, o = sigmoid(u_k + h*W_k + b_k);
g = tanh(u_g + h*W_g + b_g); c = f.c + i.g; h = o.tanh(c), from h = c = 0. As h lies in (-1, 1),
the probability is p = (h + 1) / 2. The paper trains the U-Net alone first: our choice for what it
trains there is p = (tanh(u_g) + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from memsave.checkpoint import checkpoint_steps
from memsave.checkpoint_nested import check_segment, checkpoint_nested_steps
from memsave.errors import OptionError
from memsave.networks.images import check_image
from memsave.networks.unet_2d import UNet2D
from memsave.widths import positive, resolve_widths

__all__ = ["ConvLSTM", "ConvLSTMUNet", "State", "conv_lstm_divisor", "conv_lstm_unet_divisor"]

GATES = 4  # i, f, o, g, in this order along the channels
LEVELS = 5

State = tuple[Tensor, Tensor]  # h and c, each (N, hidden_size, X, Y)


class ConvLSTM(nn.Module):
    """Recurrent segmentation of a volume, slice by slice; probabilities out.

    Shapes: ``(N, in_channels, X, Y, S)`` to ``(N, hidden_size, X, Y, S)``; X and Y multiples of
    ``2 ** (levels - 1)``, 16 with the five levels of the paper; any number of slices S.
    Parameters: 31,389,804; 31,044,524 with ``upsampling="nearest_conv"``. 40 of them are trained
    while the U-Net is frozen.
    Memory: training keeps the activations of every slice; after ``checkpoint_every(k)``, of k
    slices at a time, and one state, two maps, for every k slices besides. Prediction without
    gradients keeps one slice's, the state and the result. Gates, state and result have the
    volume's type, so float32 under autocast.
    Errors: UnknownNameError and OptionError for options, InputError for a volume's shape.

    Args:
        in_channels: channels of the volume.
        hidden_size: channels of the state and so of the result.
        widths: a rule of ``memsave.widths`` or the channels of each U-Net level, finest first.
        base_width: channels of the finest level for a rule, 64 unless told.
        levels: U-Net levels for a rule, 5 unless told.
        norm: norm and activation of the U-Net: ``"batch_norm"`` or ``"inplace_abn"``.
        upsampling: ``"nearest"`` or ``"nearest_conv"``, see ``UNet2D``.
        frozen_unet: as if ``freeze_unet()`` had been called.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_size: int = 1,
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
        norm: str = "batch_norm",
        upsampling: str = "nearest",
        frozen_unet: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        self.hidden_size = positive("hidden_size", hidden_size)
        self.widths = _widths(widths, base_width, levels)
        gates = GATES * hidden_size
        self.unet = UNet2D(in_channels, gates, self.widths, norm, upsampling)
        self.hidden_to_gates = nn.Conv2d(hidden_size, gates, 3, padding=1)
        self.steps_per_checkpoint: int | None = None  # None: nothing is recomputed
        self.checkpoints_nested = False
        self.checkpoint_segment: int | None = None  # steps, where nested
        if not isinstance(frozen_unet, bool):
            raise OptionError(f"frozen_unet must be true or false, got {frozen_unet!r}")
        self.freeze_unet(frozen_unet)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side of the volume must be a multiple of: x, y, slices."""
        return (*_pooled_sides(self.widths), 1)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the U-Net's blocks, in the order in which each slice runs them."""
        return tuple(f"unet.{name}" for name in _unet_blocks(self.widths))

    def checkpoint_every(
        self, steps: int | None, nested: bool = False, segment: int | None = None
    ) -> None:
        """Keep one state for every so many steps and recompute them in backward; None: keep all.

        ``nested``: keep the states of one segment of steps at a time, which backward runs again.
        Exact: see ``memsave.checkpoint_steps`` and ``checkpoint_nested_steps``, which do it.
        """
        every = None if steps is None else positive("every", steps)
        if nested and every is not None:
            check_segment(segment, every)
        self.steps_per_checkpoint = every
        self.checkpoints_nested = nested
        self.checkpoint_segment = segment

    def freeze_unet(self, frozen: bool = True) -> Self:
        """Train the recurrence alone, the U-Net's norms in evaluation; or all again.

        A frozen U-Net keeps nothing for backward. The paper freezes it for its first 1000 volumes.
        """
        self.unet.requires_grad_(not frozen)
        self.unet_is_frozen = frozen
        self.unet.train(self.training and not frozen)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but of a frozen U-Net."""
        super().train(mode)
        self.unet.train(mode and not self.unet_is_frozen)
        return self

    def first_state(self, volume: Tensor) -> State:
        """Return the state before the first slice: h = c = 0, of the volume's type."""
        batch_size, _, x, y, _ = volume.shape
        zeros = volume.new_zeros
        shape = (batch_size, self.hidden_size, x, y)
        return zeros(shape), zeros(shape)

    def step(self, state: State, image: Tensor) -> tuple[State, Tensor]:
        """Read one slice ``(N, in_channels, X, Y)``; return the next state, and its h."""
        h, c = state
        gates = (self.unet(image) + self.hidden_to_gates(h)).to(h.dtype)  # half under autocast
        i, f, o = gates[:, : -self.hidden_size].sigmoid().chunk(3, dim=1)
        g = gates[:, -self.hidden_size :].tanh()
        c = f * c + i * g
        h = o * c.tanh()
        return (h, c), h

    def forward(self, volume: Tensor) -> Tensor:
        """Return the probabilities of ``volume``, (h + 1) / 2 of every slice."""
        check_image(volume, "ConvLSTM", self.in_channels, self.divisor, "X, Y, S")
        h = self._walk(volume) if torch.is_grad_enabled() else self._walk_without_graph(volume)
        return h.add_(1).div_(2)

    def _walk(self, volume: Tensor) -> Tensor:
        """Return h of all slices, stacked."""
        state = self.first_state(volume)
        if self.steps_per_checkpoint is not None:
            run = self._checkpointed(self.steps_per_checkpoint)
            return torch.stack(run(state, volume.unbind(-1))[1], dim=-1)
        outputs = []
        for image in volume.unbind(-1):
            state, h = self.step(state, image)
            outputs.append(h)
        return torch.stack(outputs, dim=-1)

    def _checkpointed(
        self, every: int
    ) -> Callable[[State, Iterable[Tensor]], tuple[State, list[Tensor]]]:
        if self.checkpoints_nested:
            return checkpoint_nested_steps(self.step, every, self.checkpoint_segment)
        return checkpoint_steps(self.step, every)

    def _walk_without_graph(self, volume: Tensor) -> Tensor:
        """Return the same, each slice written where it belongs: a stack would need h twice."""
        state = self.first_state(volume)
        result = volume.new_empty((*state[0].shape, volume.shape[-1]))
        for z, image in enumerate(volume.unbind(-1)):
            state, h = self.step(state, image)
            result[..., z] = h
        return result


class ConvLSTMUNet(nn.Module):
    """The U-Net of ``ConvLSTM`` alone, as the paper trains it first; probabilities out.

    Shapes: slices ``(N, in_channels, X, Y)`` to ``(N, hidden_size, X, Y)``.
    Its U-Net has all four gate maps, of which (tanh(u_g) + 1) / 2 is trained, so its weights load
    into the recurrent network: ``conv_lstm.unet.load_state_dict(this.unet.state_dict())``.
    Arguments, Errors: as ``ConvLSTM``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_size: int = 1,
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
        norm: str = "batch_norm",
        upsampling: str = "nearest",
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        self.hidden_size = positive("hidden_size", hidden_size)
        self.widths = _widths(widths, base_width, levels)
        self.unet = UNet2D(in_channels, GATES * hidden_size, self.widths, norm, upsampling)

    @property
    def divisor(self) -> tuple[int, int]:
        """What each side of a slice must be a multiple of."""
        return _pooled_sides(self.widths)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the U-Net's blocks, in the order in which they run."""
        return tuple(f"unet.{name}" for name in _unet_blocks(self.widths))

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities of the slices ``image``."""
        check_image(image, "ConvLSTMUNet", self.in_channels, self.divisor, "X, Y")
        maps: Tensor = self.unet(image)
        u_g = maps[:, -self.hidden_size :].to(image.dtype)  # half has no probability near 1
        return u_g.tanh().add(1).div(2)


def conv_lstm_divisor(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what x, y and slices must be multiples of with these options, building nothing."""
    return (*conv_lstm_unet_divisor(options), 1)


def conv_lstm_unet_divisor(options: Mapping[str, Any]) -> tuple[int, int]:
    """Return what x and y must be multiples of with these options, building nothing."""
    widths = _widths(
        options.get("widths", "doubling"), options.get("base_width"), options.get("levels")
    )
    return _pooled_sides(widths)


def _widths(
    widths: str | Sequence[int], base_width: int | None, levels: int | None
) -> tuple[int, ...]:
    if levels is None and isinstance(widths, str):
        levels = LEVELS
    return resolve_widths(widths, base_width, levels)


def _pooled_sides(widths: Sequence[int]) -> tuple[int, int]:
    return (2 ** (len(widths) - 1),) * 2


def _unet_blocks(widths: Sequence[int]) -> tuple[str, ...]:
    encoder = (f"encoder.{i}" for i in range(len(widths)))
    return (*encoder, *(f"decoder.{i}" for i in range(len(widths) - 1)))
