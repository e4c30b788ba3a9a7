"""In-place ABN on CUDA: BatchNorm's and the activation's values, and the bytes it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave import InPlaceABN

pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (2, 12, 17, 16, 15)


def norms(channels: int) -> tuple[InPlaceABN, nn.BatchNorm3d]:
    """An in-place ABN and the BatchNorm that equals it, with weights of both signs, in float32."""
    torch.manual_seed(0)
    abn, norm = InPlaceABN(channels).cuda(), nn.BatchNorm3d(channels).cuda()
    with torch.no_grad():
        abn.weight.uniform_(0.5, 1.5)
        abn.weight[0] *= -1
        abn.bias.normal_()
        norm.weight.copy_(abn.weight.abs() + abn.eps)
        norm.bias.copy_(abn.bias)
    return abn, norm


def assert_within(actual: Tensor, expected: Tensor, bound: float) -> None:
    """All but one in a thousand are: where y is within its rounding of 0, either slope is right."""
    error = (actual.double() - expected.double()).abs().flatten()
    assert error.kthvalue(int(0.999 * error.numel())).values.item() <= bound


def bound(dtype: torch.dtype) -> float:
    """Two roundings, of values up to 4 and of their gradients, both ways; in float32 the sums'."""
    return 2e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps / 2


@pytest.mark.needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_and_gradients_are_batch_norms_and_leaky_relus(
    dtype: torch.dtype, training: bool
) -> None:
    abn, norm = norms(SHAPE[1])
    abn.train(training)
    norm.train(training)
    x = torch.randn(SHAPE, device="cuda", dtype=dtype)
    dz = torch.randn(SHAPE, device="cuda", dtype=dtype)

    plain_x, x = x.clone().requires_grad_(), x.requires_grad_()
    expected = F.leaky_relu(norm(plain_x), 0.01)
    torch.autograd.backward(expected, dz)
    actual = abn(x * 1)
    values = actual.detach().clone()  # backward overwrites it
    actual.backward(dz)

    assert values.dtype == dtype
    assert_within(values, expected, bound(dtype))
    assert x.grad is not None
    assert plain_x.grad is not None
    assert_within(x.grad, plain_x.grad, bound(dtype))
    assert abn.bias.grad is not None
    assert norm.bias.grad is not None
    # sums of thousands of gradients of order 1, each rounded to the type
    tolerance = bound(dtype) * dz[:, 0].numel() ** 0.5
    torch.testing.assert_close(abn.bias.grad, norm.bias.grad, rtol=1e-3, atol=tolerance)
    torch.testing.assert_close(abn.running_var, norm.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cuda_and_cpu_agree(dtype: torch.dtype) -> None:
    abn, _ = norms(SHAPE[1])
    on_cpu = copy.deepcopy(abn).cpu()
    x, dz = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)

    results: list[tuple[Tensor, Tensor]] = []
    for module, device in ((on_cpu, "cpu"), (abn, "cuda")):
        leaf = x.to(device, copy=True).requires_grad_()
        z = module(leaf * 1)
        values = z.detach().clone()
        z.backward(dz.to(device))
        assert leaf.grad is not None
        results.append((values.cpu(), leaf.grad.cpu()))

    for expected, actual in zip(*results, strict=True):
        assert_within(actual, expected, bound(dtype))


def kept_bytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """What the allocator was asked to hold for backward and result, besides ``x * 1``."""

    def requested() -> int:
        current: int = torch.cuda.memory_stats()["requested_bytes.all.current"]
        return current

    warm_up = forward(x * 1)  # handles and workspaces, which stay
    del warm_up
    y = x * 1
    before = requested()
    z = forward(y)
    del y
    kept = requested() - before
    del z
    return kept


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_keeps_one_statistic_a_channel_and_no_activation(dtype: torch.dtype) -> None:
    """BatchNorm and leaky ReLU keep the norm's input, its output and the result: two more."""
    abn, norm = norms(64)
    x = torch.randn(1, 64, 32, 32, 32, device="cuda", dtype=dtype, requires_grad=True)

    in_place = kept_bytes(abn, x)
    plain = kept_bytes(lambda y: F.leaky_relu(norm(y), 0.01), x)

    assert in_place == 64 * 4
    assert plain - in_place >= 2 * x.nbytes


def test_backward_returns_all_bytes_but_the_gradients() -> None:
    abn, _ = norms(64)
    x = torch.randn(1, 64, 32, 32, 32, device="cuda", requires_grad=True)
    abn(x * 1).sum().backward()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]

    abn(x * 1).sum().backward()

    assert torch.cuda.memory_stats()["requested_bytes.all.current"] == before
