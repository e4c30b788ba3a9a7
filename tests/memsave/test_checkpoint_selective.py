"""Selective checkpointing keeps convolutions' results and recomputes the rest, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.checkpoint import checkpoint_block
from memsave.checkpoint_selective import checkpoint_selective
from memsave.errors import RefusedError
from memsave.in_place_abn import InPlaceABN
from memsave.networks import FCN
from memsave.techniques import find_technique, parse_options
from tests.memsave.kept_bytes import LiveBytes

N, C, H, W = 2, 4, 6, 5
ACTIVATION_BYTES = N * C * H * W * 4


def _block(depth: int = 3, *, relu_first: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        pair: list[nn.Module] = [nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.Dropout(0.5)]
        order = (1, 0, 2) if relu_first else (0, 1, 2)
        layers += [nn.Conv2d(C, C, 3, padding=1, bias=False), *(pair[i] for i in order)]
    return nn.Sequential(*layers)


def _trained(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W, requires_grad=True)
    for _ in range(2):
        result = model(x)
        torch.autograd.backward(result.square().mean())
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [result.detach(), *(g for g in gradients if g is not None), *model.buffers()]


@pytest.mark.parametrize("relu_first", [False, True], ids=["norm first", "in-place relu first"])
def test_results_gradients_statistics_and_masks_are_the_plain_blocks(relu_first: bool) -> None:
    plain = _block(relu_first=relu_first)
    selective = checkpoint_selective(copy.deepcopy(plain))
    for expected, actual in zip(_trained(plain), _trained(selective), strict=True):
        assert torch.equal(expected, actual)
    assert [int(b) for n, b in selective.named_buffers() if "tracked" in n] == [2, 2, 2]
    assert all(part.inplace for part in selective.modules() if isinstance(part, nn.ReLU))


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_no_convolution_runs_twice() -> None:
    block = checkpoint_selective(_block())
    with _Convolutions() as convolutions:  # type: ignore[no-untyped-call]
        torch.autograd.backward(block(torch.randn(N, C, H, W)).sum())
    assert convolutions.count == 3
    plain = checkpoint_block(_block())
    with _Convolutions() as convolutions:  # type: ignore[no-untyped-call]
        torch.autograd.backward(plain(torch.randn(N, C, H, W)).sum())
    assert convolutions.count == 6


def test_a_block_keeps_a_result_a_convolution() -> None:
    """Three results of convolutions and the block's own; the input is not ours to count.

    Dropout keeps the state of the random generator, which no operator makes.
    """
    x = torch.randn(N, C, H, W)
    block = checkpoint_selective(_block())
    with LiveBytes() as live:
        result = block(x)
        assert live.now_bytes == 3 * ACTIVATION_BYTES + result.nbytes
        del result
        assert live.now_bytes == 0


def test_in_place_norms_are_refused() -> None:
    block = nn.Sequential(nn.Conv2d(C, C, 1), InPlaceABN(C))
    with pytest.raises(RefusedError, match="in-place norms, which overwrite"):
        checkpoint_selective(block)
    assert type(block) is nn.Sequential


def test_what_is_checkpointed_already_is_refused() -> None:
    with pytest.raises(RefusedError, match="checkpointed already"):
        checkpoint_selective(nn.Sequential(checkpoint_block(_block())))
    with pytest.raises(RefusedError, match="checkpointed already"):
        checkpoint_selective(nn.Sequential(checkpoint_selective(_block())))


class _Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv(x))


def test_a_function_that_overwrites_a_kept_result_is_told_in_backward() -> None:
    result = checkpoint_selective(_Overwrites())(torch.randn(N, C, H, W))
    with pytest.raises(RuntimeError, match="mutated"):
        torch.autograd.backward(result.sum())


def test_twice_is_once_and_a_copy_is_selective_too() -> None:
    block = _block()
    assert checkpoint_selective(checkpoint_selective(block)) is block
    assert type(block).__mro__[2] is nn.Sequential
    other = copy.deepcopy(block)
    assert type(other) is type(block)
    assert _trained(other)[0].equal(_trained(block)[0])


def test_the_technique_takes_the_blocks_of_a_network() -> None:
    technique = find_technique("checkpoint_selective")
    assert technique.exact
    torch.manual_seed(0)
    plain = FCN(widths=(4, 8))
    image = torch.randn(1, 1, 8, 8, 4)
    selective = technique.module(copy.deepcopy(plain), parse_options(technique, {}))
    kept = []
    for model in (plain, selective):
        with LiveBytes() as live:
            result = model(image)
            kept.append(live.now_bytes)
        torch.autograd.backward(result.square().mean())
    for expected, actual in zip(plain.parameters(), selective.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad)  # type: ignore[arg-type]
    assert kept[1] < kept[0]
    one = parse_options(technique, {"blocks": ["decoder.0"]})
    chosen = technique.module(copy.deepcopy(plain), one)
    assert [n for n, m in chosen.named_modules() if type(m).__name__.startswith("Sel")] == [
        "decoder.0"
    ]


def test_a_block_that_is_called_twice_under_autocast_has_the_plain_gradients() -> None:
    """As a recurrent cell is: its weights are cast once forward, but again for each call run again.

    Not to the bit: the plain block sums the gradients of its two calls in bfloat16, of 8 bits.
    """
    plain = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh())
    selective = checkpoint_selective(copy.deepcopy(plain))
    x = torch.randn(2, 2, 4, 4)
    for block in (plain, selective):
        with torch.autocast("cpu", torch.bfloat16):
            out = block(block(x))
            assert torch.is_autocast_cache_enabled()
        out.float().sum().backward()
    for ours, theirs in zip(selective.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        bound = 2**-7 * float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=bound)
