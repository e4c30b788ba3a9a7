"""Two-level checkpoints of a recurrence: the states that live are about a square root of all."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave.checkpoint import checkpoint_steps
from memsave.checkpoint_nested import checkpoint_nested_steps, kept_states, segment_length
from memsave.errors import OptionError
from memsave.networks.conv_lstm import ConvLSTM
from memsave.techniques import find_technique, parse_options
from tests.memsave.kept_bytes import LiveBytes
from tests.memsave.traced_bytes import traced_kept_bytes

STATE = 64 * 4  # bytes of one state of 64 float32
WORK = 5  # states: the steps' inside tensors, the gradients, and the state that runs


def _step(state: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
    """Two tensors a state, in a tuple as an LSTM's; neither is an output."""
    h, c = state
    c = torch.tanh(c * 1.5 + h)
    return (torch.tanh(c + x), c), None


def _peak_states(steps: int, nested: bool) -> tuple[int, int, list[Tensor]]:
    """Return bytes kept after forward and at the peak of a training step, and the gradients."""
    first = tuple(torch.linspace(-1, 1, 64).add(k).requires_grad_() for k in range(2))
    inputs = [torch.zeros(())] * steps
    run = checkpoint_nested_steps(_step) if nested else checkpoint_steps(_step, 1)
    with LiveBytes() as live:
        state, _ = run((first[0], first[1]), inputs)
        kept = live.now_bytes
        torch.autograd.backward(state[0].sum())
        del state
    return kept, live.peak_bytes, [t.grad for t in first if t.grad is not None]


@pytest.mark.parametrize("steps", [320, 1000])
def test_states_alive_are_about_the_square_root_of_the_steps(steps: int) -> None:
    """Counted as bytes of tensors that live, for states of two tensors in a tuple."""
    kept, peak, gradients = _peak_states(steps, nested=True)
    segments = math.ceil(steps / segment_length(steps))
    # The state before the first segment is the caller's; the last one is the result.
    assert kept == 2 * segments * STATE
    assert peak <= 2 * (kept_states(steps) + WORK) * STATE
    assert kept_states(steps) <= math.ceil(2 * math.sqrt(steps)) + 1
    _, one_level, expected = _peak_states(steps, nested=False)
    assert one_level >= 2 * (steps - 1) * STATE
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(
    ("steps", "every", "segment", "states"),
    [(320, 1, 16, 36), (1000, 1, 28, 64), (1, 1, 1, 2), (7, 3, 3, 4), (320, 4, 32, 18)],
)
def test_a_segment_is_as_long_as_keeps_fewest_states(
    steps: int, every: int, segment: int, states: int
) -> None:
    assert segment_length(steps, every) == segment
    assert kept_states(steps, every) == states
    lengths = range(every, steps + every, every)
    assert states == min(math.ceil(steps / m) + math.ceil(min(m, steps) / every) for m in lengths)


class _Cell(nn.Module):
    """A step with what must not happen twice: statistics, a count and random masks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2, momentum=None)
        self.runs = 0

    def forward(self, state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self.runs += 1
        h = torch.dropout(self.norm(self.conv(state["h"] + x)).tanh(), 0.3, True)
        return {"h": h}, h.mean()


@pytest.mark.parametrize("segment", [None, 2, 4, 16])
@pytest.mark.parametrize("every", [1, 2])
def test_it_is_the_plain_loop_bit_for_bit(every: int, segment: int | None) -> None:
    torch.manual_seed(0)
    plain = _Cell()
    cell = copy.deepcopy(plain)
    inputs = torch.randn(9, 2, 2, 4, 4)
    found = []
    outputs: list[Tensor]
    for model, nested in ((plain, False), (cell, True)):
        torch.manual_seed(1)
        state, outputs = {"h": torch.ones(2, 2, 4, 4, requires_grad=True)}, []
        first = state["h"]
        if nested:
            state, outputs = checkpoint_nested_steps(model, every, segment)(state, inputs)
        else:
            for x in inputs:
                state, output = model(state, x)
                outputs.append(output)
        torch.autograd.backward(state["h"].square().sum() + sum(outputs))
        gradients = [first.grad, *(p.grad for p in model.parameters())]
        found.append([state["h"].detach(), *gradients, *model.buffers()])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)
    assert cell.norm.num_batches_tracked == 9
    # Forward, segment, step; but a segment runs no further than its last region's inputs.
    length = segment or segment_length(9, every)
    segments = [min(length, 9 - start) for start in range(0, 9, length)]
    last_regions = [(size - 1) % every + 1 for size in segments]
    assert (plain.runs, cell.runs) == (9, 3 * 9 - sum(last_regions))


def test_in_a_conv_lstm_the_tracer_sees_a_square_root_of_states() -> None:
    """80 slices of 4 x 4: result, and h and c of 10 segments; without nesting h and c of 80."""
    kept = {}
    for nested in (False, True):

        def prepare(nested: bool = nested) -> Any:
            model = ConvLSTM(widths=(2, 2))
            model.checkpoint_every(1, nested=nested)
            volume = torch.randn(1, 1, 4, 4, 80)
            return lambda: model(volume)

        kept[nested] = traced_kept_bytes(prepare)
    a_map = 4 * 4 * 4
    assert kept[False] == (80 + 2 * 80) * a_map
    assert kept[True] == (80 + 2 * 10) * a_map


def test_a_conv_lstm_trains_the_same_by_the_technique() -> None:
    technique = find_technique("checkpoint_steps")
    torch.manual_seed(0)
    plain = ConvLSTM(widths=(2, 4)).double()
    volume = torch.randn(1, 1, 4, 4, 7, dtype=torch.float64)
    nested = copy.deepcopy(plain)
    technique.module(nested, parse_options(technique, {"nested": True, "segment": 3}))
    assert (nested.checkpoints_nested, nested.checkpoint_segment) == (True, 3)
    for model in (plain, nested):
        torch.autograd.backward(model(volume).square().sum())
    for expected, actual in zip(plain.parameters(), nested.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad)  # type: ignore[arg-type]
    for expected_b, actual_b in zip(plain.buffers(), nested.buffers(), strict=True):
        assert torch.equal(expected_b, actual_b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested": True, "every": 2, "segment": 3}, "segment must be a multiple of every, 2"),
        ({"nested": True, "every": 2, "segment": 0}, "at least that, got 0"),
        ({"segment": 3}, "segment is for nested: true alone, got segment 3"),
    ],
)
def test_segments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(find_technique("checkpoint_steps"), options)


def test_steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="every must be 1 or more steps, got 0"):
        checkpoint_nested_steps(_step, 0)
    with pytest.raises(OptionError, match="steps and every must be 1 or more, got 0 and 1"):
        segment_length(0)
    with pytest.raises(OptionError, match="segment must be a multiple"):
        ConvLSTM(widths=(2, 2)).checkpoint_every(2, nested=True, segment=3)


def test_no_steps_give_the_first_state_back() -> None:
    state = (torch.zeros(1), torch.ones(1))
    assert checkpoint_nested_steps(_step, 1, 2)(state, []) == (state, [])
