"""Gradients that autograd adds up: in place where it holds the last reference, watched or not.

Where a tensor was read twice, autograd's engine adds the second gradient to the first one, over it
if nothing else holds that. While a dispatch mode is active it always makes a third tensor instead,
since it cannot know what a mode would make of the overwriting. So a step that is traced would hold
one activation more than the same step on a card; here the engine's own rule is applied again.

Source of the rule: ``can_accumulate_inplace`` in PyTorch's torch/csrc/autograd/input_buffer.cpp.

Some of autograd's own formulas do the same: into the zeros that they made they scatter a gradient,
on what they made they go on computing; of tensors that Python dispatches they make others instead.
Those are written in place here too.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EngineAdds"]

_ADD: Final = torch.ops.aten.add.Tensor
_ADD_IN_PLACE: Final = torch.ops.aten.add_.Tensor
_LOGITS: Final = "BinaryCrossEntropyWithLogitsBackward0"
_OF_LOGITS: Final = {
    torch.ops.aten.mul.Tensor: torch.ops.aten.mul_.Tensor,
    torch.ops.aten.sub.Tensor: torch.ops.aten.sub_.Tensor,
}
_WRITTEN_BY_FORMULA: Final[dict[Any, Any]] = {
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    **_OF_LOGITS,
}


class EngineAdds:
    """Tells the engine's own additions, and which of them it would make in place, on ``device``.

    It must be told of every result made in backward (``made``): what a node adds within its own
    formula is made and added under that same node, what the engine adds comes from two.
    """

    def __init__(self, device: str) -> None:
        self._makers: dict[int, int] = {}  # storage -> sequence number of the node that made it
        self._sole_uses = _sole_uses(device)

    def operator(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return what the engine would run unwatched: ``func``, or its in-place form."""
        if func is _ADD and self._added_by_engine(args) and self._may_overwrite(args):
            return _ADD_IN_PLACE
        if func in _WRITTEN_BY_FORMULA and self._goes_on_in_formula(func, args):
            return _WRITTEN_BY_FORMULA[func]
        return func

    def made(self, storage: int) -> None:
        """Note that a storage has just been allocated."""
        if torch._C._current_graph_task_id() != -1:
            self._makers[storage] = _current_node()

    def forget(self, storage: int) -> None:
        """Note that a storage has died."""
        self._makers.pop(storage, None)

    def _added_by_engine(self, args: tuple[Any, ...]) -> bool:
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return False
        if not all(isinstance(arg, Tensor) for arg in args) or _called_by_python():
            return False
        storage = args[0].untyped_storage()._cdata
        return self._makers.get(storage, _NO_NODE) != _current_node()

    def _goes_on_in_formula(self, func: Any, args: tuple[Any, ...]) -> bool:
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return False
        if not isinstance(args[0], Tensor) or _called_by_python():
            return False
        node: Any = torch._C._current_autograd_node()
        if node is None or (func in _OF_LOGITS and node.name() != _LOGITS):
            return False
        storage = args[0].untyped_storage()._cdata
        return self._makers.get(storage, _NO_NODE) == _current_node()

    def _may_overwrite(self, args: tuple[Any, ...]) -> bool:
        return _uses(args) == self._sole_uses and _is_dense(args[0])


_NO_NODE = -1
_TORCH: Final = os.path.dirname(torch.__file__) + os.sep


def _is_dense(tensor: Tensor) -> bool:
    """Whether each value has a place of its own and no place lies between them, in any order."""
    expected = 1
    for stride, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side != 1:
            if stride != expected:
                return False
            expected *= side
    return True


def _current_node() -> int:
    node: Any = torch._C._current_autograd_node()
    return _NO_NODE if node is None else int(node._sequence_nr())


def _called_by_python() -> bool:
    """Whether code of a person runs the operator: a Function's backward, a hook, a recomputation.

    On the CPU the engine runs in the thread that asked for it; on a GPU in a thread of its own,
    where below the engine there is no Python at all.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "__torch_dispatch__":
        frame = frame.f_back
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if not frame.f_code.co_filename.startswith(_TORCH):
            return True
        frame = frame.f_back
    return False


def _uses(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Return how many references there are to the first of ``args``, ours included.

    Torch's to the tensor and to its storage; and Python's, all of which are one to torch, so no
    name here may hold the tensor itself.
    """
    of_storage = torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)
    return int(args[0]._use_count()), int(of_storage), sys.getrefcount(args[0])


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reads ``_uses`` of a gradient that the engine alone holds."""

    uses = (0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and torch._C._current_graph_task_id() != -1:
            self.uses = _uses(args)
        return func(*args, **(kwargs or {}))


def _sole_uses(device: str) -> tuple[int, int, int]:
    """Return what ``_uses`` gives, on this torch, for a gradient that nothing else holds."""
    with torch.enable_grad():
        read_twice = torch.ones(1, device=device, requires_grad=True) * 1
        end = read_twice.sin() + read_twice.cos()
    with _Probe() as probe:  # type: ignore[no-untyped-call]
        torch.autograd.grad(end, read_twice)
    uses: tuple[int, int, int] = probe.uses
    return uses
