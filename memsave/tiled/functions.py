"""The two halves of a tiled level as autograd functions: encoder, and decoder with its tail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memsave.recomputing import running
from memsave.tiled.level import Level, Tail
from memsave.tiled.stage import Stage

__all__ = ["run_decoder", "run_encoder"]


def run_encoder(level: Level, x: Tensor) -> Tensor:
    """Return the pooled features of the level's input; its backward is the level's last pass."""
    pooled: Tensor = _Encoder.apply(level, x, *_parameters(level.encoder))  # type: ignore[no-untyped-call]
    return pooled


def run_decoder(
    level: Level, low: Tensor, tail: Tail, tail_parameters: list[nn.Parameter]
) -> Tensor:
    """Return the tail's result from what comes up from the level below."""
    parameters = [*_parameters(level.decoder), *level.join.parameters, *tail_parameters]
    result: Tensor = _Decoder.apply(level, tail, low, *parameters)  # type: ignore[no-untyped-call]
    return result


def _parameters(stages: list[Stage]) -> list[nn.Parameter]:
    return [p for stage in stages for p in stage.parameters()]


class _Encoder(torch.autograd.Function):
    # Kept for backward: what the level stores, and x, which the level holds.
    @staticmethod
    def forward(ctx: Any, level: Level, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.level, ctx.parameters = level, parameters
        with torch.autocast(x.device.type, enabled=False), running(level.names[0]):
            return level.run_encoder()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        level: Level = ctx.level
        with torch.autocast(gradient.device.type, enabled=False), running(level.names[0]):
            d_x = level.run_encoder_backward(gradient, input_gradient=ctx.needs_input_grad[1])
            found = {p: g for stage in level.encoder for p, g in stage.gradients().items()}
        return None, d_x, *(found.get(p) for p in ctx.parameters)


class _Decoder(torch.autograd.Function):
    # Kept for backward: what the level stores, and ``low``, which the level's join holds.
    @staticmethod
    def forward(
        ctx: Any, level: Level, tail: Tail, low: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.level, ctx.tail, ctx.parameters = level, tail, parameters
        with torch.autocast(low.device.type, enabled=False), running(level.names[1]):
            return level.run_decoder(low, tail)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        level: Level = ctx.level
        with torch.autocast(gradient.device.type, enabled=False), running(level.names[1]):
            d_low = level.run_decoder_backward(ctx.tail, gradient)
            found = {p: g for stage in level.decoder for p, g in stage.gradients().items()}
            found |= level.join.gradients() | ctx.tail.gradients()
        return None, None, d_low, *(found.get(p) for p in ctx.parameters)
