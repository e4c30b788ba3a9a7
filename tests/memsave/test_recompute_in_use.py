"""Recomputation in use: attached, copied, compiled, traced, in the papers' networks."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.predict.tracer import Tracer
from memsave import networks
from memsave.errors import OptionError
from memsave.recomputed_norm_act import RecomputedNormAct, attach_recompute, recompute
from memsave.techniques import find_technique
from tests.memsave.kept_bytes import saved_bytes
from tests.memsave.recompute_twins import (
    ACTIVATION_BYTES,
    STATISTICS_BYTES,
    C,
    H,
    N,
    Readers,
    W,
    assert_same_bits,
    gradients,
    recomputed_sequence,
    twins,
)


def _one_reader(m: Readers, z: Tensor) -> Tensor:
    out: Tensor = m.a(z)
    return out


def _two_readers(m: Readers, z: Tensor) -> Tensor:
    out: Tensor = m.a(z) * m.b(z)
    return out


def test_a_model_without_pairs_is_refused() -> None:
    for use in (recompute, attach_recompute):
        with pytest.raises(OptionError, match="Linear has no RecomputedNormAct"):
            use(nn.Linear(2, 2))


def test_an_attached_model_needs_no_scope_and_closes_its_own() -> None:
    plain, mine = twins(_two_readers)
    inner = attach_recompute(mine)
    assert attach_recompute(mine) is inner is mine
    assert len(mine._forward_pre_hooks) == 1
    x = torch.randn(N, C, H, W)
    assert saved_bytes(lambda: mine(x), mine) == 4 * ACTIVATION_BYTES + STATISTICS_BYTES
    with pytest.raises(RuntimeError, match="expected input"):
        mine(torch.randn(N, C + 1, H, W))  # fails inside: the scope ends nevertheless
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    mine.zero_grad()
    mine.load_state_dict(plain.state_dict())
    assert_same_bits(gradients(copy.deepcopy(mine), False), gradients(plain, False))


def test_an_attached_model_can_be_copied_and_pickled() -> None:
    mine = attach_recompute(recomputed_sequence())
    x = torch.randn(N, C, H, W)
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(twin(x), mine(x))
        assert list(twin.state_dict()) == list(mine.state_dict())


def test_a_hook_that_changes_the_norms_result_is_heard() -> None:
    """With hooks of its own the pair is a plain one: they are not called a second time."""
    plain, mine = twins(_two_readers)
    for model in (plain, mine):
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.register_forward_hook(lambda _m, _a, y: y * 2)
    assert_same_bits(gradients(mine, True), gradients(plain, False))


def test_a_scope_acts_on_its_own_thread_alone() -> None:
    _, mine = twins(_one_reader)
    found: list[object] = []
    with recompute(mine):
        thread = threading.Thread(
            target=lambda: found.append(torch._C._autograd._top_saved_tensors_default_hooks(False))
        )
        thread.start()
        thread.join()
    assert found == [None]


@pytest.mark.parametrize("way", ["scope around", "scope attached", "scope inside"])
def test_a_compiled_model_gives_the_same_gradients(way: str) -> None:
    """torch.compile takes the plain pair, whose tensors the scope does not know."""
    mine = recomputed_sequence()
    x = torch.randn(N, C, H, W)
    torch.autograd.backward(mine(x).sum())
    expected = [p.grad for p in mine.parameters() if p.grad is not None]
    mine.zero_grad()

    def inside(x: Tensor) -> Tensor:
        with recompute(mine) if way == "scope inside" else nullcontext():
            result: Tensor = mine(x).sum()
        return result

    if way == "scope attached":
        attach_recompute(mine)
    compiled = torch.compile(inside, backend="aot_eager")
    with recompute(mine) if way == "scope around" else nullcontext():
        loss = compiled(x)
    torch.autograd.backward(loss)
    for a, b in zip((p.grad for p in mine.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b)  # a compiler may take another order of sums


NETWORKS: list[tuple[str, dict[str, object], tuple[int, ...]]] = [
    ("fcn", {"base_width": 8}, (1, 1, 16, 8, 8)),
    ("fcn", {"base_width": 8, "block": "ccblock"}, (1, 1, 16, 8, 8)),
    ("light_unet", {}, (1, 1, 16, 16, 8)),
    ("dense_vnet", {}, (1, 1, 16, 16, 8)),
    ("conv_lstm", {"base_width": 4, "levels": 3}, (1, 1, 8, 8, 3)),
    ("conv_lstm_unet", {"base_width": 4, "levels": 3}, (2, 1, 8, 8)),
]


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS, ids=lambda v: str(v))
def test_the_technique_gives_the_papers_networks_their_bits(
    name: str, options: dict[str, object], shape: tuple[int, ...], half: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    plain = networks.build(name, options)
    technique = find_technique("recomputed_norm_act")
    mine = technique.module(copy.deepcopy(plain), None)
    assert list(mine.state_dict()) == list(plain.state_dict())
    found, x = [], torch.randn(shape)
    for model in (plain, mine):
        torch.manual_seed(1)  # dropout
        scope = technique.step(model, None) if model is mine else nullcontext()
        with scope, torch.autocast("cpu", dtype=half, enabled=half is not None):
            loss = model(x).float().square().mean()
        torch.autograd.backward(loss)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients, *model.buffers()])
    assert_same_bits(found[1], found[0])


def test_the_technique_refuses_a_network_without_pairs() -> None:
    with pytest.raises(OptionError, match="PocketNet2D has no pair of norm and activation"):
        find_technique("recomputed_norm_act").module(networks.build("pocketnet_2d", {}), None)


@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
def test_the_tracer_of_predictions_sees_the_same_bytes(order: str) -> None:
    """What a forward leaves: input, x of two pairs, the result, and numbers a channel."""
    technique = find_technique("recomputed_norm_act")
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer:
            layers: list[nn.Module] = []
            for _ in range(2):
                pair = [nn.BatchNorm2d(C), nn.ReLU(inplace=True)]
                layers += [nn.Conv2d(C, C, 3, padding=1, bias=False)]
                layers += pair if order == "norm_act" else pair[::-1]
            layers.append(nn.Conv2d(C, C, 3, padding=1, bias=False))
            model = technique.module(nn.Sequential(*layers), None)
            tracer.phase("forward")
            with technique.step(model, None):
                result = model(torch.randn(N, C, H, W))
                tracer.phase("backward")
                torch.autograd.backward(result.sum())
            tracer.stop()
    live: dict[int, int] = {}
    at: dict[str, int] = {}
    for event in tracer.trace.events:
        if event[0] == "phase":
            at[event[1]] = sum(live.values())
        elif event[0] == "alloc":
            live[event[1]] = event[2]
        elif event[0] == "free":
            del live[event[1]]
    assert at["backward"] - at["forward"] == (3 + 1) * ACTIVATION_BYTES + 2 * STATISTICS_BYTES
    assert all(p.grad is not None for p in model.parameters())


def test_whoever_reads_the_norms_attributes_still_finds_them() -> None:
    """As torch's own transformer layer does in evaluation, where it asks for ``norm1.eps``."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    mine = copy.deepcopy(plain)
    mine.norm1 = RecomputedNormAct(mine.norm1)  # type: ignore[assignment]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(mine.eval()(x), plain.eval()(x))
    assert mine.norm1.weight is mine.norm1.norm.weight  # type: ignore[union-attr]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mine.norm1.nothing
