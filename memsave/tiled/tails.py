"""What ends a tiled level: its features, a 1-wide convolution of them, or head and loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight

from memsave.errors import InputError
from memsave.recomputing import computed_again
from memsave.tiled.convolutions import as_parameter
from memsave.tiled.losses import SummedLoss
from memsave.tiled.slabs import Read, Slabs

__all__ = ["ConvolutionTail", "LossTail", "Pointwise", "WholeTail", "check_target"]


class Pointwise:
    """A convolution of kernel 1, from ``nn.Conv3d`` or, transposed, from ``nn.ConvTranspose3d``.

    Of a transposed one only the product with the weight: its bias and stride are its reader's.
    """

    def __init__(self, layer: nn.Conv3d | nn.ConvTranspose3d, dtype: torch.dtype) -> None:
        self._transposed = isinstance(layer, nn.ConvTranspose3d)
        self.parameter = as_parameter(layer.weight)
        has_bias = layer.bias is not None and not self._transposed
        self.bias_parameter = as_parameter(layer.bias) if has_bias else None
        self.channels = layer.out_channels
        weight = layer.weight.detach().to(dtype)
        self.weight = weight.transpose(0, 1).contiguous() if self._transposed else weight
        bias = self.bias_parameter
        self.bias = None if bias is None else bias.detach().to(dtype)
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Return the result for ``z``."""
        return F.conv3d(z, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of ``z``."""
        return F.conv3d(gradient, self.weight.transpose(0, 1).contiguous())

    def add_gradients(self, z: Tensor, gradient: Tensor) -> None:
        """Add what a slab gives to the gradients of weight and bias, in float32."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        shape = self.weight.shape
        of_weight = conv3d_weight(z, shape, gradient)  # type: ignore[no-untyped-call]
        of_bias = gradient.sum(dim=(0, 2, 3, 4), dtype=wide)
        if self._of_weight is None or self._of_bias is None:
            self._of_weight, self._of_bias = of_weight.to(wide), of_bias
        else:
            self._of_weight += of_weight
            self._of_bias += of_bias

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the gradients added up, each of its parameter's type."""
        of_weight, of_bias = self._of_weight, self._of_bias
        assert of_weight is not None
        assert of_bias is not None
        self._of_weight = self._of_bias = None  # a reference kept here would cost a copy
        if self._transposed:
            of_weight = of_weight.transpose(0, 1)
        found = {self.parameter: of_weight.to(self.parameter.dtype)}
        if self.bias_parameter is not None:
            found[self.bias_parameter] = of_bias.to(self.bias_parameter.dtype)
        return found


class ConvolutionTail:
    """A 1-wide convolution whose result is whole: logits, or what the level above adds up."""

    def __init__(self, convolution: Pointwise) -> None:
        self.convolution = convolution
        self._gradient: Tensor | None = None

    def run_forward(self, read: Read, slabs: Slabs) -> Tensor:
        """Return the result, from all slabs."""
        return _gathered(lambda *slab: self.convolution.forward(read(*slab)), slabs)

    def start_backward(self, gradient: Tensor) -> None:
        """Take the result's gradient."""
        self._gradient = gradient

    def input_gradient(self, read: Read, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Return the gradient of what is read, on these slices."""
        return self.convolution.input_gradient(self._part(start, stop))

    def run_backward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Add what these slices, ``z``, give to the parameters' gradients; return z's gradient."""
        gradient = self._part(start, stop)
        self.convolution.add_gradients(z, gradient)
        return self.convolution.input_gradient(gradient)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of weight and bias."""
        return self.convolution.gradients()

    def release(self) -> None:
        """Let the result's gradient go."""
        self._gradient = None

    def _part(self, start: int, stop: int) -> Tensor:
        assert self._gradient is not None
        return self._gradient[..., start:stop].to(self.convolution.weight.dtype).contiguous()


class WholeTail:
    """The decoder's features themselves, whole, for the level above."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def run_forward(self, read: Read, slabs: Slabs) -> Tensor:
        """Return the features, from all slabs."""
        return _gathered(read, slabs)

    def start_backward(self, gradient: Tensor) -> None:
        """Take the features' gradient."""
        self._gradient = gradient

    def input_gradient(self, read: Read, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Return the gradient of these slices."""
        return self._part(start, stop)

    def run_backward(self, z: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Return z's gradient: there are no parameters."""
        return self._part(start, stop)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return nothing: there are no parameters."""
        return {}

    def release(self) -> None:
        """Let the features' gradient go."""
        self._gradient = None

    def _part(self, start: int, stop: int) -> Tensor:
        assert self._gradient is not None
        return self._gradient[..., start:stop].contiguous()


def _gathered(part_of: Read, slabs: Slabs) -> Tensor:
    """Return what ``part_of`` gives of each slab, as one tensor."""
    result: Tensor | None = None
    for start, stop in slabs:
        part = part_of(start, stop)
        if result is None:
            result = part.new_empty((*part.shape[:-1], slabs[-1][1]))
        result[..., start:stop] = part
    assert result is not None
    return result


class LossTail:
    """Head and loss: logits live for one slab at a time, in the type of the head and in float32.

    The loss is computed in float32 at least, its sums over slabs are added in float64.
    """

    def __init__(self, head: Pointwise, loss: SummedLoss, target: Tensor) -> None:
        self.head, self.loss = head, loss
        self.target: Tensor | None = target
        self._sums: Tensor | None = None
        self._weights: Tensor | None = None  # the loss's gradient by its sums

    def run_forward(self, read: Read, slabs: Slabs) -> Tensor:
        """Return the loss of all slabs."""
        total: Tensor | None = None
        for start, stop in slabs:
            sums = self.loss.sums(self._logits(read(start, stop)), self._target(start, stop))
            total = sums.double() if total is None else total + sums.double()
        assert total is not None
        self._sums = total
        wide = torch.promote_types(self.head.weight.dtype, torch.float32)
        return self.loss.finish(total).to(wide)

    def start_backward(self, gradient: Tensor) -> None:
        """Take the loss's gradient."""
        assert self._sums is not None
        with torch.enable_grad():
            sums = self._sums.detach().requires_grad_()
            (weights,) = torch.autograd.grad(self.loss.finish(sums), sums, gradient.double())
        self._weights = weights

    def input_gradient(self, read: Read, start: int, stop: int) -> Tensor:
        """Return the gradient of what is read, on these slices."""
        return self.head.input_gradient(self._logits_gradient(read(start, stop), start, stop))

    def run_backward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Add what these slices, ``z``, give to the head's gradients; return z's gradient."""
        gradient = self._logits_gradient(z, start, stop)
        self.head.add_gradients(z, gradient)
        return self.head.input_gradient(gradient)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of the head."""
        return self.head.gradients()

    def release(self) -> None:
        """Let the target go."""
        self.target = None

    def _logits(self, z: Tensor) -> Tensor:
        logits = self.head.forward(z)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _target(self, start: int, stop: int) -> Tensor:
        assert self.target is not None
        return self.target[..., start:stop].contiguous()

    def _logits_gradient(self, z: Tensor, start: int, stop: int) -> Tensor:
        assert self._weights is not None
        with computed_again():
            logits = self._logits(z)
        with torch.enable_grad():
            logits = logits.requires_grad_()
            sums = self.loss.sums(logits, self._target(start, stop))
            weights = self._weights.to(sums.dtype)
            (gradient,) = torch.autograd.grad(sums, logits, weights)
        return gradient.to(self.head.weight.dtype)


def check_target(target: Tensor, images: Tensor) -> None:
    """Raise InputError unless ``target`` holds class indices of the images' voxels."""
    expected = (images.shape[0], *images.shape[2:])
    if tuple(target.shape) != expected or target.is_floating_point():
        raise InputError(
            f"the target must be class indices of shape {expected}, got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
