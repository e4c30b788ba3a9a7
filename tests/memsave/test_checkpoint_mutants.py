"""Broken checkpoints, each of which the comparison with the plain model must tell apart."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from memsave import checkpoint as module
from memsave.checkpoint import checkpoint_block, checkpoint_sequence
from memsave.checkpoint_budget import checkpoint_budget
from memsave.checkpoint_nested import checkpoint_nested_steps
from memsave.checkpoint_selective import checkpoint_selective
from tests.memsave.kept_bytes import LiveBytes

N, C, SIDE = 2, 4, 6


def layers(dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.Dropout(dropout))
            for _ in range(3)
        )
    )


def _blocks(layers: nn.Sequential) -> nn.Module:
    for layer in layers:
        checkpoint_block(layer)
    return layers


def _selective(layers: nn.Sequential) -> nn.Module:
    for layer in layers:
        checkpoint_selective(layer)
    return layers


WAYS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "block": _blocks,
    "sequence": lambda layers: checkpoint_sequence(layers, 3),
    "selective": _selective,
    "budget": lambda layers: checkpoint_budget(layers, share=None),
}


def _trained(model: nn.Module) -> Iterator[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, C, SIDE, SIDE)
    torch.autograd.backward(model(x).square().mean())
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    yield from model.buffers()


def _is_exact(way: str, dropout: float) -> bool:
    plain = layers(dropout)
    changed = WAYS[way](copy.deepcopy(plain))
    return all(map(torch.equal, _trained(plain), _trained(changed)))


@pytest.mark.parametrize("way", WAYS)
def test_a_random_state_that_is_not_restored_is_seen(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_exact(way, 0.5)
    broken = functools.partial(torch.utils.checkpoint.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(module, "checkpoint", broken)
    assert not _is_exact(way, 0.5)
    assert _is_exact(way, 0.0)  # nothing else is wrong


@pytest.mark.parametrize("way", WAYS)
def test_statistics_that_are_updated_twice_are_seen(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_exact(way, 0.0)
    monkeypatch.setattr(module, "_statistics_untouched", lambda _: nullcontext())
    assert not _is_exact(way, 0.0)


def _nested_peak_bytes() -> int:
    def step(state: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        return (torch.tanh(state[0] + x), torch.tanh(state[1] * 2)), None

    first = (torch.zeros(64, requires_grad=True), torch.ones(64, requires_grad=True))
    with LiveBytes() as live:
        (h, c), _ = checkpoint_nested_steps(step)(first, [torch.zeros(())] * 100)
        torch.autograd.backward((h + c).sum())
    return int(live.peak_bytes)


def test_states_held_past_an_outer_region_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the state goes to torch as one tuple, all 100 states stay alive, nested or not."""
    state_bytes = 2 * 64 * 4
    assert _nested_peak_bytes() < 30 * state_bytes
    monkeypatch.setattr(module, "tree_flatten", lambda both: (list(both[0]), len(both[0])))
    monkeypatch.setattr(module, "tree_unflatten", lambda leaves, _: (tuple(leaves), {}))
    assert _nested_peak_bytes() > 90 * state_bytes
