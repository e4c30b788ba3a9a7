"""The invertibility check tells each thing that makes a block of one's own not invertible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memsave.errors import InputError, OptionError
from memsave.invertibility import check_invertible
from memsave.reversible import ReversibleBlock, ReversibleSequence, reversible_conv_block


class _Own(nn.Module):
    """A block of a user's own, made of two functions."""

    def __init__(self, forward: Callable[[Tensor], object], inverse: Callable[[Tensor], object]):
        super().__init__()
        self.there, self.back = forward, inverse

    def forward(self, x: Tensor) -> object:
        return self.there(x)

    def inverse(self, y: Tensor) -> object:
        return self.back(y)


class _WrongSign(ReversibleBlock):
    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        x2 = y2 - self.g(y1)
        return torch.cat((y1 + self.f(x2), x2), 1)


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3, 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_reversible_chain_passes_in_every_type(dtype: torch.dtype) -> None:
    """The tolerance follows the type: bfloat16's error would fail float32's by far."""
    blocks = ReversibleSequence(reversible_conv_block(4) for _ in range(2)).to(dtype)
    report = check_invertible(blocks, example(dtype))
    assert report, str(report)
    assert report.max_error is not None
    assert report.max_error <= report.tolerance
    assert report.tolerance < 64 * torch.finfo(dtype).eps * 20
    assert str(report).startswith("invertible: error ")
    assert not check_invertible(blocks, example(dtype), tolerance=1e-30)


def test_a_wrong_sign_is_told() -> None:
    plain = reversible_conv_block(4)
    report = check_invertible(_WrongSign(plain.f, plain.g), example())
    assert not report
    assert report.max_error is not None
    assert report.max_error > 0.1
    assert "with every sum's sign turned" in report.problems[0]
    assert str(report).startswith("not invertible: error ")


@pytest.mark.parametrize(
    ("there", "back", "problem"),
    [
        (lambda x: x.mul_(2), lambda y: y / 2, "forward overwrites its input"),
        (lambda x: x * 2, lambda y: y.div_(2), "inverse overwrites the result"),
        (lambda x: x[:, :3], lambda y: y, "forward gives (2, 3, 3, 3, 3) for (2, 4, 3, 3, 3)"),
        (lambda x: (x, x), lambda y: y, "forward gives tuple for"),
        (lambda x: x.flatten(), lambda y: y, "inverse gives (216,), not the input's"),
        (lambda x: x, lambda y: (y,), "inverse gives tuple, not the input's"),
        (lambda x: x + torch.rand(()), lambda y: y, "another result the second time"),
        (lambda x: x.half(), lambda y: y.float(), "forward gives torch.float16 for torch.float32"),
        (lambda x: x, lambda y: y * float("nan"), "inverse misses the input by nan"),
    ],
)
def test_what_is_wrong_is_told(
    there: Callable[[Tensor], object], back: Callable[[Tensor], object], problem: str
) -> None:
    report = check_invertible(_Own(there, back), example())
    assert not report
    assert any(problem in text for text in report.problems), str(report)


def test_a_batch_norm_in_training_is_noted_and_its_statistics_kept() -> None:
    halves = (nn.Sequential(nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2)) for _ in range(2))
    block = ReversibleBlock(*halves)
    report = check_invertible(block, example())
    assert report
    assert "f.1 is a BatchNorm in training" in report.notes[0]
    assert report.notes[0] in str(report)
    assert [int(b) for n, b in block.named_buffers() if n.endswith("tracked")] == [0, 0]
    assert not check_invertible(block.eval(), example()).notes


def test_dropout_is_told_and_the_generator_s_state_kept() -> None:
    block = ReversibleBlock(nn.Dropout(0.5), nn.Identity())
    x = example()
    state = torch.get_rng_state()
    report = check_invertible(block, x)
    assert "draw no random numbers" in report.problems[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert check_invertible(block.eval(), x)


def test_what_cannot_be_checked_is_refused() -> None:
    block = reversible_conv_block(4)
    with pytest.raises(OptionError, match="Conv1d has no method inverse"):
        check_invertible(nn.Conv1d(1, 1, 1), example())
    with pytest.raises(InputError, match=r"floating-point values, got torch.int64 of shape \(1,\)"):
        check_invertible(block, torch.ones(1, dtype=torch.long))
    with pytest.raises(OptionError, match="tolerance must be more than 0, got 0"):
        check_invertible(block, example(), tolerance=0)
