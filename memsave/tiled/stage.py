"""One stage of a tiled level: convolutions, then norm and activation, read slice by slice.

Whatever a pass asks for is either stored or made again from what the stage reads, on just the
slices asked for and the halo they need: so what to store is a choice of bytes against time, and
changes no value.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from memsave.recomputing import computed_again
from memsave.tiled.activation import SlabActivation
from memsave.tiled.convolutions import Convolutions, as_parameter
from memsave.tiled.layers import StageLayers
from memsave.tiled.norm import SlabNorm
from memsave.tiled.slabs import Read, Slabs, SlabStore, padded

__all__ = ["Stage"]


class Stage:
    """Convolutions, norm and activation of one training step on one level.

    ``x`` is what the stage reads, ``c`` its last convolution's result, ``z`` its own. All methods
    take the first slice and the one after the last.

    Memory: ``c`` if it is stored, a slab at a time; ``dz``, later overwritten with ``dc``, if that
        is stored. Beside them the slices last computed of ``c``, until ``forget``.
    """

    def __init__(
        self,
        layers: StageLayers,
        read: Read,
        samples: int,
        slabs: Slabs,
        dtype: torch.dtype,
    ) -> None:
        self.convolutions = Convolutions(layers.convolutions, dtype)
        self.channels = layers.convolutions[-1].out_channels
        self.norm: SlabNorm | SlabActivation
        if layers.rule.norm is None:
            self.norm = SlabActivation(layers.rule, self.channels)
        else:
            self.norm = SlabNorm(layers.rule, samples, self.channels, dtype)
        self.read = read
        self.slabs = slabs
        self.read_output_gradient: Read | None = None  # dz, from whoever reads z
        self.stored: SlabStore | None = None  # c
        self.stored_gradient: SlabStore | None = None  # dz, and dc from ``convert`` on
        self._converted = False
        self._was_computed = False  # whether all slabs of ``c`` have been there once
        self._last: tuple[int, int, Tensor] | None = None

    # -- forward ----------------------------------------------------------------------------

    def run_forward(self, store: SlabStore | None = None) -> None:
        """Take the norm's statistics over all slabs; put ``c`` into ``store`` if there is one."""
        if store is not None or self.norm.rule.needs_statistics():
            for start, stop in self.slabs:
                c = self._compute(start, stop)
                self.norm.observe(c)
                if store is not None:
                    store.append(start, c)
        self.norm.settle()
        self.stored = store

    def convolved(self, start: int, stop: int) -> Tensor:
        """Return ``c``, stored or made again."""
        if self.stored is not None:
            return self.stored.read(start, stop)
        if self._last is not None and self._last[0] <= start and stop <= self._last[1]:
            return self._last[2].narrow(-1, start - self._last[0], stop - start).contiguous()
        with computed_again() if self._was_computed else nullcontext():
            c = self._compute(start, stop)
        self._last = (start, stop, c)
        return c

    def output(self, start: int, stop: int) -> Tensor:
        """Return ``z``, a tensor of the caller's own."""
        return self.norm.apply(self.convolved(start, stop))

    def forget(self) -> None:
        """Drop what was made again for the slab that is done."""
        self._last = None

    def _compute(self, start: int, stop: int) -> Tensor:
        c = self.convolutions.forward(self._padded(self.read, start, stop))
        self._was_computed = self._was_computed or stop == self.slabs[-1][1]
        return c

    def _padded(self, read: Read, start: int, stop: int) -> Tensor:
        return padded(read, start, stop, self.convolutions.halo, self.slabs[-1][1])

    # -- backward ---------------------------------------------------------------------------

    def convolved_gradient(self, start: int, stop: int) -> Tensor:
        """Return ``dc``, once the norm's sums are settled."""
        if self._converted:
            assert self.stored_gradient is not None
            return self.stored_gradient.read(start, stop)
        c = self.convolved(start, stop)
        return self.norm.gradient(c, self.output_gradient(start, stop))

    def output_gradient(self, start: int, stop: int) -> Tensor:
        """Return ``dz``, made again."""
        assert self.read_output_gradient is not None
        with computed_again():  # the pass for the norm's sums has read it before
            return self.read_output_gradient(start, stop)

    def input_gradient(self, start: int, stop: int) -> Tensor:
        """Return ``dx`` once more, where it was not stored."""
        with computed_again():
            dc = self._padded(self.convolved_gradient, start, stop)
            return self.convolutions.input_gradient(dc)

    def add_weight_gradients(self, start: int, stop: int) -> Tensor:
        """Add what the slab gives to the weights' gradients; return its ``dc``, with halo."""
        dc = self._padded(self.convolved_gradient, start, stop)
        owned = dc.narrow(-1, self.convolutions.halo, stop - start).contiguous()
        self.convolutions.add_weight_gradients(self._padded(self.read, start, stop), owned)
        return dc

    def run_backward(self, start: int, stop: int) -> Tensor:
        """Add what the slab gives to the weights' gradients, and return its ``dx``."""
        return self.convolutions.input_gradient(self.add_weight_gradients(start, stop))

    def convert(self) -> None:
        """Overwrite the stored ``dz`` with ``dc``, giving back the stored ``c`` on the way."""
        assert self.stored_gradient is not None
        for start, stop in self.slabs:
            dz = self.stored_gradient.read(start, stop)
            self.stored_gradient.write(start, self.norm.gradient(self.convolved(start, stop), dz))
            self.forget()
            if self.stored is not None:
                self.stored.release_before(stop)
        self._converted, self.stored = True, None

    def release(self) -> None:
        """Give back all that is stored."""
        for store in (self.stored, self.stored_gradient):
            if store is not None:
                store.clear()
        self.stored = self.stored_gradient = None
        self.forget()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of convolutions and norm, in order."""
        rule = self.norm.rule
        found = [p for layer in self.convolutions.layers for p in (layer.weight, layer.bias)]
        found += [rule.weight, rule.bias]
        return [as_parameter(p) for p in found if p is not None]

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the parameters' gradients."""
        return {**self.convolutions.gradients(), **self.norm.gradients()}
