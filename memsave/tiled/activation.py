"""A stage without a norm: its activation, or nothing, on any slab by itself."""

from __future__ import annotations

from torch import Tensor, nn

from memsave.tiled.norm_rules import NormRule

__all__ = ["SlabActivation"]


class SlabActivation:
    """What ``SlabNorm`` does where there is no norm: no pass for statistics, none for sums."""

    def __init__(self, rule: NormRule, channels: int) -> None:
        self.rule, self.channels = rule, channels

    def observe(self, x: Tensor) -> None:
        """Take nothing from a slab of the input."""

    def settle(self) -> None:
        """Do nothing: there are no statistics."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the activation of any slices of the input."""
        return self.rule.activate_(x.clone())

    def observe_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Take nothing from a slab of the result's gradient."""

    def settle_gradient(self) -> None:
        """Do nothing: there are no sums."""

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the input's gradient on any slices, from those of the input and of the result."""
        return self.rule.activation_gradient(gradient, x)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return nothing: an activation has no parameters."""
        return {}
