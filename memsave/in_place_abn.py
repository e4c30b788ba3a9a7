"""BatchNorm and activation written over their input, keeping only the result for backward.

Source: Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, arXiv:1712.02616. Names and defaults are those of its reference
implementation, so that its users change an import; the code is plain PyTorch, on any device.

How backward works. z = act(y) is all that was kept. The activation is inverted in z's own
storage, giving y = g * xhat + b with g = |weight| + eps, and the gradient of the input is written
over that, a few channels at a time: what is needed besides stays below ``CHUNK_ELEMENTS``
elements a temporary, whatever the activation's size. The caller's gradient tensor is only read:
where z is summed with a skip, autograd hands the same tensor to both branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from memsave.errors import InputError, OptionError, UnknownNameError

__all__ = ["Activation", "InPlaceABN", "in_place_abn"]

Activation = Literal["leaky_relu", "elu", "identity"]
ACTIVATIONS: tuple[Activation, ...] = ("leaky_relu", "elu", "identity")

# A temporary of backward holds an eighth of the activation's bytes: smaller ones would cost more
# in launches, and in tracing, than they save. Below SMALL_ELEMENTS (4 MiB in float32) nothing is
# worth saving.
PARTS = 8
SMALL_ELEMENTS = 2**20


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
    compute = _compute_dtype(x)
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
        scale, shift = _scale_and_shift(x, weight, bias, eps)
        rstd = _normalise_(
            x, scale, shift, running_mean, running_var, batch_statistics, momentum, eps
        )
        _activate_(x, activation, activation_param)
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
        scale, shift = _scale_and_shift(z, weight, bias, ctx.eps)
        d_scale, d_shift = _backward_(
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


def _scale_and_shift(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return g and b of each channel, in the type that statistics are computed in."""
    channels, dtype = x.shape[1], _compute_dtype(x)
    if weight is None:
        scale = torch.ones(channels, dtype=dtype, device=x.device)
    else:
        scale = weight.detach().to(dtype).abs() + eps
    if bias is None:
        return scale, torch.zeros(channels, dtype=dtype, device=x.device)
    return scale, bias.detach().to(dtype)


def _normalise_(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Overwrite ``x`` with its batch norm, update the running statistics, return 1/std."""
    # Without batch statistics the operator has none to return.
    mean, rstd = (scale.new_empty(scale.numel() if batch_statistics else 0) for _ in range(2))
    arguments = (x, scale, shift, running_mean, running_var, batch_statistics, momentum, eps)
    if _is_dense(x):
        torch.ops.aten.native_batch_norm.out(*arguments, out=x, save_mean=mean, save_invstd=rstd)
    else:  # the CPU's kernel goes wrong on such a layout when it writes over its input
        result, mean, rstd = torch.native_batch_norm(*arguments)
        x.copy_(result)
    if batch_statistics:
        return rstd
    assert running_var is not None
    return torch.rsqrt(running_var + eps)


def _activate_(y: Tensor, activation: Activation, param: float) -> None:
    if activation == "leaky_relu":
        F.leaky_relu_(y, param)
    elif activation == "elu":
        F.elu_(y, param)


def _invert_(z: Tensor, activation: Activation, param: float) -> None:
    """Overwrite ``z = act(y)`` with y."""
    if activation == "leaky_relu":
        F.leaky_relu_(z, 1 / param)
    elif activation == "elu":
        # Rounding takes ELU to exactly -alpha, whose y would be -inf; the nearest above has one.
        nearest = -1 + torch.finfo(z.dtype).eps / 2
        negative = torch.log1p((z / param).clamp_(nearest, 0))
        z.clamp_(min=0).add_(negative)


def _activation_backward(dz: Tensor, z: Tensor, activation: Activation, param: float) -> Tensor:
    """Return the gradient of y, in a tensor of its own unless the activation is the identity."""
    dy = dz
    if activation == "leaky_relu":
        dy = torch.ops.aten.leaky_relu_backward(dz, z, param, True)
    elif activation == "elu":
        dy = torch.ops.aten.elu_backward(dz, param, 1, 1, True, z)
    return dy


def _backward_(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
    activation: Activation,
    activation_param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``z`` with the gradient of x, return those of scale and shift. ``dz`` is read.

    Channels are independent of each other, so a few at a time keep the temporaries small.
    """
    step = _channels_at_once(z, parts=PARTS * scale.itemsize // z.itemsize)
    per_channel = (1, -1) + (1,) * (z.dim() - 2)
    whole = (z, dz, *(t.view(per_channel) for t in (scale, shift, rstd)))
    sums = []
    for z_part, dz_part, *channel in zip(*(torch.split(t, step, 1) for t in whole), strict=True):
        sums.append(
            _backward_part_(
                z_part, dz_part, channel, batch_statistics, activation, activation_param
            )
        )
    d_scale, d_shift = (torch.cat(parts, 1).flatten() for parts in zip(*sums, strict=True))
    return d_scale, d_shift


def _backward_part_(
    z: Tensor,
    dz: Tensor,
    channel: Sequence[Tensor],
    batch_statistics: bool,
    activation: Activation,
    activation_param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite some channels of z with their gradient; a function, so that its tensors die."""
    dtype = channel[0].dtype
    y = z.to(dtype)  # z itself, unless half
    dy = _activation_backward(dz.to(dtype), y, activation, activation_param)
    _invert_(y, activation, activation_param)
    sums = _norm_backward_(y, dy, channel, batch_statistics)
    if y is not z:
        z.copy_(y)
    return sums


def _channels_at_once(z: Tensor, parts: int) -> int:
    channels = max(1, z.shape[1])
    step = max(math.ceil(channels / parts), SMALL_ELEMENTS * channels // max(1, z.numel()))
    # Channels last: neighbours in memory are read together or wasted.
    return min(channels, step if z.is_contiguous() else max(step, 16))


def _norm_backward_(
    y: Tensor, dy: Tensor, channel: Sequence[Tensor], batch_statistics: bool
) -> tuple[Tensor, Tensor]:
    """Overwrite ``y = scale * xhat + shift`` with the gradient of x; ``dy`` is read.

    ``channel`` is scale, shift and 1/std, each (1, C, 1, ...).
    dx = scale * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), without the means where the
    statistics did not come from the batch. Returns sum(dy * xhat) and sum(dy) of each channel.
    """
    scale, shift, rstd = channel
    others = [d for d in range(y.dim()) if d != 1]
    centred = y.sub_(shift)
    d_shift = dy.sum(others, keepdim=True)
    d_scale = (dy * centred).sum(others, keepdim=True) / scale
    gain = scale * rstd
    if not batch_statistics:
        torch.mul(dy, gain, out=y)
        return d_scale, d_shift
    share = y.shape[1] / max(1, y.numel())
    torch.addcmul(d_shift * gain * -share, centred, d_scale * rstd * -share, out=y)
    y.addcmul_(dy, gain)
    return d_scale, d_shift


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` lies in memory in the order of its dimensions, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def _check_activation(activation: str, param: float) -> None:
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation of in-place ABN", activation, ACTIVATIONS)
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
