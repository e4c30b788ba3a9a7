"""Checkpointing changes bytes, never results: gradients, statistics, masks, names."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memsave.checkpoint import checkpoint_block, checkpoint_sequence, checkpoint_steps
from memsave.errors import InputError, OptionError
from memsave.in_place_abn import InPlaceABN
from memsave.networks import FCN
from tests.memsave.kept_bytes import saved_bytes

N, C, H, W = 2, 4, 6, 5
ACTIVATION_BYTES = N * C * H * W * 4


def _layer(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C))


def _norms() -> dict[str, Callable[[int], nn.Module]]:
    return {
        "batch_norm": lambda c: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(c)),
        "inplace_abn": InPlaceABN,
        "instance_norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        "dropout": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.Dropout(0.5)),
        "average": lambda c: nn.BatchNorm2d(c, momentum=None),
    }


def _stack(norm: str, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_layer(_norms()[norm]) for _ in range(depth)))


def _train_twice(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
    """Two forwards and backwards of one seed: the second result, gradients and buffers."""
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W, requires_grad=True)
    for _ in range(2):
        result = model(x)
        seen = result.detach().clone()  # in-place ABN's result does not outlive backward
        torch.autograd.backward(result.square().mean())
    return seen, [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("norm", _norms())
@pytest.mark.parametrize("way", ["block", "sequence", "steps"])
def test_results_gradients_and_statistics_are_the_plain_models(way: str, norm: str) -> None:
    """Bit for bit, running statistics and batch counts included, dropout's masks too."""
    plain = _stack(norm)
    layers = copy.deepcopy(plain)
    checkpointed: nn.Module = layers
    if way == "block":
        for block in layers:
            checkpoint_block(block)
    elif way == "sequence":
        checkpointed = checkpoint_sequence(layers, 2)
    else:
        checkpointed = _Recurrent(list(layers), every=2)
    expected, expected_tensors = _train_twice(plain)
    actual, actual_tensors = _train_twice(checkpointed)
    assert torch.equal(actual, expected)
    assert len(actual_tensors) == len(expected_tensors)
    for a, b in zip(actual_tensors, expected_tensors, strict=True):
        assert a is not None
        assert torch.equal(a, b)  # type: ignore[arg-type]
    counts = [int(b) for n, b in checkpointed.named_buffers() if n.endswith("batches_tracked")]
    assert counts == [0 if norm == "instance_norm" else 2] * 3  # instance norm does not count


class _Recurrent(nn.Module):
    """A stack of layers, seen as steps: the step is a method, the state what goes through."""

    def __init__(self, layers: list[nn.Module], every: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.every = every
        self.position = 0

    def step(self, state: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        state = self.layers[int(index)](state)
        return state, state

    def forward(self, x: Tensor) -> Tensor:
        indices = torch.arange(len(self.layers)).unbind()
        last, outputs = checkpoint_steps(self.step, self.every)(x, indices)
        assert len(outputs) == len(self.layers)
        return last


def test_fcn_with_in_place_abn_is_exact_under_checkpointing() -> None:
    """Every block starts with a convolution, so overwriting inside it is harmless."""
    torch.manual_seed(0)
    plain = FCN(widths=(4, 8), block="ccblock", norm="inplace_abn")
    checkpointed = copy.deepcopy(plain)
    for name in checkpointed.checkpointable_blocks():
        checkpoint_block(checkpointed.get_submodule(name))
    image = torch.randn(1, 1, 8, 8, 4)
    for model in (plain, checkpointed):
        torch.autograd.backward(model(image).square().mean())
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]
    assert torch.equal(
        plain.encoder[0].norm1.running_var,  # type: ignore[arg-type,union-attr]
        checkpointed.encoder[0].norm1.running_var,  # type: ignore[arg-type,union-attr]
    )


def test_a_region_that_overwrites_its_own_input_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(C, C, 1), checkpoint_block(nn.Sequential(InPlaceABN(C), nn.Conv2d(C, C, 1)))
    )
    x = torch.randn(N, C, H, W)
    with pytest.raises(InputError, match="region overwrites its own input"):
        model(x)
    with torch.no_grad():
        assert model(x).shape == x.shape  # nothing is run again


