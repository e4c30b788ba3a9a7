"""Norm and activation of a volume that is only ever seen slab by slab, both ways.

A norm is local but for a few numbers a channel: the mean and variance of its input in forward, the
means of dy and of dy * xhat in backward. Both are sums over the volume, so a first pass over the
slabs adds them up, in float64, and a second one applies them to each slab by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from memsave.tiled.norm_rules import NormRule

__all__ = ["SlabNorm"]

# Arithmetic in float32 works on some channels at a time: a temporary holds 32 MiB, or a quarter of
# the slab's channels where that is more, so that large slabs do not come in very many parts.
_PART_ELEMENTS = 2**23
_PARTS = 4


class SlabNorm:
    """One norm and activation in one training step: statistics first, then any slab.

    The order of use: ``observe`` each slab of the input once, ``settle``, ``apply`` to any slices;
    in backward ``observe_gradient`` each slab once, ``settle_gradient``, ``gradient``.

    Memory: a few numbers a channel. While a slab is worked on, temporaries of a few channels
        beside the result, and one or two slabs in the input's own type.
    Exact: mean and variance are merged from the slabs' (Chan et al.) in float64.
    """

    def __init__(self, rule: NormRule, samples: int, channels: int, dtype: torch.dtype) -> None:
        self.rule, self.samples, self.channels = rule, samples, channels
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._count = 0  # values a sample and channel
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._of_dy: Tensor | float = 0.0
        self._of_dy_xhat: Tensor | float = 0.0
        self._observed_gradient = 0

    # -- forward ----------------------------------------------------------------------------

    def observe(self, x: Tensor) -> None:
        """Add a slab of the input, without halo, to the statistics."""
        flat = self._flat(x)
        if self.rule.activation_first:
            flat = self.rule.activate_(flat.clone())
        values = flat[0, 0].numel()
        variance, mean = (torch.cat(parts) for parts in zip(*_moments(flat), strict=True))
        mean, squares = mean.double(), variance.double() * values
        count = self._count + values
        shift = mean - self._mean
        self._squares = self._squares + squares + shift.square() * (self._count * values / count)
        self._mean = self._mean + shift * (values / count)
        self._count = count

    def settle(self) -> None:
        """Make mean and variance of what was observed; update running statistics, once."""
        norm = self.rule.norm
        if self.rule.uses_running_statistics():
            assert norm is not None
            assert isinstance(norm.running_mean, Tensor)
            assert isinstance(norm.running_var, Tensor)
            mean, variance = self._repeat(norm.running_mean), self._repeat(norm.running_var)
        else:
            of_channel = torch.as_tensor(self._mean)
            mean = self._pooled(of_channel)
            spread = torch.as_tensor(self._squares) / self._count + (of_channel - mean).square()
            variance = self._pooled(spread)
            self._update_running(mean, variance)
        self.mean, self.variance = mean.to(self._dtype), variance.to(self._dtype)
        self.rstd = (self.variance + self.rule.eps).rsqrt()
        self.scale, self.shift = self._scale_and_shift()

    def apply(self, x: Tensor) -> Tensor:
        """Return norm and activation of any slices of the input."""
        flat = self._flat(x)
        if self.rule.activation_first:
            return self._affine(self.rule.activate_(flat.clone())).view(x.shape)
        return self.rule.activate_(self._affine(flat)).view(x.shape)

    # -- backward ---------------------------------------------------------------------------

    def observe_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Add a slab, without halo, to the sums: of the input and of the result's gradient."""
        source, dy = self._before_affine(x, gradient)
        ones, none = torch.ones_like(self.mean), self.mean.new_empty(0)
        _, of_dy_xhat, of_dy = torch.ops.aten.native_batch_norm_backward(
            dy, source, ones, self.mean, self.variance, none, none, False, self.rule.eps,
            [False, True, True],  # CUDA takes empty statistics of a batch, but not their lack
        )  # fmt: skip
        self._of_dy = self._of_dy + of_dy.double()
        self._of_dy_xhat = self._of_dy_xhat + of_dy_xhat.double()
        self._observed_gradient += source[0, 0].numel()

    def settle_gradient(self) -> None:
        """Make what ``gradient`` needs, and the parameters' gradients, of the sums."""
        of_dy, of_dy_xhat = torch.as_tensor(self._of_dy), torch.as_tensor(self._of_dy_xhat)
        scale, rstd = self.scale.double(), self.rstd.double()
        self._gain = (scale * rstd).to(self._dtype)
        if self.rule.uses_running_statistics():
            self._slope = self._offset = torch.zeros_like(self._gain)
            return
        mean_dy = self._pooled(scale * of_dy / self._observed_gradient)
        mean_dy_xhat = self._pooled(scale * of_dy_xhat / self._observed_gradient)
        self._offset = (-rstd * mean_dy).to(self._dtype)
        self._slope = (-rstd.square() * mean_dy_xhat).to(self._dtype)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the input's gradient on any slices, from those of the input and of the result."""
        source, dy = self._before_affine(x, gradient)
        result = torch.empty_like(source)
        for some in _parts(source):
            part = source[:, some] - _wide(self.mean[some])
            torch.addcmul(_wide(self._offset[some]), part, _wide(self._slope[some]), out=part)
            torch.addcmul(part, dy[:, some], _wide(self._gain[some]), out=result[:, some])
        if self.rule.activation_first:
            result = self.rule.activation_gradient(result, self._flat(x))
        return result.view(x.shape)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of weight and bias, once ``settle_gradient`` was called."""
        found = {}
        weight, bias = self.rule.weight, self.rule.bias
        if weight is not None and weight.requires_grad:
            of_weight = self._by_channel(torch.as_tensor(self._of_dy_xhat))
            if self.rule.in_place:
                of_weight = torch.where(weight < 0, -of_weight, of_weight)
            found[weight] = of_weight.to(weight.dtype)
        if bias is not None and bias.requires_grad:
            found[bias] = self._by_channel(torch.as_tensor(self._of_dy)).to(bias.dtype)
        return found

    # -- pieces -----------------------------------------------------------------------------

    def _flat(self, x: Tensor) -> Tensor:
        """Return a view with samples and channels in one dimension: (1, N * C, *)."""
        return x.contiguous().view(1, -1, *x.shape[2:])

    def _affine(self, flat: Tensor) -> Tensor:
        result: Tensor = torch.native_batch_norm(
            flat, self.scale, self.shift, self.mean, self.variance, False, 0.0, self.rule.eps
        )[0]
        return result

    def _before_affine(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the norm itself read, and the gradient of what it gave; both flat."""
        flat, dz = self._flat(x), self._flat(gradient)
        if self.rule.activation_first:
            return self.rule.activate_(flat.clone()), dz
        if self.rule.activation == "identity":
            return flat, dz
        return flat, self.rule.activation_gradient(dz, self._affine(flat))

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.rule.weight, self.rule.bias
        ones = self.mean.new_ones(self.channels)
        scale = ones if weight is None else weight.detach().to(self._dtype)
        if self.rule.in_place and weight is not None:
            scale = scale.abs() + self.rule.eps
        shift = torch.zeros_like(ones) if bias is None else bias.detach().to(self._dtype)
        return self._repeat(scale), self._repeat(shift)

    def _repeat(self, of_channel: Tensor) -> Tensor:
        return of_channel.repeat(self.samples)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.view(self.samples, self.channels).sum(0)

    def _pooled(self, values: Tensor) -> Tensor:
        """Return, for each sample and channel, the mean over those that share its statistics."""
        if self.rule.groups is None:
            shared = values.view(self.samples, self.channels).mean(0, keepdim=True)
            return shared.expand(self.samples, -1).reshape(-1)
        shared = values.view(self.samples, self.rule.groups, -1)
        return shared.mean(2, keepdim=True).expand_as(shared).reshape(-1)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.rule.norm
        running_mean = getattr(norm, "running_mean", None)
        if norm is None or self.rule.groups is not None or running_mean is None:
            return
        if not norm.training:
            return
        assert isinstance(norm.running_var, Tensor)
        assert isinstance(norm.num_batches_tracked, Tensor)
        norm.num_batches_tracked.add_(1)
        momentum: float | None = getattr(norm, "momentum", None)
        share = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
        values = self._count * self.samples
        unbiased = variance[: self.channels] * (values / max(1, values - 1))
        running_mean.lerp_(mean[: self.channels].to(running_mean.dtype), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


def _parts(flat: Tensor) -> Iterator[slice]:
    """Give a few channels at a time, so that a wide temporary of theirs stays small."""
    channels = flat.shape[1]
    step = max(1, _PART_ELEMENTS // max(1, flat[0, 0].numel()), -(-channels // _PARTS))
    return (slice(first, first + step) for first in range(0, channels, step))


def _moments(flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for some in _parts(flat):
        part = flat[0, some].flatten(1)
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        yield torch.var_mean(wide, dim=1, correction=0)


def _wide(of_channel: Tensor) -> Tensor:
    return of_channel.view(1, -1, 1, 1, 1)
