"""The scope of recomputation: who reads z, who changes it, and what else runs in it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memsave.checkpoint import checkpoint_block
from memsave.in_place_abn import InPlaceABN
from memsave.recompute_pairs import recompute_pairs
from memsave.recomputed_norm_act import RecomputedNormAct, attach_recompute, recompute
from tests.memsave.kept_bytes import saved_bytes
from tests.memsave.recompute_twins import (
    ACTIVATION_BYTES,
    STATISTICS_BYTES,
    C,
    H,
    N,
    Read,
    Readers,
    W,
    WideGroupNorm,
    assert_same_bits,
    gradients,
    twins,
)


def skip_after(m: Readers, z: Tensor) -> Tensor:
    y: Tensor = m.b(m.a(z) + z)
    return y


def changed_after_it_was_read(m: Readers, z: Tensor) -> Tensor:
    y = m.a(z)
    z += y
    out: Tensor = m.b(z) * z
    return out


def half_changed(m: Readers, z: Tensor) -> Tensor:
    with torch.no_grad():
        z[:, :2] *= 2
    out: Tensor = m.a(z)
    return out


def copy_changed(m: Readers, z: Tensor) -> Tensor:
    other = z.clone()
    with torch.no_grad():
        other[:, :2] *= 2
    out: Tensor = m.a(z) * m.b(other)
    return out


def halves(m: Readers, z: Tensor) -> Tensor:
    """The second is read in another type too; both lie in one storage, and come of one node."""
    first, second = torch.cat([m.a(z), z], 1).chunk(2, 1)
    out: Tensor = m.a(m.pair(second)) * m.b(m.pair(first)) + m.b(second) * m.pair(first)
    return out


READS: dict[str, Read] = {
    "two halves": halves,
    "part of z through the pair": lambda m, z: m.a(m.pair(z[:, :, 1:])) * m.b(z[:, :, 1:]),
    "all of z through the pair": lambda m, z: m.a(m.pair(z.view_as(z))),
    "one convolution": lambda m, z: m.a(z),
    "two convolutions": lambda m, z: m.a(z) * m.b(z),
    "skip after": skip_after,
    "concatenation": lambda m, z: torch.cat([m.a(z), z], 1).square(),
    "itself twice": lambda _, z: z * z,
    "pooling": lambda m, z: m.a(F.max_pool2d(z, 2)),
    "flattened": lambda m, z: m.linear(z.flatten(1)),
    "a slice": lambda m, z: z[:, :2] * m.a(z)[:, 2:],
    "transposed": lambda m, z: z.mT @ m.a(z),
    "other type and back": lambda m, z: m.a(z.double().float()) * z.bfloat16().float(),
    "of a double": lambda m, z: z.double() * m.a(z).double(),
    "checkpointed": lambda m, z: checkpoint(m.a, z, use_reentrant=False) + m.b(z),
    "never": lambda _, z: z.sum(),
    "a pair behind a pair": lambda m, z: m.a(m.pair(z.clone())) + m.a(m.pair(z)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
@pytest.mark.parametrize("name", READS)
def test_whoever_reads_z_gets_the_plain_networks_bits(name: str, inside: bool) -> None:
    plain, mine = twins(READS[name])
    assert_same_bits(gradients(mine, True, inside), gradients(plain, False))


@pytest.mark.parametrize("name", [*READS, "copy changed"])
def test_so_under_autocast_whose_copies_are_not_kept(name: str) -> None:
    """The norm computes in float32, so that it reads a copy of x, and convolutions copies of z."""
    plain, mine = twins({**READS, "copy changed": copy_changed}[name], WideGroupNorm(2, C))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(plain, False)
        assert_same_bits(gradients(mine, True), expected)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, C), nn.InstanceNorm2d(C)], ids=["group", "inst"])
@pytest.mark.parametrize("name", READS)
def test_so_with_norms_whose_result_may_be_a_view(name: str, norm: nn.Module) -> None:
    plain, mine = twins(READS[name], norm)
    assert_same_bits(gradients(mine, True), gradients(plain, False))


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("one convolution", 2),  # the input and x
        ("flattened", 2),
        ("itself twice", 2),
        ("checkpointed", 2),
        ("two convolutions", 4),  # and the factors
        ("skip after", 3),  # and the sum
    ],
)
def test_no_reader_keeps_z(name: str, maps: int) -> None:
    mine = twins(READS[name])[1]

    def step() -> Tensor:
        with recompute(mine):
            result: Tensor = mine(torch.ones(N, C, H, W))
        return result

    assert saved_bytes(step, mine) == maps * ACTIVATION_BYTES + STATISTICS_BYTES


def test_a_part_of_z_in_the_next_pair_leaves_the_whole_known() -> None:
    """Neither the part nor z is kept, but the input, x, and two pairs' numbers."""
    read: Read = lambda m, z: torch.cat([m.a(m.pair(z[:, :, 1:])), m.b(z)], 2)  # noqa: E731
    plain, mine = twins(read)
    assert_same_bits(gradients(mine, True), gradients(plain, False))

    def step() -> Tensor:
        with recompute(mine):
            result: Tensor = mine(torch.ones(N, C, H, W))
        return result

    assert saved_bytes(step, mine) == 2 * ACTIVATION_BYTES + 2 * STATISTICS_BYTES