def test_an_input_that_somebody_overwrites_later_is_refused() -> None:
    conv, block = nn.Conv2d(C, C, 1), checkpoint_block(nn.Conv2d(C, C, 1))
    x = conv(torch.randn(N, C, H, W))
    result = block(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(result.sum())


def test_evaluation_leaves_the_statistics_alone() -> None:
    model = checkpoint_block(_stack("batch_norm")).eval()
    before = copy.deepcopy(model.state_dict())
    torch.autograd.backward(model(torch.randn(N, C, H, W)).sum())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_failing_recomputation_gives_the_statistics_back() -> None:
    model = checkpoint_block(nn.Sequential(*_stack("batch_norm", 1), _FailsSecond()))
    buffers = list(model.buffers())
    result = model(torch.randn(N, C, H, W))
    with pytest.raises(ArithmeticError, match="second time"):
        torch.autograd.backward(result.sum())
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


class _FailsSecond(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise ArithmeticError("second time")
        return x.sigmoid()


def test_a_block_keeps_its_input_alone() -> None:
    x = torch.randn(N, C, H, W, requires_grad=True)
    model = checkpoint_block(_stack("inplace_abn"))
    assert saved_bytes(lambda: model(x), model) == ACTIVATION_BYTES


def test_a_sequence_keeps_the_inputs_of_its_segments_and_its_last_run() -> None:
    """5 layers in 2 segments: 3 and 2. Kept: x; of layers 4 and 5 two inputs, z, 1/std."""
    x = torch.randn(N, C, H, W, requires_grad=True)
    model = checkpoint_sequence(_stack("inplace_abn", 5), 2)
    # x, the result of layer 3 that layer 4 reads, z of layer 4 that layer 5 reads, z of layer 5
    assert saved_bytes(lambda: model(x), model) == 4 * ACTIVATION_BYTES + 2 * C * 4


def test_steps_keep_one_state_for_every_few() -> None:
    """7 steps by 3: the states before steps 1, 4 and 7, and the 7 inputs."""
    cell = nn.Conv2d(2 * C, C, 3, padding=1)
    inputs = torch.randn(7, N, C, H, W)

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(cell(torch.cat([state, x], 1))), None

    first = torch.zeros(N, C, H, W, requires_grad=True)
    run = checkpoint_steps(step, 3)
    kept = saved_bytes(lambda: run(first, inputs.unbind())[0], cell)
    assert kept == 3 * ACTIVATION_BYTES + inputs.nbytes


def test_steps_of_a_function_update_the_statistics_of_the_modules_named() -> None:
    norm = nn.BatchNorm2d(C)

    def step(state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        h = norm(state["h"] + x).tanh()
        return {"h": h}, h.mean()

    first = {"h": torch.zeros(N, C, H, W, requires_grad=True)}
    state, outputs = checkpoint_steps(step, 2, modules=[norm])(first, torch.randn(5, N, C, H, W))
    torch.autograd.backward(state["h"].sum() + sum(outputs))
    assert norm.num_batches_tracked == 5


@pytest.mark.parametrize("segments", [0, 4])
def test_more_segments_than_modules_are_refused(segments: int) -> None:
    with pytest.raises(OptionError, match=f"from 1 to 3 .modules., got {segments}"):
        checkpoint_sequence(_stack("batch_norm", 3), segments)


def test_steps_by_none_are_refused() -> None:
    with pytest.raises(OptionError, match="every must be 1 or more steps, got 0"):
        checkpoint_steps(lambda s, _x: (s, None), 0)


def test_a_sequence_may_be_given_as_a_list() -> None:
    layers = list(_stack("batch_norm", 3))
    sequence = checkpoint_sequence(layers, 3)
    assert list(sequence) == layers
    assert list(sequence.state_dict()) == list(_stack("batch_norm", 3).state_dict())


def test_names_hooks_and_class_stay_what_they_were() -> None:
    model = _stack("batch_norm")
    before = list(model.state_dict())
    assert checkpoint_block(checkpoint_block(model)) is model
    assert list(model.state_dict()) == before
    assert isinstance(model, nn.Sequential)
    assert type(model).__mro__[2] is nn.Sequential  # once, though asked twice


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_is_checkpointed_and_has_its_own_parameters(copied: str) -> None:
    model = checkpoint_block(_stack("inplace_abn"))
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    x = torch.randn(N, C, H, W, requires_grad=True)
    assert saved_bytes(lambda: other(x), other) == ACTIVATION_BYTES
    torch.autograd.backward(other(x).sum())
    assert all(p.grad is None for p in model.parameters())


def test_autocast_is_the_same_in_the_recomputation() -> None:
    plain = _stack("inplace_abn")
    checkpointed = checkpoint_block(copy.deepcopy(plain))
    x = torch.randn(N, C, H, W)
    for model in (plain, checkpointed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(x)
        assert result.dtype == torch.bfloat16
        torch.autograd.backward(result.float().square().mean())
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
