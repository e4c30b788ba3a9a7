"""One level of a U-Net, both of its halves, in one training step: the passes over its slabs.

Encoder: x -> stages -> s, pooled for the level below. Decoder: s and up(low), added or side by
side -> stages -> tail, which is the loss, or what the level above reads. s is made again wherever
it is read. Backward comes in two parts, as autograd's order has it: the decoder's must end before
the level below can begin, whose gradient of the pooled features the encoder's needs. What joins
them is ds, the gradient of s by the decoder, stored or made again from the first decoder stage's.

Each norm costs a pass in forward, for its statistics, and one in backward, for its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.errors import BackwardError
from memsave.tiled.joins import Join
from memsave.tiled.layers import StageLayers
from memsave.tiled.slabs import Arena, Read, Slabs, SlabStore
from memsave.tiled.stage import Stage

__all__ = ["Keep", "Level", "LevelLayers", "Tail"]

Keep = Literal["skip", "conv1", "conv1_forward", "conv2", "gradient", "skip_gradient"]


class Tail(Protocol):
    """What reads the decoder's last stage: it gives the level's result and takes its gradient."""

    def run_forward(self, read: Read, slabs: Slabs) -> Tensor:
        """Return the result, from all slabs."""
        ...

    def start_backward(self, gradient: Tensor) -> None:
        """Take the result's gradient."""
        ...

    def input_gradient(self, read: Read, start: int, stop: int) -> Tensor:
        """Return the gradient of what is read, on these slices."""
        ...

    def run_backward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Add what these slices, ``z``, give to the parameters' gradients; return z's gradient."""
        ...

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of the tail's parameters."""
        ...

    def release(self) -> None:
        """Let go of what the tail holds for backward."""
        ...


@dataclass(frozen=True, slots=True)
class LevelLayers:
    """The layers of one level, and how it is cut."""

    encoder: Sequence[StageLayers]
    decoder: Sequence[StageLayers]
    pool: tuple[int, int, int]  # kernel and stride, 2 along the last axis
    slabs: Slabs
    names: tuple[str, str] = ("", "")  # of encoder and decoder, for whoever asks who holds memory
    keep: frozenset[Keep] = field(default_factory=frozenset)


