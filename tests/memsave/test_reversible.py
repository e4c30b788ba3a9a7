"""Reversible chains: plain gradients, one activation kept, whatever is recomputed as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.checkpoint_budget import checkpoint_budget
from memsave.errors import InputError, OptionError, RefusedError
from memsave.networks import FCN
from memsave.reversible import ReversibleBlock, ReversibleSequence, reversible_conv_block
from memsave.tiled import tile_levels
from tests.memsave.kept_bytes import LiveBytes, saved_bytes
from tests.memsave.traced_bytes import traced_kept_bytes

SHAPE = (2, 4, 4, 4, 6)
NO_BLOCK: Any = nn.ReLU()
NBYTES = 2 * 4 * 4 * 4 * 6 * 8


def chain(depth: int, dtype: torch.dtype = torch.float64) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence(reversible_conv_block(4, groups=2) for _ in range(depth)).to(dtype)


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(SHAPE, dtype=dtype, requires_grad=True)


def plainly(blocks: ReversibleSequence, x: Tensor) -> Tensor:
    """Run the same couplings under autograd, with nothing rebuilt."""
    for block in blocks:
        x = block(x)
    return x


def gradients(
    run: Callable[[Tensor], Tensor], blocks: nn.Module, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    result = run(x)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    loss = (result * weight).sum()
    return result.detach(), list(torch.autograd.grad(loss, [x, *blocks.parameters()]))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference relative to the largest gradient of its tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("depth", [1, 4])
def test_a_chain_has_the_plain_coupling_s_gradients(depth: int) -> None:
    blocks, x = chain(depth), image()
    y, ours = gradients(blocks, blocks, x)
    expected, theirs = gradients(lambda x: plainly(blocks, x), blocks, x)
    assert torch.equal(y, expected)
    # 1e-12: a unit is 1.1e-16; norms of 96 values and slope 0.01 multiply it up to 1e3.
    assert distance(ours, theirs) < 1e-12


def test_gradcheck_passes_to_input_and_weights() -> None:
    blocks = chain(2)
    x = torch.randn(1, 4, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    # The weights are given as well: gradcheck changes them where they are.
    assert torch.autograd.gradcheck(lambda x, *_weights: blocks(x), (x, *blocks.parameters()))


def test_float32_drifts_within_its_roundings_a_block() -> None:
    """Each block adds two roundings to its values; 16 blocks stay within 1e-4 of the gradients.

    Leaky ReLU's kink and the norm's division amplify 6e-8 about a hundredfold here.
    """
    errors = []
    for depth in (1, 16):
        blocks, x = chain(depth, torch.float32), image(torch.float32)
        _, ours = gradients(blocks, blocks, x)
        exact, y = chain(depth), x.detach().double().requires_grad_()
        exact.load_state_dict(blocks.state_dict())
        errors.append(distance([g.double() for g in ours], gradients(exact, exact, y)[1]))
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < 1e-4


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_one_activation_is_kept_however_deep(depth: int) -> None:
    """The result alone, by autograd's account; a plain chain of 2 keeps more already."""
    blocks, x = chain(depth), image()
    assert saved_bytes(lambda: blocks(x), blocks) == NBYTES
    if depth == 2:
        assert saved_bytes(lambda: plainly(blocks, x), blocks) > 6 * NBYTES


@pytest.mark.parametrize("depth", [1, 8])
def test_the_tracer_sees_the_same_bytes(depth: int) -> None:
    def prepare() -> Callable[[], object]:
        blocks = ReversibleSequence(reversible_conv_block(4) for _ in range(depth))
        x = torch.randn(SHAPE)
        return lambda: blocks(x)

    assert traced_kept_bytes(prepare) == NBYTES // 2  # in float32


def test_backward_s_peak_does_not_grow_with_depth() -> None:
    """But for the gradients of the parameters, which are handed over together."""
    peaks = []
    for depth in (2, 8):
        blocks, x = chain(depth), image()
        result = blocks(x)
        upstream = torch.ones_like(result)
        with LiveBytes() as live:
            torch.autograd.backward(result, upstream)
        weights = sum(p.nbytes for p in blocks.parameters())
        peaks.append(live.peak_bytes - weights)
    # A block's weights, 2 x (2 x 2 x 27 + 4) float64, may count on one side and not the other.
    assert abs(peaks[0] - peaks[1]) <= 2 * (2 * 2 * 27 + 4) * 8


