"""BatchNorm and activation written over their input, keeping only the result for backward.

Source: Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, arXiv:1712.02616. Names and defaults are those of its reference
implementation, so that its users change an import. How backward works is told in
``memsave/in_place_norm.py``; the arithmetic is in ``memsave/kernels`` for CUDA, and in
``memsave/in_place_abn_maths.py`` and ``memsave/in_place_backward_maths.py`` for what they do not
take.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from memsave.errors import InputError
from memsave.in_place_abn_maths import Activation
from memsave.in_place_norm import (
    check_activation,
    check_input,
    run_in_place_norm,
    take_keys_of_pair,
)

__all__ = ["Activation", "InPlaceABN", "in_place_abn"]

_NAME = "in-place ABN"


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
        a channel; BatchNorm and activation keep ``x.nbytes`` more. On CUDA neither forward nor
        backward has a temporary of an activation's size, only partial sums, at most a few thousand
        numbers or two a channel. The plain maths (CPU, float64, places at uneven distances) has
        none in forward; in backward it works on some channels at a time, or on some places where
        they lie channels last, with one temporary of ``x.nbytes / 8`` (or of 2^22 elements, if
        that is more), two where these do not lie side by side as the statistics' type: several
        samples, half precision, channels last (there of an eighth of a sample).
    Exact: the result is that of BatchNorm with weight ``|weight| + eps`` and the activation: bit
        for bit with leaky ReLU in the plain maths, within a rounding of the type on CUDA. For the
        gradients xhat is read off the result, which gives it within ``2 u (|xhat| + |bias| / g)``,
        u being half the type's ``finfo.eps``: float32 6e-8, float16 5e-4, bfloat16 4e-3. It
        cannot hold, then: a scale g near 0 beside a bias, where xhat and with it the weight's
        gradient are lost; float16 with a small slope, where its numbers, evenly spaced near zero,
        add ``3e-8 / (slope g)``; ELU below about ``log(u)``, where its own slope is u. Constant
        channels and huge means cost what they cost BatchNorm, ``|mean| / std`` roundings of
        float32. Where that is too much, take ``memsave.RecomputedNormAct``: as few bytes, and
        exact to the bit.
    Errors: InputError if ``x`` is not floating point, has the wrong channels or but one value a
        channel in training, is expanded, is on another device than the others, or is a leaf that
        requires grad; and where ``x`` itself is used afterwards (by a pre-activation residual,
        say), with and without gradients.
        BackwardError, a RuntimeError too, for a second backward (``retain_graph=True`` costs
        nothing and gives one pass all the same; in float64, for ``gradcheck``, passes work on
        copies) and for a double backward. RuntimeError, autograd's own, in backward: if the
        producer of ``x`` needs its output, if z was changed in place, or if another reader of z
        comes after its backward. Under ``torch.compile`` both directions work on a copy, if the
        compiler keeps it.

    Danger, unchecked: where ``x`` is a view, a reader of its base or of another view sees the
    result in its place. Once backward has run, z holds a gradient: take what is to be logged of
    it before.
    """
    check_activation(_NAME, activation, activation_param)
    check_input(
        _NAME, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    batch_statistics = training or running_mean is None or running_var is None
    if (training or running_mean is None) and x.numel() <= x.shape[1]:
        raise InputError(
            f"{_NAME} needs more than one value per channel to train, "
            f"got an input of shape {tuple(x.shape)}"
        )
    return run_in_place_norm(
        x, weight, bias, running_mean, running_var, None, not batch_statistics,
        momentum, eps, activation, activation_param,
    )  # fmt: skip


class InPlaceABN(_NormBase):
    """BatchNorm with its activation, over its input: ``in_place_abn`` as a layer.

    Takes the place of ``nn.Sequential(BatchNorm3d(n), LeakyReLU(0.01))`` after a convolution, with
    1D, 2D or 3D input. Its state dict is BatchNorm's, so that either loads the other's, and it
    loads that of such a pair; but a negative weight acts as its absolute value here.

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
        check_activation(_NAME, activation, activation_param)
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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_keys_of_pair(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