def test_z_changed_in_place_is_kept_as_it_became_by_its_later_readers() -> None:
    """Where the plain network is refused by autograd, this one differentiates what was computed."""
    plain, mine = twins(changed_after_it_was_read)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(plain, False)
    out_of_place = Readers(lambda m, z: m.b(z + m.a(z)) * (z + m.a(z)))
    expected = gradients(out_of_place, False)
    for a, b in zip(gradients(mine, True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the sum is made twice there


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_a_change_without_gradients_is_seen_too(half: torch.dtype | None) -> None:
    """The convolution keeps the changed z, or its copy: its weight's gradient is of those values.

    In bfloat16 group norm's result is copied for the convolution, by a node that knows no change.
    """
    _, mine = twins(half_changed, WideGroupNorm(2, C))
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W)
    with recompute(mine), torch.autocast("cpu", dtype=half, enabled=half is not None):
        result = mine(x)
        z = F.relu(WideGroupNorm(2, C)(mine.first(x))).detach()
        z[:, :2] *= 2
        weight = mine.a.weight.detach().clone().requires_grad_()
        expected = F.conv2d(z, weight, mine.a.bias, padding=1)
    torch.autograd.backward(result.sum())
    torch.autograd.backward(expected.sum())
    assert_same_bits([mine.a.weight.grad], [weight.grad])  # type: ignore[list-item]


def test_what_is_kept_and_was_changed_since_is_refused_as_without_the_scope() -> None:
    """The norm's input, another layer's input and a weight."""
    _, mine = twins(READS["one convolution"])
    seen: list[Tensor] = []
    mine.first.register_forward_hook(lambda _m, _a, y: seen.append(y))
    for changed in ("norm's input", "convolution's input"):
        x = torch.randn(N, C, H, W)
        with recompute(mine):
            loss = mine(x).sum()
        (x if changed == "convolution's input" else seen[-1].detach()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)


def test_a_norms_weight_changed_before_backward_is_refused() -> None:
    _, mine = twins(READS["one convolution"])
    with recompute(mine):
        loss = mine(torch.randn(N, C, H, W)).sum()
    with torch.no_grad():
        mine.pair[0].norm.bias.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="run backward before the optimizer's step"):
        torch.autograd.backward(loss)


def test_a_second_backward_of_a_kept_graph_gives_the_same() -> None:
    for name in ("one convolution", "two convolutions", "checkpointed"):
        plain, mine = twins(READS[name])
        x = torch.randn(N, C, H, W)
        for model in (plain, mine):
            with recompute(mine):
                loss = model(x).square().sum()
            torch.autograd.backward(loss, retain_graph=True)
            torch.autograd.backward(loss)
        assert_same_bits(
            [p.grad for p in mine.parameters() if p.grad is not None],
            [p.grad for p in plain.parameters() if p.grad is not None],
        )


