"""Norm and activation whose result is made again in backward, instead of being kept: lossless.

A convolution keeps its input for backward. Where that is ``z = act(norm(x))``, x is kept as well,
and z is only one elementwise pass away from it. Inside ``recompute`` every layer that would keep z
keeps the way to it, so x alone stays: the bytes of in-place ABN, with any norm, with an activation
that cannot be inverted, and with the gradients of the plain pair, bit for bit.

Source: the elementwise recomputation of Chen, Xu, Zhang, Guestrin, "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174, section 3; by what autograd saves, after
``torch.autograd.graph.saved_tensors_hooks``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from memsave.errors import OptionError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.recompute_scope import Scope, active_hooks, active_scope

__all__ = ["Order", "RecomputedNormAct", "attach_recompute", "check_recomputable", "recompute"]

Order = Literal["norm_act", "act_norm"]

# Norms that do not need their own result in backward: an activation may overwrite it.
_NEEDS_INPUT_ALONE = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


class RecomputedNormAct(nn.Module):
    """``activation(norm(x))``, which no layer behind keeps inside ``memsave.recompute``.

    Give it the norm and the activation that stood there: their weights and options stay, and the
    state dict has the norm's own keys, so that it loads a plain model's from the norm's place.

    Shapes: those of the norm.
    Memory: inside ``recompute``, keeps x, ``x.nbytes`` bytes, and what the norm keeps of a
        channel's or group's size; z is kept by no convolution, pooling, product, view or
        checkpointed region that reads it, nor its copy in autocast's type. With
        ``order="act_norm"``, ``norm(activation(x))``, the norm's input is kept, or x where the
        activation keeps x (leaky ReLU not in place). In backward one z lives at a time, made again
        once for the readers that follow each other. ReLU, leaky ReLU and activations with
        ``inplace``, GELU, sigmoid and tanh are applied over the norm's result; others need
        ``x.nbytes`` more while z is made. Outside ``recompute`` it is the plain pair and
        saves nothing; so too inside a checkpointed region, under ``torch.compile``, and where the
        norm or the activation itself has hooks, which might change its result.
        What is made from z is kept as ever: a concatenation, a sum, dropout.
    Exact: output, gradients and running statistics are the plain pair's, bit for bit: the norm
        runs again on the same x, with the same weights, mode and autocast. Statistics of the
        batch come out the same and running ones are changed once. (Bits need kernels that give
        one result for one input, as PyTorch's norms do.) Double backward and ``retain_graph``
        work.
    Errors: OptionError for SyncBatchNorm, which would have to talk to the other processes in
        backward, for in-place norms, and for what draws random numbers (RReLU, dropout).
        RuntimeError in backward if x or a weight has been changed in place since. A change of z
        itself (``z += skip``) is no error: its later readers keep what it became.

    Args:
        norm: BatchNorm, instance, group or layer norm, or a module like them.
        activation: any elementwise module; None for the norm alone.
        order: ``"norm_act"``, or ``"act_norm"`` for ``norm(activation(x))``.
    """

    def __init__(
        self, norm: nn.Module, activation: nn.Module | None = None, *, order: Order = "norm_act"
    ) -> None:
        super().__init__()
        if order not in get_args(Order):
            raise OptionError(f"order must be 'norm_act' or 'act_norm', got {order!r}")
        check_recomputable(norm, activation)
        self.norm = norm
        self.activation = nn.Identity() if activation is None else activation
        self.order = order
        self.activation_named_elsewhere = False  # its weights have a name of their own already
        self.register_state_dict_post_hook(_names_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_names_in)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """Return the norm's attribute: who stood around the norm may read its ``eps``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            norm = self.__dict__.get("_modules", {}).get("norm")
            if norm is None or name.startswith("__"):
                raise
            return getattr(norm, name)

    def forward(self, x: Tensor) -> Tensor:
        """Return norm and activation of ``x``."""
        first, second = self.norm, self.activation
        if self.order == "act_norm":
            first, second = second, first
        scope = None
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            scope = active_scope()
        if scope is None or _has_hooks(first) or _has_hooks(second):
            plain: Tensor = second(first(x))
            return plain
        check_recomputable(self.norm, self.activation)  # somebody may have converted it
        return scope.run(first, second, x, self._may_overwrite())

    def _may_overwrite(self) -> bool:
        """Whether the activation may overwrite the norm's result, with the same gradients."""
        if type(self.activation) is nn.LeakyReLU:
            invertible = self.activation.negative_slope >= 0
        else:
            invertible = type(self.activation) is nn.ReLU
        in_order = self.order == "norm_act"
        return in_order and invertible and isinstance(self.norm, _NEEDS_INPUT_ALONE)

    def extra_repr(self) -> str:
        """Return the order."""
        return f"order={self.order!r}"


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens at the module, and might change what goes in or comes out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def check_recomputable(norm: nn.Module, activation: nn.Module | None) -> None:
    """Raise OptionError, with the reason, where ``RecomputedNormAct`` cannot take the pair."""
    if not isinstance(norm, nn.Module):
        raise OptionError(f"norm must be a module, such as BatchNorm3d(64), got {norm!r}")
    if activation is not None and not isinstance(activation, nn.Module):
        raise OptionError(f"activation must be a module or None, got {activation!r}")
    for module in (*norm.modules(), *(activation.modules() if activation is not None else ())):
        name = type(module).__name__
        if isinstance(module, nn.SyncBatchNorm):
            raise OptionError(
                f"{name} cannot be recomputed, since its statistics come from other processes: "
                "use memsave.InPlaceABNSync, or checkpoint nothing here"
            )
        if isinstance(module, InPlaceABN | InPlaceGroupNorm | InPlaceInstanceNorm):
            raise OptionError(
                f"{name} overwrites its input and keeps its result, so there is nothing to "
                "recompute: give RecomputedNormAct a plain norm"
            )
        if isinstance(module, nn.RReLU | _DropoutNd):
            raise OptionError(
                f"{name} draws random numbers, which a recomputation would not draw again: put it "
                "behind RecomputedNormAct, or take another activation"
            )


def recompute(model: nn.Module) -> AbstractContextManager[None]:
    """Keep no result of a ``RecomputedNormAct`` for backward in this scope.

    Put it around the forward; backward may run inside or after it. It acts on all that runs in
    it, on this thread. Hooks for saved tensors that are set outside (offload, say) get what is
    kept; hooks set inside, checkpointed regions too, keep what they want, as ever. Inside another
    ``recompute``, or in a checkpointed region, it changes nothing.

    Memory, Exact: see ``RecomputedNormAct``.
    Errors: OptionError if ``model`` has no ``RecomputedNormAct``. RuntimeError in backward if
        what a layer keeps was changed in place since, as without it.
    """
    _check_has_pairs(model)
    return _scope() if not torch.compiler.is_compiling() else nullcontext()


def _check_has_pairs(model: nn.Module) -> None:
    if not any(isinstance(module, RecomputedNormAct) for module in model.modules()):
        raise OptionError(
            f"{type(model).__name__} has no RecomputedNormAct, so there is nothing to recompute: "
            "put memsave.RecomputedNormAct(norm, activation) in place of its pairs"
        )


@contextmanager
def _scope() -> Iterator[None]:
    outer = active_hooks()
    if outer is not None and (active_scope() is not None or _is_checkpoint(outer[0])):
        yield
        return
    scope = Scope(outer)
    try:
        with saved_tensors_hooks(scope.pack, scope.unpack):
            yield
    finally:
        scope.close()


def attach_recompute(model: nn.Module) -> nn.Module:
    """Run every forward of ``model`` in ``recompute``; return the same model.

    Attached twice it acts once. The scope ends with the forward, so what reads the model's own
    result, such as a loss, keeps it.

    Errors: OptionError if ``model`` has no ``RecomputedNormAct``.
    """
    _check_has_pairs(model)
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter, prepend=True)
        model.register_forward_hook(_leave, always_call=True)
    return model


