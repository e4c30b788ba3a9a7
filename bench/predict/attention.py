"""Attention's fused kernels as CUDA's host code calls them: what they take, in its order.

``scaled_dot_product_attention`` takes one of three kernels on CUDA, ``fake_cuda.cpp`` chooses; none
holds the scores. What they hold instead, beside the result and a row of sums, is worked out here:
parts of the result in float32, parts of gradients in tiles, random states. Sizes are as torch 2.13
was seen to take them. cuDNN's are not public: its backward is taken to hold what flash's does, and
records name that as an estimate, ``CUDNN_ESTIMATED``.

Sides are named as in ``query``: (batch, heads, tokens, width).
"""

# ruff: noqa: ARG001 - the signatures are the operators'

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor

from bench.predict.traced_card import capability, multiprocessors

__all__ = ["ATTENTION_CALLS", "CUDNN_ATTENTION", "CUDNN_ESTIMATED", "key_splits", "workspace_bytes"]

CUDNN_ESTIMATED: Final = "workspace of cuDNN's attention"

_aten = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)
_TILE_HEAD_BYTES: Final = 16  # a lock and a counter before each tile of a gradient's parts


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _elsewhere() -> Tensor:
    """A random state that torch keeps on the host."""
    return torch.empty((), dtype=torch.long, device="meta")


# -- memory-efficient -----------------------------------------------------------------------------


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sums: bool, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    batch, heads, tokens, _width = query.shape
    out = query.new_empty((batch, tokens, heads, value.shape[3]))
    rows = _float(query, batch, heads, ceil(tokens / 32) * 32 if sums else 0)
    if query.dtype in _HALF and value.shape[3] > 128:  # wider than a block keeps in registers
        part = _float(query, *out.shape)
        del part
    return out.transpose(1, 2), rows, _elsewhere(), _elsewhere()


def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: Sequence[bool],
    *_: Any,
    **__: Any,
) -> tuple[Tensor | None, ...]:
    dense = gradient.transpose(1, 2).contiguous()
    results = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value)]
    of_bias = None
    if bias is not None and wanted[3]:
        side = bias.shape[-1]
        of_bias = bias.new_empty((*bias.shape[:-1], ceil(side / 16) * 16))[..., :side]
    widest = max(query.shape[3], value.shape[3])
    if query.dtype in _HALF and (capability() >= (7, 5) or widest <= _rows(query, widest, dropout)):
        delta = _float(query, *query.shape[:3])
    else:
        delta = _products(dense.float(), out.transpose(1, 2).float())
    size = workspace_bytes(query, key, value, dropout)
    workspace = query.new_empty((size,), dtype=torch.uint8) if size else None
    del delta, workspace, dense
    return (*results, of_bias)


def _products(gradient: Tensor, out: Tensor) -> Tensor:
    product = gradient * out
    sums = product.sum(-1)
    delta = sums.transpose(-2, -1).contiguous()
    del sums, product
    return delta


def _rows(query: Tensor, widest: int, dropout: float) -> int:
    """Return how many queries a block of the backward kernel works on."""
    half = query.dtype in _HALF
    if widest <= 64 or capability() < ((7, 0) if half else (8, 0)):
        return 64
    if not _little_shared() or (half and widest > 128):
        return 128
    # Where a block has 99 KiB, 128 fit in one kernel alone, made for such cards.
    return 128 if half and widest <= 96 and not dropout else 64


def _little_shared() -> bool:
    return (8, 6) <= capability() <= (8, 9) or capability() >= (12, 0)


