"""How a level's decoder begins: the features that come up from below, and the skip beside them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight

from memsave.errors import RefusedError
from memsave.recomputing import computed_again
from memsave.tiled.convolutions import as_parameter
from memsave.tiled.slabs import Slabs

__all__ = ["Join", "JoinOrder", "PointwiseJoin", "UpsamplingJoin", "check_upsampling", "make_join"]

JoinOrder = Literal["sum", "skip_first", "upsampled_first"]
"""Skip and upsampled features added, or one behind the other along the channels."""


class Join(Protocol):
    """Skip and upsampled features, slab by slab, in one training step on one level."""

    parameters: list[nn.Parameter]

    def start(self, low: Tensor) -> None:
        """Take the features of the level below, whole."""
        ...

    def joined(self, skip: Tensor, start: int, stop: int) -> Tensor:
        """Return what the decoder reads on these slices; ``skip`` may be overwritten."""
        ...

    def start_backward(self) -> None:
        """Make room for the gradient of the features below."""
        ...

    def add_gradients(self, gradient: Tensor, start: int, stop: int) -> None:
        """Take one slab of the gradient of what the decoder read."""
        ...

    def skip_gradient(self, gradient: Tensor) -> Tensor:
        """Return the skip's part of that gradient, on any slices."""
        ...

    def finish(self) -> Tensor:
        """Hand over the gradient of the features below, whole."""
        ...

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the gradients of ``parameters``."""
        ...

    def release(self) -> None:
        """Let the features below go."""
        ...


class PointwiseJoin:
    """A transposed convolution of kernel 1 and stride 2, added to the skip.

    Its product with the weight is taken below, at an eighth of the voxels: what comes up is added
    at every eighth voxel, the bias everywhere, and no upsampled features are ever made.
    """

    def __init__(self, up: nn.ConvTranspose3d, dtype: torch.dtype) -> None:
        self.parameters = [] if up.bias is None else [as_parameter(up.bias)]
        self._bias = None if up.bias is None else up.bias.detach().to(dtype).view(1, -1, 1, 1, 1)
        self._low: Tensor | None = None
        self._of_low: Tensor | None = None
        self._of_bias: Tensor | None = None

    def start(self, low: Tensor) -> None:
        """Take the features of the level below, multiplied with the weight."""
        self._low = low

    def joined(self, skip: Tensor, start: int, stop: int) -> Tensor:
        """Return the sum, written over ``skip``."""
        assert self._low is not None
        if self._bias is not None:
            skip.add_(self._bias)
        low = self._low[..., (start + 1) // 2 : (stop + 1) // 2]
        skip[:, :, ::2, ::2, start % 2 :: 2].add_(low)
        return skip

    def start_backward(self) -> None:
        """Make room for the gradient of the features below."""
        assert self._low is not None
        self._of_low = torch.empty_like(self._low)

    def add_gradients(self, gradient: Tensor, start: int, stop: int) -> None:
        """Take one slab of the sum's gradient."""
        assert self._of_low is not None
        self._of_low[..., start // 2 : stop // 2] = gradient[:, :, ::2, ::2, ::2]
        if self._bias is not None:
            self._of_bias = _sum_into(self._of_bias, gradient)

    def skip_gradient(self, gradient: Tensor) -> Tensor:
        """Return the sum's gradient, which is the skip's."""
        return gradient

    def finish(self) -> Tensor:
        """Hand over the gradient of the features below, whole."""
        found, self._of_low = self._of_low, None
        assert found is not None
        return found

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the gradient of the bias."""
        found, self._of_bias = self._of_bias, None
        return {} if found is None else {p: found.to(p.dtype) for p in self.parameters}

    def release(self) -> None:
        """Let the features below go."""
        self._low = None


class UpsamplingJoin:
    """A transposed convolution no wider than its stride, added to the skip or put beside it.

    Each voxel that comes up is of one voxel below, so a slab needs no halo.
    """

    def __init__(
        self, up: nn.ConvTranspose3d, order: JoinOrder, slabs: Slabs, dtype: torch.dtype
    ) -> None:
        self.up, self.order, self._slices = up, order, slabs[-1][1]
        self.parameters = [as_parameter(p) for p in (up.weight, up.bias) if p is not None]
        self._weight = up.weight.detach().to(dtype)
        self._bias = None if up.bias is None else up.bias.detach().to(dtype)
        self._low: Tensor | None = None
        self._of_low: Tensor | None = None
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None
        self._was_computed = False

    def start(self, low: Tensor) -> None:
        """Take the features of the level below, whole."""
        self._low = low

    def joined(self, skip: Tensor, start: int, stop: int) -> Tensor:
        """Return the sum, written over ``skip``, or both along the channels."""
        up, first = self.up, start // 2
        with computed_again() if self._was_computed else nullcontext():
            whole = F.conv_transpose3d(
                self._part(first, (stop + 1) // 2), self._weight, self._bias,
                stride=up.stride, output_padding=up.output_padding, groups=up.groups,
            )  # fmt: skip
        self._was_computed = self._was_computed or stop == self._slices
        upsampled = whole.narrow(-1, start - 2 * first, stop - start)
        if self.order == "sum":
            return skip.add_(upsampled)
        both = (skip, upsampled) if self.order == "skip_first" else (upsampled, skip)
        return torch.cat(both, dim=1)

    def start_backward(self) -> None:
        """Make room for the gradient of the features below."""
        assert self._low is not None
        self._of_low = torch.empty_like(self._low)

    def add_gradients(self, gradient: Tensor, start: int, stop: int) -> None:
        """Take one slab of the gradient of what the decoder read."""
        assert self._of_low is not None
        up, d_up = self.up, self._halves(gradient)[1]
        here = (start // 2, stop // 2)
        self._of_low[..., slice(*here)] = F.conv3d(
            d_up, self._weight, stride=up.stride, groups=up.groups
        )
        if up.weight.requires_grad:
            of_weight = conv3d_weight(  # type: ignore[no-untyped-call]
                d_up, self._weight.shape, self._part(*here), stride=up.stride, groups=up.groups
            )
            wide = of_weight.to(torch.promote_types(of_weight.dtype, torch.float32))
            self._of_weight = wide if self._of_weight is None else self._of_weight.add_(wide)
        if up.bias is not None and up.bias.requires_grad:
            self._of_bias = _sum_into(self._of_bias, d_up)

    def skip_gradient(self, gradient: Tensor) -> Tensor:
        """Return the skip's part of the gradient, contiguous."""
        return self._halves(gradient)[0].contiguous()

    def finish(self) -> Tensor:
        """Hand over the gradient of the features below, whole."""
        found, self._of_low = self._of_low, None
        assert found is not None
        return found

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the gradients of weight and bias."""
        found = zip(self.parameters, (self._of_weight, self._of_bias), strict=False)
        gradients = {p: g.to(p.dtype) for p, g in found if g is not None}
        self._of_weight = self._of_bias = None  # a reference kept here would cost a copy
        return gradients

    def release(self) -> None:
        """Let the features below go."""
        self._low = None

    def _part(self, first: int, last: int) -> Tensor:
        assert self._low is not None
        return self._low[..., first:last].to(self._weight.dtype).contiguous()

    def _halves(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the skip's part and the upsampled features'."""
        if self.order == "sum":
            return gradient, gradient
        of_up, of_skip = self.up.out_channels, gradient.shape[1] - self.up.out_channels
        if self.order == "skip_first":
            skip, upsampled = torch.split(gradient, [of_skip, of_up], dim=1)
        else:
            upsampled, skip = torch.split(gradient, [of_up, of_skip], dim=1)
        return skip, upsampled.contiguous()


def make_join(up: nn.ConvTranspose3d, order: JoinOrder, slabs: Slabs, dtype: torch.dtype) -> Join:
    """Return the join of a level whose features come up through ``up``."""
    if is_pointwise(up, order):
        return PointwiseJoin(up, dtype)
    return UpsamplingJoin(up, order, slabs, dtype)


def is_pointwise(up: nn.ConvTranspose3d, order: JoinOrder) -> bool:
    """Whether ``PointwiseJoin`` can do it."""
    kernel, stride = tuple(up.kernel_size), tuple(up.stride)
    return order == "sum" and kernel == (1, 1, 1) and stride == (2, 2, 2) and up.groups == 1


def check_upsampling(up: nn.Module, pool: nn.Module) -> None:
    """Raise RefusedError unless ``up`` undoes ``pool``, each voxel coming from one below."""
    if not isinstance(pool, nn.MaxPool3d):
        raise RefusedError(f"{pool} cannot run slab by slab: levels are joined by nn.MaxPool3d")
    kernel, stride = _three(pool.kernel_size), _three(pool.stride or pool.kernel_size)
    plain = _three(pool.padding) == (0, 0, 0) and _three(pool.dilation) == (1, 1, 1)
    if kernel != stride or kernel[2] != 2 or not plain or pool.ceil_mode or pool.return_indices:
        raise RefusedError(
            f"{pool} cannot run slab by slab: its stride must be its kernel, 2 along the last axis"
        )
    if not isinstance(up, nn.ConvTranspose3d):
        raise RefusedError(
            f"{type(up).__name__} cannot run slab by slab: features come up by nn.ConvTranspose3d"
        )
    sizes = zip(up.kernel_size, up.output_padding, up.stride, strict=True)
    plain = up.padding == (0, 0, 0) and up.dilation == (1, 1, 1)
    if tuple(up.stride) != kernel or not plain or any(k + more != s for k, more, s in sizes):
        raise RefusedError(
            f"{up} cannot run slab by slab: it must undo the pooling of {kernel}, with the same "
            "stride and a kernel no wider, so that each voxel comes from one below"
        )


def _three(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size,) * 3 if isinstance(size, int) else tuple(size)


def _sum_into(before: Tensor | None, gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    found = gradient.sum(dim=(0, 2, 3, 4), dtype=wide)
    return found if before is None else before.add_(found)
