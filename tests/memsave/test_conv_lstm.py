"""The convolutional LSTM: its parameters, what each slice keeps, with and without checkpoints."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.networks import ConvLSTM, ConvLSTMUNet, build, find_network
from memsave.networks.conv_lstm import conv_lstm_divisor, conv_lstm_unet_divisor
from memsave.techniques import find_technique, parse_options
from tests.memsave.descent import assert_gradient_is_the_slope
from tests.memsave.kept_bytes import LiveBytes, saved_bytes

WIDTHS = (4, 6, 8)
N, X, Y, SLICES = 2, 8, 12, 5
MAP = N * X * Y * 4  # bytes of one float32 map of one slice
FLOAT, INDEX = 4, 8  # bytes


def _small(**options: Any) -> ConvLSTM:
    torch.manual_seed(0)
    return ConvLSTM(widths=WIDTHS, **options)


def _volume(slices: int = SLICES, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(N, 1, X, Y, slices, dtype=dtype)


def _unet_bytes(norm: str) -> int:
    """What the U-Net keeps of one slice, beside the slice itself, worked out from the shapes.

    BatchNorm keeps each convolution's output and the ReLU its result; in-place ABN the result
    alone. Two numbers a channel of BatchNorm, mean and 1/std, or one of in-place ABN.
    """
    results = 2 * (2 if norm == "batch_norm" else 1)  # of the two convolutions of a level
    numbers = 2 * (2 if norm == "batch_norm" else 1)
    pixels = [N * (X >> level) * (Y >> level) for level in range(len(WIDTHS))]
    kept = sum(results * w * p + numbers * w for w, p in zip(WIDTHS, pixels, strict=True)) * FLOAT
    for level, (fine, coarse) in enumerate(pairwise(WIDTHS)):
        kept += fine * pixels[level + 1] * (FLOAT + INDEX)  # the pooling's result and indices
        kept += (fine + coarse) * pixels[level] * FLOAT  # [skip, up]
        kept += (results * fine * pixels[level] + numbers * fine) * FLOAT  # the decoder's block
    return kept


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize(
    ("upsampling", "parameters"), [("nearest", 31_389_804), ("nearest_conv", 31_044_524)]
)
def test_parameters_are_exactly_those_of_the_paper_as_read(
    upsampling: str, parameters: int, norm: str
) -> None:
    with torch.device("meta"):
        model = ConvLSTM(upsampling=upsampling, norm=norm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    recurrence = sum(p.numel() for p in model.hidden_to_gates.parameters())
    assert recurrence == 4 * 9 + 4
    with torch.device("meta"):
        unet = ConvLSTMUNet(upsampling=upsampling, norm=norm)
    assert sum(p.numel() for p in unet.parameters()) == parameters - recurrence


def test_a_slice_of_512x512_costs_445_gflop() -> None:
    """2 x 9 x i x o a pixel of each 3x3 convolution, 2 x 64 x 4 of the head, 2 x 9 x 4 of h's."""
    widths = (64, 128, 256, 512, 1024)
    convs = [(0, 1, 64), *((level, i, 2 * i) for level, i in enumerate(widths[:-1], start=1))]
    convs += [(level, w, w) for level, w in enumerate(widths)]
    convs += [(level, 3 * w, w) for level, w in enumerate(widths[:-1])]  # [skip, up]
    convs += [(level, w, w) for level, w in enumerate(widths[:-1])]
    flops = sum(2 * 9 * i * o * (512 >> level) ** 2 for level, i, o in convs)
    flops += (2 * 64 * 4 + 2 * 9 * 4) * 512**2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ConvLSTM()(torch.empty(1, 1, 512, 512, 1))
    assert counter.get_total_flops() == flops
    assert round(flops / 1e9) == 445


