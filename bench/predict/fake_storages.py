"""Fake tensors' own cache of results must not keep alive the storages that a trace counts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache

__all__ = ["forgetting_storages"]

_TAKE_STORAGES = (
    torch.ops.aten.set_.source_Storage,
    torch.ops.aten.set_.source_Storage_storage_offset,
)
_NOTHING = nullcontext()


def forgetting_storages(func: Any, args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Return the scope in which to run ``func``: without torch's cache where it would hold on.

    A ``FakeTensorMode`` remembers results by their arguments. The argument of ``set_`` is a
    storage, which would then live as long as the mode.
    """
    if func in _TAKE_STORAGES and isinstance(args[0], FakeTensor):
        return disable_fake_tensor_cache(args[0].fake_mode)
    return _NOTHING
