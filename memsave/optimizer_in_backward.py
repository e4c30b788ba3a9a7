"""The optimizer's step within backward: each gradient is used as soon as it is there, and freed.

After an ordinary backward the gradients of all parameters are alive, as many bytes as the weights.
Here a parameter is updated the moment its gradient is complete, so that about one gradient is
alive at a time, and ``optimizer.step()`` finds nothing left to do.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
arXiv:2306.09782, section 3 (fused update); ``Tensor.register_post_accumulate_grad_hook``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from memsave.errors import BackwardError, OptionError

__all__ = ["optimizer_in_backward"]


def optimizer_in_backward(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make ``optimizer`` update its parameters while backward runs; return the same optimizer.

    The training loop stays as it is, ``optimizer.step()`` included: it ends the step. State,
    ``state_dict``, parameter groups and learning-rate schedules are the optimizer's own, so a
    saved state loads with or without this technique. Call it once all parameters are where they
    stay; those of a group added later take part too::

        optimizer = memsave.optimizer_in_backward(torch.optim.Adam(model.parameters()))

    Memory: of the gradients, as many bytes as the parameters, those of one parameter are alive at
        a time, and those that backward has begun and not finished: a parameter that is used in
        several places, such as a recurrent step's, has its gradient until the last of them. None
        is left after backward. State and temporaries of an update are those of one parameter.
    Exact: parameters and state equal those of the ordinary loop, bit for bit: every optimizer here
        treats each parameter by itself. Not for what looks at all gradients at once.
    Excludes: clipping by the global norm, which would find no gradients, and change nothing,
        without an error; gradient accumulation and a second backward; fp16 loss scaling
        (``GradScaler``, ``MixedPrecision("fp16")``), which must see all gradients to skip a step:
        use bf16; closures; hooks on the optimizer's step; weights that are read again by a
        backward after their own update (a parameter's uses all come before it).
    Errors: OptionError for an optimizer that needs all gradients at once (LBFGS) or has step
        hooks or a learning-rate scheduler already, and for a closure. BackwardError for a second
        backward before ``step()``, for loss scaling, and for a gradient that is there at
        ``step()`` though no backward made it.
    """
    kind = type(optimizer)
    if issubclass(kind, _InBackward):
        return optimizer
    if issubclass(kind, torch.optim.LBFGS):
        raise OptionError(
            f"{kind.__name__} needs all gradients at once, so it cannot step within backward: "
            "take an optimizer such as SGD, Adam, AdamW or RMSprop"
        )
    if "step" in vars(optimizer):
        raise OptionError(
            f"the step of this {kind.__name__} was replaced, by a learning-rate scheduler most "
            "likely: make the scheduler after optimizer_in_backward"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise OptionError(
            f"this {kind.__name__} has hooks on its step, which would run once for each parameter: "
            "remove them, or leave optimizer_in_backward out"
        )
    state = vars(optimizer)
    state["_plain_step"] = _unbound_step(kind)
    state["_updated"] = set()
    optimizer.__class__ = _class_of(kind)  # type: ignore[arg-type]
    for parameter in _parameters(optimizer):
        _attach(optimizer, parameter)
    return optimizer


class _InBackward(torch.optim.Optimizer):
    """The part of the optimizer's class that is ours; the rest is its own class."""

    _plain_step: Any
    _updated: set[int]  # the parameters that this step has updated
    # GradScaler hands its scale over instead of failing on what it does not find, so that we
    # can say what is wrong.
    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """End the step: all parameters that have a gradient in it are updated already."""
        if closure is not None:
            raise OptionError(
                "optimizer_in_backward takes no closure: run forward and backward before step()"
            )
        if getattr(self, "grad_scale", None) is not None:
            raise BackwardError(
                "optimizer_in_backward has updated the parameters with scaled gradients: a loss "
                "scale cannot be taken off within backward, so train in bf16 or fp32"
            )
        left = sum(p.grad is not None for p in _parameters(self))
        if left:
            raise BackwardError(
                f"{left} parameters have gradients that no backward made since the technique "
                "optimizer_in_backward: set them by backward alone, or leave the technique out"
            )
        self._updated.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group, and update its parameters within backward too."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            _attach(self, parameter)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OptionError(
            "an optimizer in backward belongs to the parameters of its model and cannot be copied "
            "or pickled: save its state_dict(), which is the plain optimizer's"
        )

    def _update(self, parameter: Tensor) -> None:
        """Let the plain optimizer see one parameter alone, and free its gradient."""
        if id(parameter) in self._updated:
            raise BackwardError(
                "a second backward before optimizer.step(): optimizer_in_backward has used and "
                "freed the first one's gradients, so they cannot be accumulated; step after each"
            )
        self._updated.add(id(parameter))
        groups = self.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        parameters = group["params"]
        group["params"], self.param_groups = [parameter], [group]
        try:
            self._plain_step(self)
        finally:
            group["params"], self.param_groups = parameters, groups
        parameter.grad = None


@functools.cache
def _class_of(plain: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    return type(f"{plain.__name__}InBackward", (_InBackward, plain), {"__doc__": plain.__doc__})


def _unbound_step(kind: type[torch.optim.Optimizer]) -> Any:
    """Return the step without torch's wrapping for profiles and hooks, which is one a step."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _attach(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    trained = parameter.requires_grad
    parameter.requires_grad_()  # a frozen one may be thawed later, and takes no hook before
    attach: Any = parameter.register_post_accumulate_grad_hook
    attach(optimizer._update)  # type: ignore[attr-defined]
    parameter.requires_grad_(trained)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
