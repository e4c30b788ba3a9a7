"""What the kernels do not take runs on the plain maths, on a GPU too: float64, uneven places."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memsave import InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.in_place_sync_maths import gradient_, local_means, local_statistics
from memsave.kernels.tiles import kernels_serve

pytestmark = pytest.mark.gpu

SHAPE = (2, 6, 5, 6, 7)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "abn": lambda: InPlaceABN(6),
    "abn in evaluation": lambda: InPlaceABN(6).eval(),
    "abn without weights": lambda: InPlaceABN(6, affine=False, track_running_stats=False),
    "abn elu": lambda: InPlaceABN(6, activation="elu", activation_param=1.0),
    "group": lambda: InPlaceGroupNorm(2, 6),
    "instance": lambda: InPlaceInstanceNorm(6, affine=True),
}


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _cropped(t: Tensor) -> Tensor:
    """The gradient of a side that was joined with another one."""
    return torch.cat([t, t], 3)[:, :, :, 1 : 1 + t.shape[3]]


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 4).contiguous().transpose(2, 4)


CASES: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float64": (torch.float64, _as_it_is, _as_it_is),
    "gradient cropped": (torch.float32, _as_it_is, _cropped),
    "gradient transposed, half": (torch.float16, _as_it_is, _transposed),
    "input transposed": (torch.float32, _transposed, _as_it_is),
}


def _run(
    layer: nn.Module, x: Tensor, dz: Tensor, device: str, case: str
) -> list[tuple[torch.Size, Tensor]]:
    """Return result, gradients and buffers, on the CPU."""
    _, of_x, of_dz = CASES[case]
    layer = copy.deepcopy(layer).to(device)
    leaf = of_x(x.to(device)).detach().requires_grad_()
    z = layer(leaf * 1)
    values = z.detach().clone()
    gradient = of_dz(dz.to(device))
    assert leaf.dtype == torch.float64 or not (kernels_serve(z) and kernels_serve(gradient))
    torch.autograd.backward(z, gradient)
    found = [values, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return [(t.shape, t.cpu().double()) for t in found if t is not None]


def _both(name: str, case: str) -> list[list[tuple[torch.Size, Tensor]]]:
    torch.manual_seed(0)
    dtype = CASES[case][0]
    layer = LAYERS[name]()
    layer = layer.double() if dtype == torch.float64 else layer
    x, dz = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    return [_run(layer, x, dz, device, case) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYERS)
def test_it_trains(name: str, case: str) -> None:
    """Shapes alone, so that a GPU that runs no kernel serves as well."""
    on_cpu, on_gpu = _both(name, case)
    assert len(on_gpu) >= 2
    assert [shape for shape, _ in on_gpu] == [shape for shape, _ in on_cpu]


@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_what_the_cpu_does(name: str, case: str) -> None:
    """Gradients are read off z, to 16 of its roundings at most with slope 0.01; sums of 420 values.

    All but one in a hundred: where y is within its rounding of 0, either slope is right.
    """
    dtype = CASES[case][0]
    bound = 16 * torch.finfo(dtype).eps * 420**0.5
    for (_, expected), (_, actual) in zip(*_both(name, case), strict=True):
        error = (actual - expected).abs().flatten()
        assert error.kthvalue(max(1, int(0.99 * len(error)))).values <= bound * max(
            1.0, expected.abs().max().item()
        )


@pytest.mark.parametrize("case", CASES)
def test_the_parts_for_several_processes_run(case: str) -> None:
    dtype, of_x, of_dz = CASES[case]
    z, dz = (f(torch.randn(SHAPE, device="cuda").to(dtype)) for f in (of_x, of_dz))
    weight, bias = (torch.ones(6, device="cuda") for _ in range(2))
    settings = (1e-5, "leaky_relu", 0.01)
    mean, var = local_statistics(z)
    d_weight, d_bias, means = local_means(z, dz, weight, bias, settings)
    gradient_(z, dz, var, means, weight, bias, settings)
    assert {t.shape for t in (mean, var, d_weight, d_bias)} == {(6,)}
    assert means.shape == (2, 6)
