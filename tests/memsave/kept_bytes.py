"""Counting bytes: what autograd keeps after a forward, and the peak of live storages."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes", "saved_bytes"]


def saved_bytes(step: Callable[[], Tensor], model: nn.Module | None = None) -> int:
    """Bytes of the distinct storages that autograd keeps once ``step`` has run forward.

    The parameters and buffers of ``model``, which live anyway, are left out.
    """
    own = [*model.parameters(), *model.buffers()] if model is not None else []
    ours = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in ours:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = step()
    del out  # alive until here, so no two storages could share an address
    return sum(kept.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators made while it was on, and their peak.

    What existed before counts as nothing, and so does a storage that an operator writes into.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` and count what it made."""
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in before:
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._live:
            self._live[storage._cdata] = storage.nbytes()
            self.now_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now_bytes -= self._live.pop(key)
