"""The layers through their kernels, compiled on a GPU or interpreted, against the plain maths."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.in_place_norm_ops import in_place_norm_, in_place_norm_backward_
from memsave.in_place_sync_maths import gradient_, local_means, local_statistics
from memsave.kernels.tiles import kernels_serve

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _use_kernels(monkeypatch: pytest.MonkeyPatch, use: bool) -> None:
    """Take the kernels on every device, or nowhere."""

    def chosen(x: Tensor) -> bool:
        return use and kernels_serve(x) and x.numel() > 0

    for name in (
        "memsave.in_place_norm_ops._for_kernels",
        "memsave.in_place_sync_maths.kernels_run",
    ):
        monkeypatch.setattr(name, chosen)


def _run(layer: nn.Module, x: Tensor, dz: Tensor) -> list[Tensor]:
    """Result, gradients and buffers of a copy of ``layer``."""
    layer = copy.deepcopy(layer)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    z = layer(leaf * 1)
    values = z.detach().clone()
    torch.autograd.backward(z, dz)
    grads = [leaf.grad, *(p.grad for p in layer.parameters())]
    return [values, *(g for g in grads if g is not None), *layer.buffers()]


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "abn": InPlaceABN(6),
        "abn in evaluation": InPlaceABN(6).eval(),
        "abn without weights": InPlaceABN(6, affine=False, track_running_stats=False),
        "group": InPlaceGroupNorm(2, 6, activation="elu", activation_param=1.0),
        "instance": InPlaceInstanceNorm(6, affine=True),
    }
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.9, 0.2)
        layer.to(DEVICE)
    return layers


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("channels last", torch.float16),
        ("transposed", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", _layers())
def test_a_layer_gives_the_same_through_its_kernels(
    name: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a rounding of the type for values; slope 0.01 makes that 100 of a small negative's.

    So gradients are held to 16 roundings, and sums of 70 of them to sqrt(70) times that.
    """
    layer = _layers()[name]
    x = torch.randn(2, 6, 5, 7, device=DEVICE).to(dtype)
    dz = torch.randn(2, 6, 5, 7, device=DEVICE).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":  # what the kernels do not take
        dz = dz.transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for use in (True, False):
        _use_kernels(monkeypatch, use)
        results.append(_run(layer, x, dz))
    unit = torch.finfo(dtype).eps
    assert len(results[0]) == len(results[1]) >= 2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2 * unit, atol=4e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=16 * unit, atol=16 * unit)
    torch.testing.assert_close(results[0][2:], results[1][2:], rtol=16 * unit, atol=130 * unit)


def test_the_parts_for_several_processes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, dz = torch.randn(2, 4, 50, device=DEVICE) + 3, torch.randn(2, 4, 50, device=DEVICE)
    weight, bias = torch.rand(4, device=DEVICE) + 0.5, torch.randn(4, device=DEVICE)
    weight[0] *= -1
    settings, results = (1e-5, "leaky_relu", 0.1), []
    for use in (True, False):
        _use_kernels(monkeypatch, use)
        z, (mean, var) = x.clone(), local_statistics(x)
        d_weight, d_bias, means = local_means(z, dz, weight, bias, settings)
        gradient_(z, dz, torch.rsqrt(var), means, weight, bias, settings)
        results.append((mean, var, d_weight, d_bias, means, z))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("use_running", [False, True])
def test_parameters_and_statistics_may_be_views_with_strides(
    use_running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of matrices, whose channels lie 2 apart; float32 rounding, in sums of 18 terms."""
    torch.manual_seed(0)
    x, dz = torch.randn(2, 4, 9, device=DEVICE), torch.randn(2, 4, 9, device=DEVICE)
    matrices = torch.rand(4, 4, 2, device=DEVICE) + 0.5
    results = []
    for use in (True, False):
        _use_kernels(monkeypatch, use)
        kept = matrices.clone()
        weight, bias, mean, var = (matrix[:, 0] for matrix in kept)
        z = x.clone()
        rstd, _ = in_place_norm_(
            z, weight, bias, mean, var, None, use_running, 0.1, 1e-5, "leaky_relu", 0.01
        )
        values = z.clone()
        grads = in_place_norm_backward_(
            z, dz, weight, bias, rstd, None, use_running, 1e-5, "leaky_relu", 0.01
        )
        results.append([values, z, *grads[:2], kept])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
