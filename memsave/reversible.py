"""Reversible blocks: a chain frees every block's input and rebuilds it from the last result.

Freed is what the chain alone holds, as soon as the next block has run; the caller's tensor is never
touched, and goes when the caller lets it go. Additive coupling on halves of the channels:
``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``, hence ``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``.

Source: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", NIPS 2017, arXiv:1707.04585;
in 3D U-Nets Brugger, Baumgartner, Konukoglu, MICCAI 2019, arXiv:1906.06148. Ours adds random state,
autocast and running statistics as the forward had them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from memsave.checkpoint import _statistics_untouched
from memsave.convolution import convolution
from memsave.errors import InputError, OptionError
from memsave.recomputing import computed_again
from memsave.widths import positive

__all__ = ["ReversibleBlock", "ReversibleSequence", "reversible_conv_block"]

Halves: TypeAlias = tuple[Tensor, Tensor]


class ReversibleBlock(nn.Module):
    """Additive coupling of two modules, ``f`` and ``g``, each from half the channels to as many.

    Shapes: ``(N, C, *)`` to the same; C even.
    Memory: by itself that of ``f`` and ``g`` under autograd; nothing in a ``ReversibleSequence``.
    Exact: ``inverse(block(x))`` is x within two roundings of each sum.
    Errors: InputError for an odd number of channels, where ``f`` or ``g`` change the shape, and
        where one overwrites its own input, which the other half of the coupling reads.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        """Return y, of the shape and type of ``x``."""
        x1, x2 = _halves(x)
        y1 = x1 + _call(self.f, x2, "f")
        return torch.cat((y1, x2 + _call(self.g, y1, "g")), 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x whose result is ``y``."""
        y1, y2 = _halves(y)
        x2 = y2 - _call(self.g, y1, "g")
        return torch.cat((y1 - _call(self.f, x2, "f"), x2), 1)


class ReversibleSequence(nn.ModuleList):
    """Blocks one after the other, of which backward needs nothing but the last result.

    Shapes: ``(N, C, *)`` to the same; C even.
    Memory: keeps its result, ``y.nbytes``, which the next layer most often keeps too, however many
        blocks there are; of a block's insides those of one ``f`` or ``g`` live at a time, in
        backward beside the halves and their gradients, four times ``y.nbytes / 2``, and the result.
        Gradients of all its parameters are handed over together at its end. On the host 5 KB for
        each ``f`` and ``g``, the state of the generators.
    Exact: the plain chain's gradients but for what rebuilding rounds: in the sums of each block
        one unit of the values' type, which blocks amplify as they go back. Dropout draws the same
        masks; autocast is as it was; running statistics are updated once.
    Errors: as ``ReversibleBlock``; OptionError for modules that are no ``ReversibleBlock``.
        RuntimeError from autograd if the result is overwritten before backward, and for a double
        backward. Nothing is freed that autograd does not see: not the caller's own ``x``.
    """

    def __init__(self, blocks: Iterable[ReversibleBlock]) -> None:
        super().__init__()
        for block in blocks:
            if not isinstance(block, ReversibleBlock):
                raise OptionError(
                    f"a ReversibleSequence takes ReversibleBlocks, got {type(block).__name__}: "
                    "wrap two modules that keep the shape of half the channels in one"
                )
            self.append(block)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of the last block."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (x.requires_grad or parameters) or not len(self):
            for block in self:
                x = block(x)
            return x
        y: Tensor = _Chain.apply(x, self, *parameters)  # type: ignore[no-untyped-call]
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x whose result is ``y``."""
        for block in reversed(list(self)):
            assert isinstance(block, ReversibleBlock)
            y = block.inverse(y)
        return y


def reversible_conv_block(
    channels: int, groups: int = 1, convolutions: int = 1, spatial_dims: int = 3
) -> ReversibleBlock:
    """Return a block whose ``f`` and ``g`` are 3-wide convolutions, group norms and leaky ReLUs.

    Args:
        channels: of the block's input; each half has half of them.
        groups: of the norms of each half.
        convolutions: how many of them ``f`` and ``g`` have each.
        spatial_dims: 1, 2 or 3.
    """
    if positive("channels", channels) % 2:
        raise OptionError(f"a reversible block splits its channels in two, got {channels}")
    half = channels // 2
    if half % positive("groups", groups):
        raise OptionError(f"groups must divide the {half} channels of a half, got {groups}")
    positive("convolutions", convolutions)
    f, g = (_layers(half, groups, convolutions, spatial_dims) for _ in range(2))
    return ReversibleBlock(f, g)


def _layers(channels: int, groups: int, convolutions: int, spatial_dims: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [
            convolution(channels, channels, 3, spatial_dims=spatial_dims),
            nn.GroupNorm(groups, channels),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a function's recomputation must find as its forward did."""

    cpu_state: Tensor
    devices: list[int]
    device_states: list[Tensor]
    autocast: tuple[str, bool, torch.dtype]

    @classmethod
    def now(cls, x: Tensor) -> _Surroundings:
        devices: list[int] = []
        states: list[Tensor] = []
        if x.is_cuda and torch.cuda._initialized:  # not under the prediction's tracer
            devices, states = get_device_states(x)
        kind = x.device.type
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return cls(torch.get_rng_state(), devices, states, autocast)

    def again(self, function: Callable[[], Tensor]) -> Tensor:
        kind, enabled, dtype = self.autocast
        with (
            torch.random.fork_rng(self.devices),
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False),
            computed_again(),
        ):
            torch.set_rng_state(self.cpu_state)
            if self.devices:
                set_device_states(self.devices, self.device_states)
            return function()


class _Chain(torch.autograd.Function):
    # Kept for backward: the last result. Not kept: x, and the results in between.
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: ReversibleSequence, *parameters: Tensor) -> Tensor:
        ctx.steps = []
        a, b = _halves(x.detach())  # hooks on modules would look for x's node here
        for block in chain:  # a and b change places: a + f(b), then b + g of that
            for name in ("f", "g"):
                function = block.get_submodule(name)
                ctx.steps.append((function, name, _Surroundings.now(x)))
                a, b = b, a + _call(function, b, name)
        y = torch.cat((a, b), 1)
        ctx.save_for_backward(y)
        ctx.chain, ctx.parameters = chain, parameters
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        sums: dict[int, Tensor] = {}
        (a, b), (da, db) = _halves(y), _halves(dy)
        with _statistics_untouched([ctx.chain]):
            for function, name, surroundings in reversed(ctx.steps):
                trained = [p for p in function.parameters() if p.requires_grad]
                leaf, result = _rerun(function, name, a, surroundings)
                a, b = (b - result.detach()), a
                inputs = (leaf, *trained)
                grads: Any = torch.autograd.grad(result, inputs, db, allow_unused=True)
                for parameter, grad in zip(trained, grads[1:], strict=True):
                    if grad is not None:
                        before = sums.get(id(parameter))
                        sums[id(parameter)] = grad if before is None else before + grad
                da, db = db, da if grads[0] is None else da + grads[0]
                del leaf, result, inputs, grads
        dx = torch.cat((da, db), 1) if ctx.needs_input_grad[0] else None
        return dx, None, *(sums.get(id(p)) for p in ctx.parameters)


def _rerun(
    function: nn.Module, name: str, x: Tensor, surroundings: _Surroundings
) -> tuple[Tensor, Tensor]:
    """Return ``x`` as a leaf, and the function's result with its graph."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, surroundings.again(lambda: _call(function, leaf, name))


def _halves(x: Tensor) -> Halves:
    if x.dim() < 2 or x.shape[1] % 2:
        raise InputError(
            f"a reversible block splits its channels in two, got a tensor of {tuple(x.shape)}: "
            "give it an even number of channels"
        )
    first, second = x.chunk(2, 1)
    return first, second


def _call(function: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return ``function(x)`` in x's type; raise InputError if no coupling can be made of it."""
    version = x._version
    result: Tensor = function(x)
    if x._version != version:
        raise InputError(
            f"{name} of a reversible block overwrites its own input, which the coupling reads "
            "again: let it start with an operation that does not, a convolution for instance"
        )
    if result.shape != x.shape:
        raise InputError(
            f"{name} of a reversible block must keep the shape of its half, {tuple(x.shape)}, "
            f"got {tuple(result.shape)}"
        )
    return result.to(x.dtype)
