"""Checkpoints on a GPU, whose random generator is another than the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.memsave.test_checkpoint_mutants import WAYS, layers

pytestmark = pytest.mark.gpu


@pytest.mark.needs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_the_random_state_of_a_gpu_is_restored_too(way: str) -> None:
    plain = layers(0.5).cuda()
    changed = WAYS[way](copy.deepcopy(plain))
    found = []
    for model in (plain, changed):
        torch.manual_seed(1)
        torch.autograd.backward(model(torch.ones(2, 4, 6, 6, device="cuda")).square().mean())
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, actual in zip(*found, strict=True):
        # cuDNN may sum a weight's gradient in another order; other masks would differ by far more.
        torch.testing.assert_close(expected, actual, rtol=1e-4, atol=1e-6)