def workspace_bytes(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> int:
    """Return the bytes in which the memory-efficient backward adds up parts of gradients.

    Tiles of the query's gradient in float32; in half precision, where a block's gradients of keys
    and values do not fit its registers, those too, for each of the parts the keys are split into.
    """
    batch, heads, tokens, width = query.shape
    half, widest = query.dtype in _HALF, max(width, value.shape[3])
    if not half and capability() < (7, 0):
        return 0
    rows = _rows(query, widest, dropout)
    kept = half and widest <= rows  # gradients of keys and values stay in registers
    across = 128 if kept and rows == 128 and capability() >= (8, 0) else 64
    if across == 128 and _little_shared():
        across = 64
    tiles = ceil(tokens / rows) * ceil(width / across)
    size = tiles * (_TILE_HEAD_BYTES + 4 * rows * across)
    if half and not kept:
        wide = sum(ceil(side / rows) * rows for side in (width, value.shape[3]))
        size += 4 * 64 * wide * _backward_splits(batch * heads, key.shape[2])
    return int(batch * heads * size)


def _backward_splits(heads: int, keys: int) -> int:
    if capability() < (7, 0) or torch.are_deterministic_algorithms_enabled():
        return 1
    splits = 1 if heads >= 256 and keys <= 128 else ceil(keys / 64)
    return max(1, min(splits, 200 // heads))


# -- flash ----------------------------------------------------------------------------------------


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    return_debug_mask: bool = False,
    **_: Any,
) -> tuple[Any, ...]:
    batch, heads, tokens, width = query.shape
    out = torch.empty_like(query)
    rows = _float(query, batch, heads, tokens)
    splits = 1 if dropout else key_splits(batch * heads, tokens, key.shape[2], width)
    parts = []
    if splits > 1:
        parts = [_float(query, splits, batch, heads, tokens)]
        parts.append(_float(query, splits, batch, heads, tokens, _padded(width)))
    seed = query.new_empty((2,), dtype=torch.uint64)
    offset = query.new_empty((), dtype=torch.uint64)
    if dropout:
        drawn = query.new_empty((2,), dtype=torch.int64)
        del drawn
    parts.clear()
    mask = query.new_empty((0,))
    return out, rows, None, None, tokens, key.shape[2], seed, offset, mask


def _flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    copies = [t.transpose(1, 2).contiguous() for t in (gradient, out)]
    results = [torch.empty_like(t) for t in (query, key, value)]
    held = [*_parts_of_gradients(query)]
    if key.shape[1] != query.shape[1]:  # each of the query's heads has gradients of its own
        batch, _heads, tokens, width = key.shape
        expanded = [key.new_empty((batch, tokens, query.shape[1], width)) for _ in range(2)]
        del expanded
    held.reverse()
    while held:
        held.pop(0)
    copies.clear()
    return tuple(results)


def _parts_of_gradients(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = query.shape
    rounded = ceil(tokens / 128) * 128
    sums = _float(query, batch, heads, rounded)
    shape = (batch, rounded, heads, _padded(width))
    if torch.are_deterministic_algorithms_enabled():
        blocks = ceil(multiprocessors() / (batch * heads))
        return sums, _float(query, blocks, *shape)
    return sums, _float(query, *shape)


def _padded(width: int) -> int:
    step = 32 if width <= 128 else 64
    return ceil(width / step) * step


def key_splits(heads: int, queries: int, keys: int, width: int) -> int:
    """Return into how many parts flash splits the keys, so that every multiprocessor has work.

    ``heads``: of the whole batch. The fewest parts that keep the card at 85 % of the best filling.
    """
    room = 2 * multiprocessors()
    blocks = ceil(keys / (256 if width <= 64 else 128 if width <= 128 else 64))
    work = heads * ceil(queries / 64)
    if work >= 0.8 * room:
        return 1
    fillings: dict[int, float] = {}
    for parts in range(1, min(128, room, blocks) + 1):
        if parts == 1 or ceil(blocks / parts) != ceil(blocks / (parts - 1)):
            waves = work * parts / room
            fillings[parts] = waves / ceil(waves)
    best = max(fillings.values())
    return next(parts for parts, filling in fillings.items() if filling >= 0.85 * best)


# -- cuDNN ----------------------------------------------------------------------------------------


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *_: Any, **__: Any
) -> tuple[Any, ...]:
    batch, heads, tokens, _width = query.shape
    shape = (batch, heads, tokens, value.shape[3])
    order = sorted(range(4), key=query.stride, reverse=True)
    out = torch.empty_permuted(shape, order, dtype=query.dtype, device=query.device)
    rows = _float(query, batch, heads, tokens, 1)
    seeds = _elsewhere(), _elsewhere()
    return out, rows, None, None, tokens, key.shape[2], *seeds, None


def _cudnn_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    results = tuple(torch.empty_like(t) for t in (query, key, value))
    held = _parts_of_gradients(query)
    del held
    return results


CUDNN_ATTENTION: Final = frozenset(
    {
        _aten._scaled_dot_product_cudnn_attention,
        _aten._scaled_dot_product_cudnn_attention_backward,
    }
)
ATTENTION_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten._scaled_dot_product_efficient_attention: _efficient,
    _aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
    _aten._scaled_dot_product_flash_attention: _flash,
    _aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    _aten._scaled_dot_product_cudnn_attention: _cudnn,
    _aten._scaled_dot_product_cudnn_attention_backward: _cudnn_backward,
}
