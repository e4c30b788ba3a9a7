"""Who else reads the input of an in-place norm, and a second backward pass: both refused clearly.

An in-place norm overwrites its input with its result, and in backward its result with a gradient.
Whoever reads either of them later would get other numbers than the network means, with no error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memsave.errors import BackwardError, InputError

__all__ = [
    "Overwritten",
    "differentiable_once",
    "overwrite",
    "refuse_second_pass",
    "result_to_overwrite",
]


def overwrite(function: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Tensor:
    """Run ``function.apply(x, *arguments, as_alias)``, which overwrites x; refuse later uses of x.

    Where ``as_alias``, the function works on ``x.detach()`` and returns that: a tensor of x's
    storage and version count, so that whoever kept x for backward still sees the change. A view
    is marked dirty instead, for the sake of its base's history, and its result gets an alias.
    Neither a compiler's nor a fake tensor is guarded.
    """
    guarded = not torch.compiler.is_compiling() and type(x) is Tensor
    as_alias = guarded and not (torch.is_grad_enabled() and x._is_view())
    z: Tensor = function.apply(x, *arguments, as_alias)  # type: ignore[no-untyped-call]
    if guarded:
        if z is x:
            z = torch.ops.aten.alias.default(x)
        x.__class__ = Overwritten
    return z


class Overwritten(Tensor):
    """A tensor whose values an in-place norm has overwritten: what reads it is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Let what tells of the tensor through, without its values; refuse everything else."""
        if func not in _HARMLESS:
            raise InputError(
                f"{getattr(func, '__name__', func)} reads the input of an in-place norm after it "
                "was overwritten: use the norm's result, or give the norm a copy (x.clone()), or "
                "take memsave.RecomputedNormAct, which is lossless and not in place"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Overwritten(shape={tuple(self.shape)})"


_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "nbytes",
    "itemsize",
    "is_cuda",
    "is_leaf",
    "requires_grad",
    "grad",  # of x, which is right: only its values are gone
    "grad_fn",
    "_version",
)
_HARMLESS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor._is_view,
    Tensor.register_hook,
}


def result_to_overwrite(ctx: Any, z: Tensor) -> Tensor:
    """Return what this backward pass may write the gradient over: z itself, but for two cases.

    Under a compiler a copy, which it takes out again. In float64 a copy where the graph is kept:
    nobody trains in it, and ``torch.autograd.gradcheck`` asks for pass after pass. Else a graph
    that is kept would cost an activation a layer in silence, so it is walked once all the same.
    """
    if torch.compiler.is_compiling():
        return z.clone()
    if torch._C._autograd._get_current_graph_task_keep_graph():
        if z.dtype == torch.float64:
            return z.clone()
        ctx.is_spent = True
    # Detached, what happens to it still counts as a change of z, but it has no history.
    return z.detach()


def refuse_second_pass(ctx: Any) -> None:
    """Raise BackwardError if this node's backward has overwritten its result before."""
    if not torch.compiler.is_compiling() and getattr(ctx, "is_spent", False):
        raise BackwardError(
            "an in-place norm has no second backward pass, with retain_graph=True either: the "
            "first one wrote the gradient over its result. Add the losses and call backward() "
            "once, or take memsave.RecomputedNormAct, which is lossless"
        )


def differentiable_once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return ``gradients``, which raise BackwardError where they are differentiated in turn."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    given = [None if g is None else g.detach().requires_grad_() for g in gradients]
    refused: tuple[Tensor | None, ...] = _NoSecondDerivative.apply(*given)  # type: ignore[no-untyped-call]
    return refused


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:  # noqa: ARG004
        raise BackwardError(
            "an in-place norm has no double backward: its gradient cannot be differentiated "
            "(create_graph=True). Take memsave.RecomputedNormAct, which is lossless, or a plain "
            "norm and activation"
        )