def test_a_step_is_the_papers_equations() -> None:
    """Against the equations gate by gate, with two hidden maps so that the order shows."""
    model = _small(hidden_size=2).double().eval()
    image = torch.randn(N, 1, X, Y, dtype=torch.float64)
    h, c = torch.randn(2, N, 2, X, Y, dtype=torch.float64)
    (h_next, c_next), output = model.step((h, c), image)
    u: Tensor = model.unet(image)
    weight, bias = model.hidden_to_gates.weight, model.hidden_to_gates.bias
    assert bias is not None

    def gate(index: int) -> Tensor:
        own = slice(2 * index, 2 * index + 2)
        hidden: Tensor = nn.functional.conv2d(h, weight[own], bias[own], padding=1)
        return hidden + u[:, own]

    i, f, o = (torch.sigmoid(gate(k)) for k in range(3))
    expected_c = f * c + i * torch.tanh(gate(3))
    expected_h = o * torch.tanh(expected_c)
    # The same numbers in another order of summation: a few float64 roundings.
    torch.testing.assert_close(c_next, expected_c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h_next, expected_h, rtol=1e-12, atol=1e-12)
    assert output is h_next


def test_probabilities_are_those_of_the_states_slice_by_slice() -> None:
    model = _small().eval()
    volume = _volume()
    h = c = torch.zeros(N, 1, X, Y)
    expected = []
    with torch.no_grad():
        for z in range(SLICES):
            (h, c), _ = model.step((h, c), volume[..., z])
            expected.append((h + 1) / 2)
        predicted = model(volume)
    assert torch.equal(predicted, torch.stack(expected, dim=-1))
    assert torch.equal(model(volume), predicted)  # the walk that keeps a graph
    assert predicted.shape == (N, 1, X, Y, SLICES)
    assert 0 < predicted.min() < predicted.max() < 1


@pytest.mark.parametrize("hidden_size", [1, 3])
@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
def test_every_slice_keeps_its_unet_and_seven_maps(norm: str, hidden_size: int) -> None:
    """i, f and o; g; tanh(c); and the h and c that the step starts from, H maps each."""
    model = _small(norm=norm, hidden_size=hidden_size)
    volume = _volume()
    a_slice = _unet_bytes(norm) + 7 * hidden_size * MAP
    assert saved_bytes(lambda: model(volume), model) == volume.nbytes + SLICES * a_slice


def test_of_a_frozen_unet_nothing_is_kept() -> None:
    model = _small(frozen_unet=True)
    volume = _volume()
    assert saved_bytes(lambda: model(volume), model) == SLICES * 7 * MAP


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize(("every", "states"), [(1, 5), (2, 3), (4, 2), (5, 1), (8, 1)])
def test_checkpointed_it_keeps_the_result_and_a_state_for_every_few_slices(
    every: int, states: int, norm: str
) -> None:
    """All that is alive after the forward: 5 slices of the result and, a state, h and c."""
    model = _small(norm=norm)
    model.checkpoint_every(every)
    volume = _volume()
    with LiveBytes() as live:
        result = model(volume)
        assert live.now_bytes == result.nbytes + states * 2 * MAP
    assert result.nbytes == SLICES * MAP


@pytest.mark.parametrize("every", [None, 2])
def test_the_network_itself_holds_on_to_nothing(every: int | None) -> None:
    """Without the result, all that a forward made is gone."""
    model = _small()
    model.checkpoint_every(every)
    volume = _volume()
    with LiveBytes() as live:
        result = model(volume)
        assert live.now_bytes > 0
        del result
        assert live.now_bytes == 0


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
def test_prediction_needs_one_slices_activations_however_many_there_are(norm: str) -> None:
    """The peak of 120 slices is that of 60 and 60 more slices of the result, held once."""
    model = _small(norm=norm).eval()
    peaks = []
    for slices in (60, 120):
        volume = _volume(slices)
        with LiveBytes() as live, torch.no_grad():
            model(volume)
        peaks.append(live.peak_bytes)
    assert peaks[1] - peaks[0] == 60 * MAP


