"""What the table of networks says of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

__all__ = ["NetworkSpec", "Target"]

Target = Literal["classes", "mask"]


def _as_written(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A network as a suite file names it.

    ``factory`` takes the options as keywords. ``divisor(options)`` says, building nothing, what
    each side must be a multiple of. Shapes and divisors are in the order x, y, slices;
    ``input_sides(shape)`` puts a shape's sides in the order in which the network takes them.
    The network's output has the sides of its input.

    ``target`` says what the network is trained towards: ``"classes"``, int64 class indices, its
    output being logits, one channel a class; or ``"mask"``, floating-point 0 and 1 of its output's
    shape, the output being probabilities.
    """

    name: str
    factory: Callable[..., nn.Module]
    spatial_dims: int
    divisor: Callable[[Mapping[str, Any]], tuple[int, ...]]
    in_channels: int  # unless an option says otherwise
    classes: int  # channels of the output, unless an option says otherwise
    summary: str
    source: str
    loss: str  # the paper's, by its name in membench
    target: Target = "classes"
    classes_option: str = "classes"  # the option that says otherwise
    input_sides: Callable[[Sequence[int]], tuple[int, ...]] = _as_written

    def output_channels(self, options: Mapping[str, Any]) -> int:
        """Return how many channels the output has with these options."""
        return int(options.get(self.classes_option, self.classes))

    def image_shape(
        self, options: Mapping[str, Any], batch_size: int, shape: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the shape of a batch of images whose sides are ``shape`` (x, y, slices)."""
        channels = int(options.get("in_channels", self.in_channels))
        return (batch_size, channels, *self.input_sides(shape))

    def target_shape(
        self, options: Mapping[str, Any], batch_size: int, shape: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the shape of that batch's target: without channels for class indices."""
        channels = (self.output_channels(options),) if self.target == "mask" else ()
        return (batch_size, *channels, *self.input_sides(shape))
