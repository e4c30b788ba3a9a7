"""A few convolutions with no norm between them, on a slab with its halo, and their gradients.

The volume's last axis is never padded here: the caller brings the neighbours, or zeros past the
true ends. In-plane the convolutions pad as the layers say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight

from memsave.errors import RefusedError
from memsave.recomputing import computed_again

__all__ = ["Convolutions", "as_parameter", "check_layers"]


class Convolutions:
    """Convolutions one after the other, which keep their input's sides, for one training step.

    ``halo`` is how many slices they read on either side. Weights are cast to ``dtype`` once.

    Errors: RefusedError for a convolution that does not keep sides, and for a chain whose values
        past the volume's end would not be zeros.
    """

    def __init__(self, layers: Sequence[nn.Conv3d], dtype: torch.dtype) -> None:
        check_layers(layers)
        self.layers = layers
        self.weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.biases = [None if c.bias is None else c.bias.detach().to(dtype) for c in layers]
        self._turned: dict[int, Tensor] = {}  # weights as backward needs them
        self.halo = sum(layer.kernel_size[2] // 2 for layer in layers)
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for ``x``, which has ``halo`` slices more on either side."""
        for index in range(len(self.layers)):
            x = self._run(index, x)
        return x

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return the input's gradient from the result's, which has ``halo`` slices more."""
        for index in reversed(range(len(self.layers))):
            gradient = self._run_back(index, gradient, beyond=0)
        return gradient

    def add_weight_gradients(self, x: Tensor, gradient: Tensor) -> None:
        """Add what the slab of ``gradient`` gives to the weights' gradients, in float32.

        ``x`` has ``halo`` slices more on either side than ``gradient``.
        """
        inputs = [x]
        with computed_again():
            for index in range(len(self.layers) - 1):
                inputs.append(self._run(index, inputs[-1]))
        for index in reversed(range(len(self.layers))):
            layer, weight, source = self.layers[index], self.weights[index], inputs.pop()
            if layer.weight.requires_grad:
                of_weight = conv3d_weight(  # type: ignore[no-untyped-call]
                    source, weight.shape, gradient, padding=_padding(layer, 0), groups=layer.groups
                )
                self._add(as_parameter(layer.weight), of_weight)
            if layer.bias is not None and layer.bias.requires_grad:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._add(as_parameter(layer.bias), gradient.sum(dim=(0, 2, 3, 4), dtype=wide))
            if index > 0:  # all of the input's slices, the halo's included
                gradient = self._run_back(index, gradient, beyond=layer.kernel_size[2] - 1)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the gradients added up, each of its parameter's type."""
        found, self._gradients = self._gradients, {}  # a reference kept here would cost a copy
        self._turned = {}
        return {p: gradient.to(p.dtype) for p, gradient in found.items()}

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if parameter in self._gradients:
            self._gradients[parameter].add_(wide)
        else:
            self._gradients[parameter] = wide

    def _run(self, index: int, x: Tensor) -> Tensor:
        layer = self.layers[index]
        weight, bias = self.weights[index], self.biases[index]
        return F.conv3d(x, weight, bias, padding=_padding(layer, 0), groups=layer.groups)

    def _run_back(self, index: int, gradient: Tensor, beyond: int) -> Tensor:
        """Return a convolution's input gradient, itself a convolution with the weight turned."""
        layer = self.layers[index]
        if index not in self._turned:
            self._turned[index] = _turned(self.weights[index], layer.groups)
        weight, padding = self._turned[index], _padding(layer, beyond)
        return F.conv3d(gradient, weight, padding=padding, groups=layer.groups)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Return the weight with its sides reversed, and inputs and outputs of a group exchanged."""
    by_group = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    turned: Tensor = by_group.flatten(0, 1).flip((2, 3, 4)).contiguous()
    return turned


def _padding(layer: nn.Conv3d, last: int) -> tuple[int, int, int]:
    return (layer.kernel_size[0] // 2, layer.kernel_size[1] // 2, last)


def check_layers(layers: Sequence[nn.Conv3d]) -> None:
    """Raise RefusedError unless these convolutions can run slab by slab."""
    wide = 0
    for layer in layers:
        same = layer.padding == "same" or layer.padding == tuple(k // 2 for k in layer.kernel_size)
        odd = all(k % 2 for k in layer.kernel_size)
        moves = (*layer.stride, *layer.dilation) != (1,) * 6
        if moves or not (same and odd) or layer.padding_mode != "zeros":
            raise RefusedError(
                f"{layer} cannot run slab by slab: it must keep its input's sides, with stride 1, "
                "an odd kernel and zeros as padding"
            )
        wide += layer.kernel_size[2] > 1
        if wide > 1 or (wide and layer.kernel_size[2] > 1 and _shifted_before(layers, layer)):
            raise RefusedError(
                f"{layer} follows a convolution with a bias or a wide one with no norm between, "
                "so that values past the volume's end are not zeros: leave this level untiled"
            )


def _shifted_before(layers: Sequence[nn.Conv3d], layer: nn.Conv3d) -> bool:
    before = layers[: list(layers).index(layer)]
    return any(earlier.bias is not None for earlier in before)


def as_parameter(attribute: object) -> nn.Parameter:
    """Return a module's attribute that is a parameter as one (torch's stubs say less)."""
    assert isinstance(attribute, nn.Parameter)
    return attribute