def test_z_is_made_once_for_a_convolution_and_the_relu_before_it() -> None:
    """And once more for each reader that is not next to them."""
    for name, times in (("one convolution", 1), ("itself twice", 1), ("two convolutions", 2)):
        _, mine = twins(READS[name])
        pair = next(m for m in mine.modules() if isinstance(m, RecomputedNormAct))
        with recompute(mine):
            loss = mine(torch.randn(N, C, H, W)).sum()
        runs: list[int] = []
        forward = pair.norm.forward
        pair.norm.forward = lambda x, f=forward, r=runs: (r.append(1), f(x))[1]
        torch.autograd.backward(loss)
        assert len(runs) == times, name


def test_partial_backward_leaves_nothing_alive() -> None:
    """Gradients of the last convolution alone make z once, and it is gone after."""
    _, mine = twins(READS["one convolution"])
    with recompute(mine):
        loss = mine(torch.randn(N, C, H, W)).sum()
    before = _live_maps()
    torch.autograd.grad(loss, mine.a.weight, retain_graph=True)
    assert _live_maps() == before
    torch.autograd.backward(loss)


def _live_maps() -> int:
    gc.collect()
    found = {
        o.untyped_storage()._cdata
        for o in gc.get_objects()
        if type(o) is Tensor and o.nbytes == ACTIVATION_BYTES
    }
    return len(found)


def test_without_gradients_and_outside_the_scope_it_is_the_plain_pair() -> None:
    plain, mine = twins(READS["two convolutions"])
    x = torch.randn(N, C, H, W)
    with torch.no_grad(), recompute(mine):
        assert torch.equal(mine(x), plain(x))
    kept = [saved_bytes(lambda m=m: m(x), m) for m in (plain, mine)]  # type: ignore[misc]
    assert kept[0] == kept[1]
    assert_same_bits(gradients(mine, False), gradients(plain, False))


def test_an_empty_batch_runs_as_in_the_plain_network() -> None:
    plain, mine = twins(READS["two convolutions"], nn.GroupNorm(2, C))
    for model in (plain, mine):
        with recompute(mine):
            loss = model(torch.randn(0, C, H, W)).sum()
        torch.autograd.backward(loss)
    assert_same_bits([mine.a.weight.grad], [plain.a.weight.grad])  # type: ignore[list-item]


def test_a_leaf_may_be_the_norms_input() -> None:
    pair, behind = RecomputedNormAct(nn.BatchNorm2d(C), nn.ReLU()), nn.Conv2d(C, C, 1)
    plain = nn.Sequential(copy.deepcopy(pair.norm), nn.ReLU())
    x, y = (torch.ones(N, C, H, W).cumsum(3).requires_grad_() for _ in range(2))
    with recompute(pair):
        loss = behind(pair(x)).square().sum()
    torch.autograd.backward(loss)
    torch.autograd.backward(behind(plain(y)).square().sum())
    assert_same_bits([x.grad], [y.grad])  # type: ignore[list-item]


def test_a_checkpointed_block_in_the_scope_and_a_scope_in_a_checkpointed_block() -> None:
    for wrap in (checkpoint_block, lambda m: checkpoint_block(attach_recompute(m))):
        plain, mine = twins(READS["two convolutions"])
        wrapper = nn.Sequential(mine)
        wrap(mine)
        assert_same_bits(gradients(wrapper, True), gradients(plain, False))


def test_in_place_abn_works_in_the_scope() -> None:
    """Its backward overwrites what it kept; its version is followed as without hooks."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(C, C, 1), InPlaceABN(C), nn.Conv2d(C, C, 1)),
            *(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)),
        )

    plain, mine = model(), model()
    recompute_pairs(mine)
    assert_same_bits(gradients(mine, True), gradients(plain, False))


def test_hooks_around_the_scope_get_what_is_kept_and_no_z() -> None:
    """Offload to the CPU around it works, and so do hooks inside it."""
    plain, mine = twins(READS["two convolutions"])
    with save_on_cpu():
        actual = gradients(mine, True)
    assert_same_bits(actual, gradients(plain, False))
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    plain, mine = twins(READS["one convolution"])
    with recompute(mine), saved_tensors_hooks(keep, lambda t: t):
        mine(torch.randn(N, C, H, W))
    assert len({id(t) for t in seen if t.nbytes == ACTIVATION_BYTES}) > 2  # theirs: z among them
