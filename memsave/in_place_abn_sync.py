"""In-place ABN whose statistics are those of the whole batch in data-parallel training.

Source: Rota Bulo et al., CVPR 2018, arXiv:1712.02616; the name is the reference implementation's.
Each process normalises its share of the batch; forward and backward exchange a few numbers a
channel through ``torch.distributed``, on any backend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memsave.errors import InputError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_maths import Activation
from memsave.in_place_guard import (
    differentiable_once,
    overwrite,
    refuse_second_pass,
    result_to_overwrite,
)
from memsave.in_place_norm import check_input
from memsave.in_place_norm_ops import overwrite_with_norm
from memsave.in_place_sync_maths import gradient_, local_means, local_statistics

__all__ = ["InPlaceABNSync"]

_NAME = "in-place ABN"


class InPlaceABNSync(InPlaceABN):
    """``InPlaceABN`` with the statistics of all processes' batches together.

    In evaluation, and where there is one process or none, it is ``InPlaceABN``. Weights' gradients
    are those of the process's own share, which ``DistributedDataParallel`` then averages, as with
    ``nn.SyncBatchNorm``. Processes may have shares of different sizes, or none.

    Memory: as ``InPlaceABN``; the plain maths has two temporaries of that size in backward.
        Exchanged are ``2 C + 1`` numbers forward, gathered, and ``2 C`` backward, summed.
    Exact, Errors: as ``InPlaceABN``; more than one value a channel is needed in all processes
        together.

    Args:
        num_features, eps, momentum, affine, track_running_stats, activation, activation_param: as
            for ``InPlaceABN``.
        process_group: the processes that share statistics; None for all of them.
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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation, activation_param
        )
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm and activation of ``x``, which is overwritten."""
        if not (self.training and _processes(self.process_group) > 1):
            return super().forward(x)
        check_input(
            _NAME, x, weight=self.weight, bias=self.bias,
            running_mean=self.running_mean, running_var=self.running_var,
        )  # fmt: skip
        mean, var, count = _all_statistics(x, self.process_group)
        if count <= 1:
            raise InputError(
                f"{_NAME} needs more than one value per channel in all processes together, "
                f"got an input of shape {tuple(x.shape)} here"
            )
        self._update_running(mean, var, count, self._count_batch())
        settings = (self.eps, self.activation, self.activation_param)
        return overwrite(
            _InPlaceABNSync, x, self.weight, self.bias, mean, var, count, self.process_group,
            settings,
        )  # fmt: skip

    def _update_running(self, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        for buffer, value in (
            (self.running_mean, mean),
            (self.running_var, var * (count / (count - 1))),
        ):
            buffer.copy_(buffer.to(value.dtype).lerp_(value, momentum))


def _processes(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


@torch.no_grad()
def _all_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance of each channel, and the values a channel, of all."""
    mean, var = local_statistics(x)
    share = mean.new_tensor([x.numel() // max(1, x.shape[1])])
    local = torch.cat([mean, var, share])
    gathered = [torch.empty_like(local) for _ in range(_processes(group))]
    dist.all_gather(gathered, local, group=group)
    means, variances, shares = torch.split(torch.stack(gathered), [len(mean), len(mean), 1], 1)
    total = shares.sum()
    parts = shares / total.clamp(min=1)
    all_mean = (means * parts).sum(0)
    # A part's spread about the whole's mean is its own and its mean's distance from it, squared.
    all_var = ((variances + (means - all_mean).square()) * parts).sum(0)
    return all_mean, all_var, int(total.item())


class _InPlaceABNSync(torch.autograd.Function):
    # Kept for backward: z, which aliases x; weight, bias and 1/std, of C elements. Not kept: x.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int,
        group: dist.ProcessGroup | None,
        settings: tuple[float, Activation, float],
        as_alias: bool,
    ) -> Tensor:
        if as_alias:
            z = x.detach()
        else:
            z = x
            ctx.mark_dirty(x)
        how = (None, True, 0.0, *settings)
        rstd = overwrite_with_norm(z, weight, bias, mean, var, how)
        ctx.save_for_backward(z, weight, bias, rstd)
        ctx.count, ctx.group, ctx.settings = count, group, settings
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_pass(ctx)
        z, weight, bias, rstd = ctx.saved_tensors
        with torch.no_grad():
            z = result_to_overwrite(ctx, z)
            d_weight, d_bias, means = local_means(z, dz, weight, bias, ctx.settings)
            means *= z.numel() // max(1, z.shape[1]) / ctx.count
            dist.all_reduce(means, group=ctx.group)
            gradient_(z, dz, rstd, means, weight, bias, ctx.settings)
            gradients = (
                z,
                None if weight is None else d_weight.to(weight.dtype),
                None if bias is None else d_bias.to(bias.dtype),
            )
        return differentiable_once((*gradients, *(None,) * 6))
