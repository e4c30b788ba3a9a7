"""Which saved tensors are a model's own: its parameters, its buffers, and copies of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["ParameterStorages", "storage_key"]

# Operations that change type, layout or sides, but not what the values are.
_CARRIES = (
    "ToCopyBackward0",
    "CloneBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ExpandBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
)


def storage_key(tensor: Tensor) -> int:
    """Return what tells a live storage from others: fake tensors have it too, and no data."""
    return int(tensor.untyped_storage()._cdata)


class ParameterStorages:
    """The storages of a model's parameters and buffers, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._keys = {storage_key(t) for t in (*model.parameters(), *model.buffers())}

    def hold(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter or buffer, a view of one, or a copy of a parameter.

        A copy is known by what autograd made it with: one in another type, as autocast makes.
        """
        if storage_key(tensor) in self._keys:
            return True
        node: Any = tensor.grad_fn
        while node is not None and node.name() in _CARRIES:
            node = node.next_functions[0][0]
        if node is None or not hasattr(node, "variable"):  # not the end of a leaf
            return False
        return storage_key(node.variable) in self._keys