class Level:
    """What a level stores between forward and backward, and the passes that use it.

    Args:
        layers: its layers.
        join: how skip and upsampled features come together.
        x: what the level reads, (N, C, A, B, slices), whole.
        dtype: the type to compute in.
        training: whether backward will follow; nothing is stored otherwise.
    """

    def __init__(
        self, layers: LevelLayers, join: Join, x: Tensor, dtype: torch.dtype, *, training: bool
    ) -> None:
        self.slabs, self.dtype, self.join, self.names = layers.slabs, dtype, join, layers.names
        self._pool = layers.pool
        self._x: Tensor | None = x
        self._keep = layers.keep if training else frozenset[Keep]()
        self._pooled_gradient: Tensor | None = None
        self._skip_gradient: SlabStore | None = None
        self._tail: Tail | None = None
        self._arena: Arena | None = None
        self._decoder_done = False
        samples = x.shape[0]
        self.encoder = self._stages(layers.encoder, self._image, samples)
        self.decoder = self._stages(layers.decoder, self._joined, samples)
        self.encoder[-1].read_output_gradient = self._encoded_gradient

    def _stages(self, block: Sequence[StageLayers], read: Read, samples: int) -> list[Stage]:
        stages: list[Stage] = []
        for layers in block:
            stages.append(Stage(layers, read, samples, self.slabs, self.dtype))
            read = stages[-1].output
        for before, stage in pairwise(stages):
            before.read_output_gradient = stage.input_gradient
        return stages

    # -- forward ----------------------------------------------------------------------------

    def run_encoder(self) -> Tensor:
        """Return the pooled features, whole."""
        for stage in self.encoder:
            store = stage is self.encoder[-1] and "skip" in self._keep
            stage.run_forward(SlabStore() if store else None)
            self._forget()
        assert self._x is not None
        samples, _, *sides = self._x.shape
        below = (n // k for n, k in zip(sides, self._pool, strict=True))
        pooled = self._x.new_empty((samples, self.encoder[-1].channels, *below), dtype=self.dtype)
        for start, stop in self.slabs:
            part = F.max_pool3d(self._encoded(start, stop), self._pool)
            pooled[..., start // 2 : stop // 2] = part
            self._forget()
        return pooled

    def run_decoder(self, low: Tensor, tail: Tail) -> Tensor:
        """Return the tail's result; ``low`` is what comes up from the level below, whole."""
        self.join.start(low)
        self._arena = self._make_arena()
        for number, stage in enumerate(self.decoder, start=1):
            store = not self._keep.isdisjoint((f"conv{number}", f"conv{number}_forward"))
            stage.run_forward(SlabStore(self._arena) if store else None)
            self._forget()
        result = tail.run_forward(self._forgetting(self.decoder[-1].output), self.slabs)
        self._forget()
        return result

    def _image(self, start: int, stop: int) -> Tensor:
        assert self._x is not None
        return self._x.narrow(-1, start, stop - start).to(self.dtype).contiguous()

    def _encoded(self, start: int, stop: int) -> Tensor:
        return self.encoder[-1].output(start, stop)

    def _joined(self, start: int, stop: int) -> Tensor:
        return self.join.joined(self._encoded(start, stop), start, stop)

    # -- backward of the decoder ------------------------------------------------------------

    def run_decoder_backward(self, tail: Tail, gradient: Tensor) -> Tensor:
        """Return the gradient of ``low``."""
        if self._decoder_done:
            raise BackwardError(
                "a tiled level runs backward once: its stored slabs are overwritten on the way; "
                "add your losses up and run forward again for another pass"
            )
        self._decoder_done, self._tail = True, tail
        tail.start_backward(gradient)
        if self._arena is not None:
            self._arena.grow(self._stored_blocks()[1])
        self._last_stage_sums(tail)
        for stage, before in zip(self.decoder[:0:-1], self.decoder[-2::-1], strict=True):
            self._step_back(stage, before)
        return self._into_the_skip(self.decoder[0])

    def _last_stage_sums(self, tail: Tail) -> None:
        last = self.decoder[-1]

        def read_gradient(start: int, stop: int) -> Tensor:
            return tail.input_gradient(last.output, start, stop)

        last.read_output_gradient = read_gradient
        for start, stop in self.slabs:
            z = last.output(start, stop)
            dz = tail.run_backward(z, start, stop)
            del z
            last.norm.observe_gradient(last.convolved(start, stop), dz)
            self._forget()
        last.norm.settle_gradient()

    def _step_back(self, stage: Stage, before: Stage) -> None:
        """Weight gradients of a stage, and the norm's sums of the one before it, in one pass."""
        keep = "gradient" in self._keep and before in self.decoder
        hand_over = keep and "conv1" not in self._keep
        stored = SlabStore(self._arena)
        for start, stop in self.slabs:
            dx = stage.run_backward(start, stop)
            before.norm.observe_gradient(before.convolved(start, stop), dx)
            if keep:
                stored.append(start, dx)
            if keep and stage.stored is not None:  # else what reads dx again needs it again
                stage.stored.release_before(stop - stage.convolutions.halo)
            if hand_over and before.stored is not None:  # the next slab's dc looks back twice
                before.stored.release_before(stop - 2 * stage.convolutions.halo)
            self._forget()
        before.norm.settle_gradient()
        if keep:
            before.stored_gradient, stage.stored = stored, None
            if stage.stored_gradient is not None:  # a third stage's: nobody reads it again
                stage.stored_gradient.clear()
                stage.stored_gradient = None
            before.stored = None if hand_over else before.stored
            before.convert()

    def _into_the_skip(self, first: Stage) -> Tensor:
        """Finish the decoder: its first weights, and the join; store ds if told to."""
        self.join.start_backward()
        if "skip_gradient" in self._keep:
            self._skip_gradient = SlabStore(self._arena)
        for start, stop in self.slabs:
            gradient = first.run_backward(start, stop)
            self.join.add_gradients(gradient, start, stop)
            if self._skip_gradient is not None:
                self._skip_gradient.append(start, self.join.skip_gradient(gradient))
                if first.stored_gradient is not None:
                    first.stored_gradient.release_before(stop - first.convolutions.halo)
            self._forget()
        if self._skip_gradient is not None:
            first.release()
        if self._skip_gradient is not None or first.stored_gradient is not None:
            self._release_decoder()  # ds comes from what is stored: no more need of the rest
        return self.join.finish()

    # -- backward of the encoder ------------------------------------------------------------

    def run_encoder_backward(self, gradient: Tensor, *, input_gradient: bool) -> Tensor | None:
        """Return the gradient of x if it is asked for; everything stored is given back."""
        if not self._decoder_done:
            raise BackwardError(
                "the encoder of a tiled level came to its backward before the decoder: the loss "
                "must depend on the network's output"
            )
        assert self._x is not None
        self._pooled_gradient = gradient
        self._encoded_sums(self.encoder[-1])
        for stage, before in zip(self.encoder[:0:-1], self.encoder[-2::-1], strict=True):
            self._step_back(stage, before)
        d_x = torch.empty_like(self._x) if input_gradient else None
        first = self.encoder[0]
        for start, stop in self.slabs:
            if d_x is None:
                first.add_weight_gradients(start, stop)
            else:
                d_x[..., start:stop] = first.run_backward(start, stop)
            self._forget()
        self._release()
        return d_x

    def _encoded_sums(self, last: Stage) -> None:
        """Take the norm's sums of the encoder's last stage; where ds is stored, make it dc."""
        store = self._skip_gradient
        for start, stop in self.slabs:
            dz = self._encoded_gradient(start, stop)
            last.norm.observe_gradient(last.convolved(start, stop), dz)
            if store is not None:
                store.write(start, dz)  # so that pooling is not undone a second time
            self._forget()
        last.norm.settle_gradient()
        if store is not None:
            last.stored_gradient, self._skip_gradient = store, None
            last.convert()

    def _encoded_gradient(self, start: int, stop: int) -> Tensor:
        """Return the gradient of s: from the decoder, and from the pooling beside it."""
        if self._skip_gradient is not None:
            ds = self._skip_gradient.read(start, stop)
        else:
            ds = self.join.skip_gradient(self.decoder[0].input_gradient(start, stop))
        return ds + self._unpooled(start, stop)

    def _unpooled(self, start: int, stop: int) -> Tensor:
        assert self._pooled_gradient is not None
        first, last = start - start % 2, stop + stop % 2  # pooling takes slices in pairs
        gradient = self._pooled_gradient[..., first // 2 : last // 2].to(self.dtype).contiguous()
        s, kernel = self._encoded(first, last), list(self._pool)
        _, chosen = F.max_pool3d(s, kernel, return_indices=True)
        whole: Tensor = torch.ops.aten.max_pool3d_with_indices_backward(
            gradient, s, kernel, kernel, [0, 0, 0], [1, 1, 1], False, chosen
        )
        return whole.narrow(-1, start - first, stop - start)

    # -- memory -----------------------------------------------------------------------------

    def _make_arena(self) -> Arena | None:
        """Return memory for the decoder's slabs, enough for what forward stores."""
        if not self._keep - {"skip"}:
            return None
        assert self._x is not None
        thickness = max(stop - start for start, stop in self.slabs)
        samples, _, height, width, _ = self._x.shape
        shape = (samples, height, width, thickness)
        arena = Arena(self.decoder[0].channels, shape, self._x.new_empty(0, dtype=self.dtype))
        arena.grow(self._stored_blocks()[0])
        return arena

    def _stored_blocks(self) -> tuple[int, int]:
        """Return how many slabs of the first stage's channels lie stored: after forward, at most.

        In backward: conv2's slabs go as the gradient's come, but for the first; then conv1's go;
        then, but for the first, the gradient's as the skip's come.
        """
        slabs, channels = len(self.slabs), self.decoder[0].channels
        conv1, conv1_forward, conv2, gradient, skip = (
            name in self._keep
            for name in ("conv1", "conv1_forward", "conv2", "gradient", "skip_gradient")
        )
        of_conv2 = -(-self.decoder[-1].channels // channels)
        of_skip = -(-self.encoder[-1].channels // channels)
        forward = slabs * ((conv1 or conv1_forward) + of_conv2 * conv2)
        sums = max(forward + 1, slabs * (conv1 + 1)) if gradient else 0
        last = max(slabs, slabs * of_skip) + of_skip if gradient else forward + slabs * of_skip
        return forward, max(forward, sums, last * skip)

    def _forget(self) -> None:
        for stage in (*self.encoder, *self.decoder):
            stage.forget()

    def _forgetting(self, read: Read) -> Read:
        """Return ``read``, dropping after each call what was made again for it."""

        def read_and_forget(start: int, stop: int) -> Tensor:
            values = read(start, stop)
            self._forget()
            return values

        return read_and_forget

    def _release_decoder(self) -> None:
        if self._tail is not None:
            self._tail.release()
        self._tail = None
        self.join.release()
        for stage in self.decoder:
            stage.stored = None

    def _release(self) -> None:
        self._release_decoder()
        self._x = self._pooled_gradient = self._skip_gradient = self._arena = None
        for stage in (*self.encoder, *self.decoder):
            stage.release()
