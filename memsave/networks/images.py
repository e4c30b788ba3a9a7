"""What every network asks of an image: its channels, its number of sides, sides that pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memsave.errors import InputError

__all__ = ["check_image"]


def check_image(
    image: Tensor, network: str, in_channels: int, divisor: Sequence[int], axes: str
) -> None:
    """Raise InputError unless ``image`` is (N, in_channels, *axes), each side divisible.

    ``divisor`` is in the order of ``axes``, such as ``"X, Y, S"``.
    """
    if image.dim() != 2 + len(divisor) or image.shape[1] != in_channels:
        raise InputError(
            f"{network} takes images of shape (N, {in_channels}, {axes}), got {tuple(image.shape)}"
        )
    if any(side % by for side, by in zip(image.shape[2:], divisor, strict=True)):
        raise InputError(
            f"{network} needs sides ({axes}) that are multiples of {tuple(divisor)}, got "
            f"{tuple(image.shape[2:])}: pad or crop the image"
        )