class _Scaled(nn.Module):
    """Draws random numbers and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv1d(2, 2, 3, padding=1), nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        dropped: Tensor = self.drop(self.conv(x))
        return dropped


def test_dropout_draws_the_same_masks_and_leaves_the_generator() -> None:
    torch.manual_seed(0)
    blocks = ReversibleSequence(ReversibleBlock(_Scaled(), _Scaled()) for _ in range(3)).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (blocks, lambda x: plainly(blocks, x)):
        torch.manual_seed(5)
        results.append((*gradients(run, blocks, x), torch.get_rng_state()))
    (y, ours, state), (expected, theirs, after) = results
    assert torch.equal(y, expected)
    assert distance(ours, theirs) < 1e-12
    assert torch.equal(state, after)


def test_running_statistics_are_updated_once() -> None:
    def norm() -> nn.Module:
        return nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))

    torch.manual_seed(0)
    blocks = ReversibleSequence([ReversibleBlock(norm(), norm())]).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    blocks(x).sum().backward()
    counts = [int(b) for n, b in blocks.named_buffers() if n.endswith("tracked")]
    assert counts == [1, 1]


def test_autocast_is_restored_in_backward() -> None:
    """Convolutions run again in bfloat16 although backward runs outside of autocast."""
    seen: list[torch.dtype] = []
    blocks, x = chain(2, torch.float32), image(torch.float32)
    for module in blocks.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = blocks(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert seen == [torch.bfloat16] * 8
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in blocks.parameters())


def test_gradients_accumulate_and_shared_weights_get_both() -> None:
    block = reversible_conv_block(4).double()
    blocks, x = ReversibleSequence([block, block]), image()
    for _ in range(2):
        blocks(x).square().sum().backward()
    ours = [p.grad for p in block.parameters()]
    expected = torch.autograd.grad(2 * plainly(blocks, x).square().sum(), list(block.parameters()))
    assert distance([g for g in ours if g is not None], list(expected)) < 1e-12


def test_frozen_weights_and_inputs_get_none() -> None:
    blocks = chain(2)
    blocks[0].requires_grad_(False)
    blocks(image().detach()).sum().backward()
    assert all(p.grad is None for p in blocks[0].parameters())
    assert all(p.grad is not None for p in blocks[1].parameters())


def test_without_gradients_nothing_is_saved_and_the_inverse_gives_the_input() -> None:
    blocks, x = chain(3), image()
    with torch.no_grad():
        y = blocks(x)
        # Three blocks of two sums: about 1e-16 each, values up to 10.
        torch.testing.assert_close(blocks.inverse(y), x.detach(), rtol=0, atol=1e-13)
    assert not y.requires_grad
    assert torch.equal(ReversibleSequence([])(x), x)


def test_a_coupling_inverted_with_the_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """``x = y + F`` in place of ``y - F``: gradients leave the band of the tests above."""
    import memsave.reversible as module

    plain = module._rerun
    calls: list[int] = []

    def negative(*args: Any) -> tuple[Tensor, Tensor]:
        leaf, result = plain(*args)
        calls.append(1)
        # What the chain subtracts is the result's value; its graph stays as it was.
        with torch.enable_grad():
            return leaf, result - 2 * result.detach()

    blocks, x = chain(2), image()
    _, theirs = gradients(lambda x: plainly(blocks, x), blocks, x)
    monkeypatch.setattr(module, "_rerun", negative)
    _, ours = gradients(blocks, blocks, x)
    assert len(calls) == 4
    assert distance(ours, theirs) > 1e-2


def test_a_result_overwritten_before_backward_is_an_error() -> None:
    y = chain(1)(image())
    loss = y.square().sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
def test_an_fcn_of_reversible_blocks_has_its_plain_form_s_gradients(norm: str) -> None:
    """And keeps less: each encoder block the norms' and activations' insides of both halves."""
    torch.manual_seed(0)
    network = FCN(widths=(4, 8), block="reversible", norm=norm).double()
    plain = copy.deepcopy(network)
    for stage in plain.encoder:
        stage.reversible = nn.Sequential(*stage.get_submodule("reversible"))  # type: ignore[misc]
    x = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64)
    results = []
    for model in (network, plain):
        loss = model(x).square().mean()
        results.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    # Relative to the largest gradient of all: a bias before a norm has none but rounding.
    largest = max(float(g.abs().max()) for g in results[1])
    pairs = zip(*results, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-12 * largest
    kept, kept_plainly = (saved_bytes(partial(m, x), m) for m in (network, plain))
    # A half of n bytes: f and g keep their input, the norm's and the activation's result at least.
    # Of these the sequence still keeps its result, which is two halves.
    halves = (2 * 64 + 4 * 8) * 8
    assert kept_plainly - kept >= 2 * halves


def test_reversible_blocks_are_measured_for_a_budget_and_refused_by_tiles() -> None:
    """Counting operations hooks every module, also those that run inside the chain."""
    network = FCN(widths=(4, 8), block="reversible")
    checkpoint_budget(network)(torch.randn(1, 1, 4, 4, 4)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with pytest.raises(RefusedError, match=r"ReversibleSequence .* cannot run slab by slab"):
        tile_levels(FCN(widths=(4, 8), block="reversible"))


@pytest.mark.parametrize("technique", ["recomputed_norm_act", "checkpoint", "offload"])
def test_other_techniques_act_inside_and_around(technique: str) -> None:
    results = []
    for names in ([], [technique]):
        torch.manual_seed(0)
        network = FCN(widths=(4, 8), block="reversible", norm="batch_norm_leaky_relu")
        x = torch.randn(1, 1, 4, 4, 4)
        applied = memsave.apply(network, names, example_inputs=x)
        with applied.step():
            network(x).square().mean().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ReversibleSequence([NO_BLOCK]), OptionError, "takes ReversibleBlocks, got ReLU"),
        (lambda: reversible_conv_block(5), OptionError, "splits its channels in two, got 5"),
        (lambda: reversible_conv_block(8, groups=3), OptionError, "groups must divide the 4"),
        (lambda: reversible_conv_block(4)(torch.ones(1, 3, 2, 2, 2)), InputError,
         "got a tensor of (1, 3, 2, 2, 2)"),
        (lambda: ReversibleBlock(nn.ReLU(True), nn.ReLU())(-torch.ones(1, 2)), InputError,
         "f of a reversible block overwrites its own input"),
        (lambda: ReversibleBlock(nn.ReLU(), nn.Linear(1, 2))(torch.ones(1, 2)), InputError,
         r"g of a reversible block must keep the shape of its half, (1, 1), got (1, 2)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    build: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()
