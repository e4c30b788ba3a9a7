"""What the in-place norms share: checks and the autograd function.

How backward works. z = act(y) is all that was kept. The activation is inverted in z's own
storage, giving y = g * xhat + b with g = |weight| + eps, and the gradient of the input is written
there. The caller's gradient tensor is only read: where z is summed with a skip, autograd hands the
same tensor to both branches. Both directions are one operator each, ``memsave/in_place_norm_ops``.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.in_place_abn_maths import Activation
from memsave.in_place_guard import (
    differentiable_once,
    overwrite,
    refuse_second_pass,
    result_to_overwrite,
)
from memsave.in_place_norm_ops import (
    ForwardSettings,
    overwrite_with_gradient,
    overwrite_with_norm,
)

__all__ = ["check_activation", "check_input", "run_in_place_norm", "take_keys_of_pair"]


def run_in_place_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    groups: int | None,
    use_running: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    activation_param: float,
) -> Tensor:
    """Overwrite ``x`` and return the result, another tensor of its storage where that can be.

    Then a later use of ``x`` itself is an InputError: its reader would get z in its place.
    """
    return overwrite(
        _InPlaceNorm, x, weight, bias, running_mean, running_var,
        (groups, use_running, momentum, eps, activation, activation_param),
    )  # fmt: skip


class _InPlaceNorm(torch.autograd.Function):
    # Kept for backward: z, which aliases x; weight, bias and 1/std, of C elements. Not kept: x.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        settings: ForwardSettings,
        as_alias: bool,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            z = x.clone()  # a compiler makes everything out of place, then takes copies out again
        elif as_alias:
            z = x.detach()
        else:
            z = x
            ctx.mark_dirty(x)
        rstd = overwrite_with_norm(z, weight, bias, running_mean, running_var, settings)
        ctx.save_for_backward(z, weight, bias, rstd)
        groups, use_running, _, *others = settings
        ctx.settings = (groups, use_running, *others)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_pass(ctx)
        z, weight, bias, rstd = ctx.saved_tensors
        with torch.no_grad():
            z = result_to_overwrite(ctx, z)
            d_weight, d_bias = overwrite_with_gradient(z, dz, weight, bias, rstd, ctx.settings)
            gradients = (
                z,
                None if weight is None else d_weight.to(weight.dtype),
                None if bias is None else d_bias.to(bias.dtype),
            )
        return differentiable_once((*gradients, *(None,) * 4))


def take_keys_of_pair(state_dict: dict[str, Any], prefix: str) -> None:
    """Rename what ``nn.Sequential(norm, activation)`` calls its norm's numbers as one layer does.

    So that a plain network's weights load where one layer has taken the place of such a pair.
    """
    of_norm = f"{prefix}0."
    for key in [k for k in state_dict if k.startswith(of_norm)]:
        ours = prefix + key.removeprefix(of_norm)
        if ours not in state_dict:
            state_dict[ours] = state_dict.pop(key)


def check_activation(norm: str, activation: str, param: float) -> None:
    """Raise UnknownNameError or OptionError unless ``activation`` can be inverted."""
    if activation not in get_args(Activation):
        raise UnknownNameError(f"activation of {norm}", activation, get_args(Activation))
    if activation != "identity" and not param > 0:
        raise OptionError(
            f"activation_param must be more than 0, got {param}: {activation} cannot be inverted"
        )


def check_input(norm: str, x: Tensor, **per_channel: Tensor | None) -> None:
    """Raise InputError unless ``x`` is (N, C, *), floating point, and may be overwritten.

    And unless all that is ``per_channel`` has its channels, and is where it is.
    """
    if not x.is_floating_point():
        raise InputError(f"{norm} needs a floating-point input, got {x.dtype}")
    if x.dim() < 2:
        raise InputError(f"{norm} needs an input (N, C, *), got shape {tuple(x.shape)}")
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        if tensor.numel() != x.shape[1]:
            raise InputError(
                f"{norm} has {tensor.numel()} channels ({name}), "
                f"got an input with {x.shape[1]}: shape {tuple(x.shape)}"
            )
        if tensor.device != x.device:
            raise InputError(
                f"{norm} has its {name} on {tensor.device}, got an input on {x.device}: "
                "move one of them to the other's device"
            )
    strides = x.stride()
    if 0 in strides and any(n > 1 and s == 0 for n, s in zip(x.shape, strides, strict=True)):
        raise InputError(
            f"{norm} overwrites its input, which is expanded here (strides {strides}): "
            "give it a tensor of its own, such as x.clone()"
        )
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{norm} overwrites its input, which is a leaf that requires grad here: "
            "give it the output of another operation, such as x.clone()"
        )