class _Open(threading.local):
    """The scopes that attached models have open, on each thread."""

    def __init__(self) -> None:
        self.scopes: list[tuple[nn.Module, AbstractContextManager[None]]] = []


_OPEN = _Open()


def _enter(model: nn.Module, _args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    scope = _scope()
    scope.__enter__()
    _OPEN.scopes.append((model, scope))


def _leave(model: nn.Module, _args: Any, _result: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if _OPEN.scopes and _OPEN.scopes[-1][0] is model:  # a hook before ours may have failed
        _OPEN.scopes.pop()[1].__exit__(None, None, None)


def _is_checkpoint(pack: Any) -> bool:
    return getattr(pack, "__module__", "") == "torch.utils.checkpoint"


def _names_out(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Give the norm's weights the names that they had in the norm's place."""
    assert isinstance(module, RecomputedNormAct)
    for key in [k for k in state if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.startswith("norm."):
            state[prefix + name.removeprefix("norm.")] = state.pop(key)
        elif module.activation_named_elsewhere:
            del state[key]


def _names_in(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
    _missing: list[str], _unexpected: list[str], _errors: list[str],
) -> None:  # fmt: skip
    """Take the norm's weights under the names that they have in the norm's place."""
    assert isinstance(module, RecomputedNormAct)
    for key in [k for k in state if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith(("norm.", "activation.")):
            state[f"{prefix}norm.{name}"] = state.pop(key)
    if module.activation_named_elsewhere:
        # the same parameters are loaded under their own name; here they are what they are
        for name, value in module.activation.state_dict().items():
            state[f"{prefix}activation.{name}"] = value
