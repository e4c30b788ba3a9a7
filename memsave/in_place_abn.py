"""BatchNorm and activation written over their input, keeping only the result for backward.

Source: Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, arXiv:1712.02616. Names and defaults are those of its reference
implementation, so that its users change an import; the code is plain PyTorch, on any device.

How backward works. z = act(y) is all that was kept. The activation is inverted in z's own
storage, giving y = g * xhat + b with g = |weight| + eps, and the gradient of the input is written
over that, a few channels at a time, so that temporaries stay a fraction of the activation. The
caller's gradient tensor is only read: where z is summed with a skip, autograd hands the same
tensor to both branches. The arithmetic is in ``memsave/in_place_abn_maths.py``.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.in_place_abn_maths import (
    Activation,
    activate_,
    backward_,
    compute_dtype,
    normalise_,
    scale_and_shift,
)

__all__ = ["Activation", "InPlaceABN", "in_place_abn"]


def in_place_abn(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation = "leaky_relu",
    activation_param: float = 0.01,
) -> Tensor:
    """BatchNorm, then activation, of ``x``, written over ``x`` and, in backward, over the result.

    Computes ``act((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias)`` per channel, with the
    batch's statistics in training (biased variance) and the running ones otherwise. The scale is
    kept away from 0, and positive, because backward divides by it.

    Shapes: ``x`` and result ``(N, C, *)``, any number of sides, floating point, one storage; the
        others ``(C,)``. ``weight`` and ``bias`` may be of a wider type than ``x``: with half
        activations, statistics, weights and their gradients stay float32.
    Memory: keeps z, ``x.nbytes`` bytes, which the next layer keeps anyway, and 1/std, one number
        a channel; BatchNorm and activation keep ``x.nbytes`` more. Forward has no temporary of an
        activation's size. Backward has two at a time (leaky ReLU; three in half precision, where
        it computes in float32) of ``x.nbytes / 8``, or of 4 MiB if that is more; of 16 channels
        at least where x is not contiguous (channels last).
    Exact: the result is that of BatchNorm with weight ``|weight| + eps`` and the activation, bit
        for bit with leaky ReLU. For the gradients xhat is read off the result, which gives it
        within ``2 u (|xhat| + |bias| / g)``, u being half the type's ``finfo.eps``: float32
        6e-8, float16 5e-4, bfloat16 4e-3. So a scale g near 0 beside a bias loses xhat, and with
        it the weight's gradient; float16 adds ``3e-8 / (slope g)`` near zero, where its numbers
        are evenly spaced. ELU loses what lies below about ``log(u)``, where its own slope is u.
    Errors: InputError if ``x`` is not floating point, has the wrong channels or but one value a
        channel in training, or is a leaf that requires grad. RuntimeError, autograd's
        own, in backward: if the producer of ``x`` needs its output, if z was changed in place, or
        for a double backward. ``retain_graph=True`` works, on a copy of z.

    Danger, unchecked: another reader of ``x`` (a pre-activation residual) sees the result in its
    place; and once backward has run, z holds a gradient: take what is to be logged of it before.
    """
    _check_activation(activation, activation_param)
    _check_input(x, weight, running_mean, training)
    compute = compute_dtype(x)
    batch_statistics = training or running_mean is None or running_var is None
    updated = [b for b in (running_mean, running_var) if b is not None and batch_statistics]
    # Statistics in half would overflow or stall, so they are computed beside the buffers.
    running = [b if b is None else b.to(compute) for b in (running_mean, running_var)]
    z: Tensor = _InPlaceABN.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, *running, batch_statistics, momentum, eps, activation, activation_param
    )
    for buffer, value in zip(updated, running, strict=False):
        if value is not None and value is not buffer:
            buffer.copy_(value)
    return z


class InPlaceABN(_NormBase):
    """BatchNorm with its activation, over its input: ``in_place_abn`` as a layer.

    Takes the place of ``nn.Sequential(BatchNorm3d(n), LeakyReLU(0.01))`` after a convolution, with
    1D, 2D or 3D input. Its state dict is BatchNorm's, so that either loads the other's; but a
    negative weight acts as its absolute value here.

    Args:
        num_features: channels.
        eps: added to the variance, and to ``|weight|``.
        momentum: share of the batch in the running statistics; None for their plain average.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without, evaluation uses the
            batch's too.
        activation: ``"leaky_relu"``, ``"elu"`` or ``"identity"`` (ReLU cannot be inverted).
        activation_param: slope of leaky ReLU, alpha of ELU; more than 0.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Activation = "leaky_relu",
        activation_param: float = 0.01,
    ) -> None:
        _check_activation(activation, activation_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.activation = activation
        self.activation_param = activation_param

    def forward(self, x: Tensor) -> Tensor:
        """Return ``in_place_abn`` of ``x``, which is overwritten."""
        return in_place_abn(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self._count_batch(),
            self.eps,
            self.activation,
            self.activation_param,
        )

    def _count_batch(self) -> float:
        """Count one batch if it changes the running statistics; return its share in them."""
        if not self.training or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    def extra_repr(self) -> str:
        """Return BatchNorm's options and the activation."""
        norm = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{norm}, activation={self.activation}[{self.activation_param}]"


class _InPlaceABN(torch.autograd.Function):
    # Kept for backward: z, which aliases x; weight, bias and 1/std, of C elements. Not kept: x.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batch_statistics: bool,
        momentum: float,
        eps: float,
        activation: Activation,
        activation_param: float,
    ) -> Tensor:
        scale, shift = scale_and_shift(x, weight, bias, eps)
        rstd = normalise_(
            x, scale, shift, running_mean, running_var, batch_statistics, momentum, eps
        )
        activate_(x, activation, activation_param)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, rstd)
        ctx.batch_statistics, ctx.eps = batch_statistics, eps
        ctx.activation, ctx.activation_param = activation, activation_param
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, rstd = ctx.saved_tensors
        # Detached, what happens to it still counts as a change of z, but it has no history. With
        # retain_graph somebody may come back for z.
        z = z.clone() if _graph_is_kept() else z.detach()
        scale, shift = scale_and_shift(z, weight, bias, ctx.eps)
        d_scale, d_shift = backward_(
            z, dz, scale, shift, rstd, ctx.batch_statistics, ctx.activation, ctx.activation_param
        )
        d_weight = d_bias = None
        if weight is not None:
            d_weight = torch.where(weight < 0, -d_scale, d_scale).to(weight.dtype)
        if bias is not None:
            d_bias = d_shift.to(bias.dtype)
        return z, d_weight, d_bias, *(None,) * 7


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was called with ``retain_graph=True``."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _check_activation(activation: str, param: float) -> None:
    if activation not in get_args(Activation):
        raise UnknownNameError("activation of in-place ABN", activation, get_args(Activation))
    if activation != "identity" and not param > 0:
        raise OptionError(
            f"activation_param must be more than 0, got {param}: {activation} cannot be inverted"
        )


def _check_input(
    x: Tensor, weight: Tensor | None, running_mean: Tensor | None, training: bool
) -> None:
    if not x.is_floating_point():
        raise InputError(f"in-place ABN needs a floating-point input, got {x.dtype}")
    if x.dim() < 2:
        raise InputError(f"in-place ABN needs an input (N, C, *), got shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("running_mean", running_mean)):
        if tensor is not None and tensor.numel() != x.shape[1]:
            raise InputError(
                f"in-place ABN has {tensor.numel()} channels ({name}), "
                f"got an input with {x.shape[1]}: shape {tuple(x.shape)}"
            )
    if (training or running_mean is None) and x.numel() <= x.shape[1]:
        raise InputError(
            "in-place ABN needs more than one value per channel to train, "
            f"got an input of shape {tuple(x.shape)}"
        )
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "in-place ABN overwrites its input, which is a leaf that requires grad here: "
            "give it the output of another operation, such as x.clone()"
        )
