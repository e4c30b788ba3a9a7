"""Reading and writing at indices on CUDA: ``x[i]``, its gradient, ``index_put_``.

Before it reads, torch makes indices of one kind and shape. Where numbers are to be added up at
indices that may repeat, as in the gradient of a table of position biases, it works out one long
index for each number, sorts it, and adds up neighbours: four rows of 64-bit numbers as long as the
indices, and the sort's own room, are alive at once. Of masks the result's size is a value, which
no trace has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from bench.predict.device_sorts import radix_sort_bytes

__all__ = ["INDEX_CALLS"]

_aten = torch.ops.aten
_MASKS: Final = (torch.bool, torch.uint8)
_Indices = Sequence[Tensor | None]


def _index(source: Tensor, indices: _Indices) -> Tensor:
    prepared = _prepared(source, indices)
    result: Tensor = _aten.index.Tensor(source, indices)
    del prepared
    return result


def _index_put_(
    target: Tensor, indices: _Indices, values: Tensor, accumulate: bool = False
) -> Tensor:
    return _put(target, indices, values, accumulate, checked=True)


def _index_put_impl_(
    target: Tensor,
    indices: _Indices,
    values: Tensor,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Tensor:
    return _put(target, indices, values, accumulate, checked=not unsafe)


def _index_put(
    source: Tensor, indices: _Indices, values: Tensor, accumulate: bool = False
) -> Tensor:
    """Write into a copy; but into the zeros themselves where autograd made them for a gradient.

    Of tensors that Python dispatches autograd writes a copy there too.
    """
    node: Any = torch._C._current_autograd_node()
    if node is not None and node.name() == "IndexBackward0" and not torch.is_grad_enabled():
        return _put(source, indices, values, accumulate, checked=False)
    return _put(source.clone(), indices, values, accumulate, checked=True)


def _put(
    target: Tensor, indices: _Indices, values: Tensor, accumulate: bool, checked: bool
) -> Tensor:
    if values.device != target.device and values.dim() == 0:
        values = target.new_empty((), dtype=values.dtype)
    sorting = accumulate or torch.are_deterministic_algorithms_enabled()
    whole = all(i is None for i in indices)  # which torch refuses
    if not sorting or whole or _has_mask(indices) or not target.is_cuda:
        prepared = _prepared(target, indices)
        _aten.index_put_(target, indices, values, accumulate)
        del prepared
        return target
    _add_sorted(target, indices, values, checked)
    return target


def _has_mask(indices: _Indices) -> bool:
    return any(i is not None and i.dtype in _MASKS for i in indices)


def _prepared(source: Tensor, indices: _Indices) -> list[Tensor | None]:
    """Return the indices as the kernel reads them: long, of one shape, lying alike."""
    if _has_mask(indices) or not source.is_cuda or all(i is None for i in indices):
        return []
    made = [None if i is None else _moved(i, source) for i in _broadcast(indices)]
    there = [i for i in made if i is not None]
    if len({i.stride() for i in there}) > 1:
        return [None if i is None else i.contiguous() for i in made]
    return made


def _moved(index: Tensor, to: Tensor) -> Tensor:
    """Return ``index`` where ``to`` is; ``Tensor.to`` would copy a value that is known for good."""
    if index.device == to.device:
        return index
    return torch.empty_strided(index.shape, index.stride(), dtype=index.dtype, device=to.device)


def _broadcast(indices: _Indices) -> list[Tensor | None]:
    long = [i if i is None or i.dtype == torch.long else i.long() for i in indices]
    there = [i for i in long if i is not None]
    alike = iter(torch.broadcast_tensors(*there))  # type: ignore[no-untyped-call]
    return [None if i is None else next(alike) for i in long]


def _add_sorted(target: Tensor, indices: _Indices, values: Tensor, checked: bool) -> None:
    """Take and drop what the sort takes; nothing is added, fake tensors hold no numbers."""
    dense = target.contiguous()
    made = _broadcast(indices)
    made += [None] * (target.dim() - len(made))
    places = [d for d, i in enumerate(made) if i is not None]
    linear = _linear_index(dense, made, checked)
    del made
    together = places == list(range(places[0], places[-1] + 1))
    first = places[0] if together else 0
    kept = [side for d, side in enumerate(dense.shape) if d not in places]
    width = prod(kept[first:])
    spread = _spread(values, (*kept[:first], *linear.shape, *kept[first:]))
    if linear.numel() and width:
        front = [*places, *[d for d in range(dense.dim()) if d not in places]]
        moved = dense if together else dense.permute(front).contiguous()
        row = linear.reshape(-1)
        _sort(row, (dense.numel() - 1) // width)
        del row, moved
    del spread, linear, dense


def _spread(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    while values.dim() > len(shape) and values.shape[0] == 1:
        values = values[0]
    return values.expand(shape).contiguous()


def _linear_index(dense: Tensor, indices: _Indices, checked: bool) -> Tensor:
    linear = None
    for side, stride, index in zip(dense.shape, dense.stride(), indices, strict=True):
        if index is None:
            continue
        if checked:
            _look_for_extremes(index)
        part = _moved(index.remainder(side) * stride, dense)
        if linear is None:
            linear = part
        else:
            linear += part
        del part
    assert linear is not None  # some index is there
    return linear


def _look_for_extremes(index: Tensor) -> None:
    """Take and drop what ``aminmax`` takes, by which indices out of bounds are found."""
    extremes = index.new_empty(()), index.new_empty(())
    dense = index.contiguous()
    del dense, extremes


def _sort(keys: Tensor, largest: int) -> None:
    ordered, places = torch.empty_like(keys), torch.empty_like(keys)
    numbers = torch.empty_like(keys)
    room = keys.new_empty((radix_sort_bytes(keys.numel(), largest),), dtype=torch.uint8)
    del room, numbers, places, ordered


INDEX_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.index: _index,
    _aten.index_put: _index_put,
    _aten.index_put_: _index_put_,
    _aten._index_put_impl_: _index_put_impl_,
}