def test_a_checkpointed_step_has_one_slices_activations_alive() -> None:
    """A slice more adds its h, its c and a few gradients of theirs, no more than 8 maps in all.

    Without checkpoints it adds what its U-Net keeps, 80 maps here.
    """
    added = {}
    for every in (None, 1):
        peaks = []
        for slices in (4, 5):
            model = _small()
            model.checkpoint_every(every)
            volume = _volume(slices)
            with LiveBytes() as live:
                torch.autograd.backward(model(volume).sum())
            peaks.append(live.peak_bytes)
        added[every] = peaks[1] - peaks[0]
    assert added[1] <= 8 * MAP
    assert added[None] > 50 * MAP


def _trained(model: ConvLSTM, volume: Tensor) -> dict[str, Tensor]:
    """Result, gradients and buffers after one forward and backward."""
    volume = volume.clone().requires_grad_()
    result = model(volume)
    torch.autograd.backward((result * torch.linspace(0, 1, result.numel()).view_as(result)).sum())
    tensors = {"result": result.detach(), "volume": volume.grad, **dict(model.named_buffers())}
    return tensors | {f"d {name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("blocks", [False, True], ids=["steps", "steps and blocks"])
def test_checkpointed_it_is_the_plain_network_bit_for_bit(
    blocks: bool, every: int, norm: str
) -> None:
    """Results, gradients and running statistics; each slice is counted once."""
    plain = _small(norm=norm).double()
    checkpointed = copy.deepcopy(plain)
    if blocks:
        technique = find_technique("checkpoint")
        technique.module(checkpointed, parse_options(technique, {}))
    technique = find_technique("checkpoint_steps")
    assert technique.exact
    options = parse_options(technique, {"every": every})
    assert technique.module(checkpointed, options) is checkpointed
    assert checkpointed.steps_per_checkpoint == every
    volume = _volume(dtype=torch.float64)
    expected, actual = _trained(plain, volume), _trained(checkpointed, volume)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    counted = [int(b) for name, b in actual.items() if name.endswith("num_batches_tracked")]
    assert counted == [SLICES] * 10  # two norms in each of three encoder and two decoder blocks


@pytest.mark.parametrize("upsampling", ["nearest", "nearest_conv"])
@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("network", ["conv_lstm", "conv_lstm_unet"])
def test_gradients_reach_every_parameter(network: str, norm: str, upsampling: str) -> None:
    torch.manual_seed(0)
    model = build(network, {"widths": [6, 8], "norm": norm, "upsampling": upsampling})
    image = torch.randn(1, 1, *(8, 6, 3)[: find_network(network).spatial_dims])
    target = (image > 0).double()
    assert_gradient_is_the_slope(
        model, image, lambda p: nn.functional.binary_cross_entropy(p, target)
    )


def test_the_unet_alone_gives_the_probability_of_its_last_gate() -> None:
    model = ConvLSTMUNet(widths=WIDTHS, hidden_size=2).eval()
    image = torch.randn(N, 1, X, Y)
    maps = model.unet(image)
    assert maps.shape == (N, 8, X, Y)
    assert torch.equal(model(image), (torch.tanh(maps[:, 6:]) + 1) / 2)


def test_the_unets_weights_load_into_the_recurrent_network() -> None:
    first = ConvLSTMUNet(widths=WIDTHS)
    second = _small()
    second.unet.load_state_dict(first.unet.state_dict())
    image = torch.randn(N, 1, X, Y)
    assert torch.equal(second.eval().unet(image), first.eval().unet(image))


def test_a_frozen_unet_stays_as_it_is_and_thaws() -> None:
    model = _small(frozen_unet=True)
    before = copy.deepcopy(model.unet.state_dict())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 40
    for _ in range(2):
        model.train()
        torch.autograd.backward(model(_volume()).sum())
    assert all(torch.equal(value, before[key]) for key, value in model.unet.state_dict().items())
    assert all(p.grad is None for p in model.unet.parameters())
    assert all(p.grad is not None for p in model.hidden_to_gates.parameters())
    assert model.freeze_unet(False) is model
    assert model.unet.training
    torch.autograd.backward(model(_volume()).sum())
    assert all(p.grad is not None for p in model.unet.parameters())
    assert not model.eval().freeze_unet(False).unet.training


def test_under_autocast_state_and_probabilities_stay_float32() -> None:
    model = _small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (h, c), _ = model.step(model.first_state(_volume()), _volume()[..., 0])
        assert (h.dtype, c.dtype) == (torch.float32, torch.float32)
        assert model(_volume()).dtype == torch.float32
        assert ConvLSTMUNet(widths=WIDTHS)(_volume()[..., 0]).dtype == torch.float32


class _Constant(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        """Gates of 8, in the half precision that a convolution would give."""
        return torch.full((*image.shape[:1], 4, *image.shape[2:]), 8.0, dtype=torch.bfloat16)


def test_under_autocast_gates_are_not_rounded_to_open_or_shut() -> None:
    """sigmoid(8) = 0.99966, which bfloat16 has no number for but 1."""
    model = _small()
    model.unet = _Constant()  # type: ignore[assignment]
    for parameter in model.hidden_to_gates.parameters():
        nn.init.zeros_(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, h = model.step(model.first_state(_volume()), _volume()[..., 0])
    gate = 1 / (1 + math.exp(-8))
    expected = gate * math.tanh(gate * math.tanh(8))
    torch.testing.assert_close(h, torch.full_like(h, expected))


def test_a_decoder_block_reads_the_skip_and_then_what_comes_from_below() -> None:
    model = ConvLSTMUNet(widths=WIDTHS).eval()
    skips: list[Tensor] = []
    seen: list[Tensor] = []
    for block in model.unet.encoder[:-1]:
        block.register_forward_hook(lambda *args: skips.append(args[2]))
    for block in model.unet.decoder:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(N, 1, X, Y))
    for skip, read in zip(skips[::-1], seen, strict=True):
        assert torch.equal(read[:, : skip.shape[1]], skip)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(N, 1, X, Y, S\), got \(2, 1, 8, 12\)"):
        _small()(torch.randn(2, 1, 8, 12))
    with pytest.raises(InputError, match=r"multiples of \(4, 4, 1\), got \(8, 10, 3\)"):
        _small()(torch.randn(2, 1, 8, 10, 3))
    with pytest.raises(InputError, match=r"\(N, 1, X, Y\), got \(2, 2, 8, 12\)"):
        ConvLSTMUNet(widths=WIDTHS)(torch.randn(2, 2, 8, 12))


@pytest.mark.parametrize(
    ("options", "side"),
    [({}, 16), ({"levels": 3}, 4), ({"widths": [4, 4]}, 2), ({"widths": "pocket"}, 16)],
    ids=str,
)
def test_the_divisor_is_known_without_building(options: dict[str, Any], side: int) -> None:
    assert conv_lstm_divisor(options) == (side, side, 1)
    assert conv_lstm_unet_divisor(options) == (side, side)
    with torch.device("meta"):
        assert ConvLSTM(**options).divisor == (side, side, 1)
        assert ConvLSTMUNet(**options).divisor == (side, side)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"upsampling": "nearst"}, UnknownNameError, "unknown upsampling .*'nearest'"),
        ({"norm": "batchnorm"}, UnknownNameError, "unknown norm .*'batch_norm'"),
        ({"hidden_size": 0}, OptionError, "hidden_size must be an integer of 1 or more, got 0"),
        ({"frozen_unet": "no"}, OptionError, "frozen_unet must be true or false, got 'no'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ConvLSTM(**options)


def test_steps_are_kept_by_ones_or_more_or_all() -> None:
    model = _small()
    with pytest.raises(OptionError, match="every must be an integer of 1 or more, got 0"):
        model.checkpoint_every(0)
    model.checkpoint_every(2)
    model.checkpoint_every(None)
    assert model.steps_per_checkpoint is None


@pytest.mark.parametrize("network", ["conv_lstm", "conv_lstm_unet"])
def test_blocks_to_checkpoint_are_its_modules_in_order(network: str) -> None:
    model: Any = build(network, {"widths": WIDTHS})
    names = model.checkpointable_blocks()
    order: list[str] = []
    for name in names:
        block = model.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        assert isinstance(next(iter(block.children())), nn.Conv2d)
    model(_volume(1) if network == "conv_lstm" else _volume()[..., 0])
    assert tuple(order) == names
