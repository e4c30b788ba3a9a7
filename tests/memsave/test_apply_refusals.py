"""What ``memsave.apply`` refuses, because the network would compute something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.errors import OptionError, RefusedError, UnknownNameError
from memsave.networks import FCN
from tests.memsave.apply_models import IN_PLACE_ATOL, ResNet, Sequence, compare, sequence

X = torch.zeros(2, 3, 8, 8)
Forward = Callable[["Custom", Tensor], Tensor]


class Custom(nn.Module):
    """A convolution, two norms and an activation, in whatever order ``forward`` is given."""

    def __init__(self, forward: Forward, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.01) if activation is None else activation
        self.head = nn.Conv2d(4, 2, 1)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def _tensor(result: Any) -> Tensor:
    """Say what a layer returns, which mypy does not know."""
    return cast(Tensor, result)


def _residual(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    return _tensor(m.head(m.act(m.norm(y)) + y))


def _early_reader(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    gate = y.sigmoid()
    return _tensor(m.head(m.act(m.norm(y)) * gate))


def _view_reader(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    part = y[:, :1]
    return _tensor(m.head(m.act(m.norm(y)) + part))


def _returned(m: Custom, x: Tensor) -> Any:
    y = m.conv(x)
    return m.head(m.act(m.norm(y))), y


def _after_sigmoid(m: Custom, x: Tensor) -> Tensor:
    return _tensor(m.head(m.act(m.norm(m.conv(x).sigmoid()))))


def _after_unknown(m: Custom, x: Tensor) -> Tensor:
    return _tensor(m.head(m.act(m.norm(m.conv(x).cumsum(2)))))


def _own_input(m: Custom, x: Tensor) -> Tensor:
    return _tensor(m.head(m.act(m.norm(x.expand(-1, -1, -1, -1)))))


def _sum_over_read(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    old = y.relu()
    y += 1
    return _tensor(m.head(m.act(m.norm(y)) + old))


def _alias_read(m: Custom, x: Tensor) -> Tensor:
    old = y = m.conv(x)
    y += 1  # what ``old`` is too
    return _tensor(m.head(m.act(m.norm(y)) + old))


def _result_overwritten(m: Custom, x: Tensor) -> Tensor:
    z = m.act(m.norm(m.conv(x)))
    z += x.mean()
    return _tensor(m.head(z))


def _result_returned(m: Custom, x: Tensor) -> Tensor:
    result: Tensor = m.act(m.norm(m.conv(x)))
    return result


WRONG: list[tuple[Forward, str]] = [
    (_residual, "its input is also read by add"),
    (_early_reader, "its input is also read by sigmoid"),
    (_view_reader, "its input is also read by (add in the forward and slice|getitem)"),
    (_returned, "its input is also a result of the model"),
    (_after_sigmoid, r"made by sigmoid in the forward \(sigmoid\), which needs it unchanged"),
    (_after_unknown, r"made by cumsum in the forward \(cumsum\), which may need it unchanged"),
    (_sum_over_read, "what was there before is also read by relu|also read by i?add"),
    (_alias_read, "also read by add in the forward"),
    (_result_overwritten, "its result is overwritten by i?add"),
]


@pytest.mark.parametrize(("forward", "reason"), WRONG, ids=[f.__name__ for f, _ in WRONG])
@pytest.mark.parametrize("example", [X, None], ids=["run", "symbols"])
def test_a_norm_that_must_not_work_in_place_is_refused_and_the_model_untouched(
    forward: Forward, reason: str, example: Tensor | None
) -> None:
    model = Custom(forward)
    before = repr(model)
    with pytest.raises(RefusedError, match=rf"inplace_abn can replace nothing in Custom.*{reason}"):
        memsave.apply(model, ["inplace_abn"], example_inputs=example)
    assert repr(model) == before
    assert type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("example", [X, None], ids=["run", "symbols"])
def test_a_result_of_the_models_own_is_replaced_and_said_to_be_overwritten(
    example: Tensor | None,
) -> None:
    """Its gradients are right: what reads the result has run backward when the norm's begins."""
    torch.manual_seed(0)
    model = Custom(_result_returned)
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, ["inplace_abn"], example_inputs=example)
    (change,) = applied.replaced
    assert change.reason.endswith("backward overwrites it, so read it before")
    compare(model, plain, torch.randn(2, 3, 8, 8), atol=IN_PLACE_ATOL, gradient_share=0.01)


@pytest.mark.parametrize("example", [X, None], ids=["run", "symbols"])
def test_a_norm_on_the_models_own_input_is_refused(example: Tensor | None) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(), nn.Conv2d(3, 2, 1))
    with pytest.raises(RefusedError, match="0: its input is the input of the model"):
        memsave.apply(model, ["inplace_abn"], example_inputs=example)


@pytest.mark.parametrize("forward", [_residual, _early_reader, _after_sigmoid, _returned])
def test_the_lossless_twin_is_named_and_takes_what_was_refused(forward: Forward) -> None:
    with pytest.raises(RefusedError, match=r"\. recomputed_norm_act saves as much and changes"):
        memsave.apply(Custom(forward), ["inplace_abn"], example_inputs=X)
    model = Custom(forward)
    plain = copy.deepcopy(model)
    assert memsave.apply(model, ["recomputed_norm_act"], example_inputs=X).replaced
    compare(model, plain, torch.randn(2, 3, 8, 8), atol=0, gradient_share=0)


@pytest.mark.parametrize("function", [False, True], ids=["layer", "function"])
def test_relu_is_refused_unless_it_may_become_leaky(function: bool) -> None:
    torch.manual_seed(0)
    model = ResNet() if function else sequence(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    leaky = copy.deepcopy(model)
    with pytest.raises(RefusedError, match=r"ReLU cannot be inverted: relu='leaky' makes it"):
        memsave.apply(model, ["inplace_abn"])
    applied = memsave.apply(model, ["inplace_abn"], relu="leaky")
    assert all("ReLU became leaky ReLU 0.01, which changes" in str(c) for c in applied.replaced)
    if not function:
        leaky.register_module("2", nn.LeakyReLU(0.01))
        compare(model, leaky, torch.randn(2, 3, 8, 8), atol=IN_PLACE_ATOL, gradient_share=1e-2)


def test_activation_before_norm_is_refused_unless_the_two_may_be_swapped() -> None:
    torch.manual_seed(0)
    model = FCN(widths=(4, 8))
    published = FCN(widths=(4, 8), norm="inplace_abn")
    with pytest.raises(RefusedError, match=r"and 5 more: ReLU comes before it: reorder=True"):
        memsave.apply(model, ["inplace_abn"], relu="leaky")
    applied = memsave.apply(model, ["inplace_abn"], relu="leaky", reorder=True)
    assert len(applied.replaced) == 6
    assert "the norm comes first now, which changes" in str(applied.replaced[0])
    state = dict(zip(published.state_dict(), model.state_dict().values(), strict=True))
    published.load_state_dict(state)
    image = torch.randn(1, 1, 8, 8, 8)
    # what the paper's authors built by hand: the same layers on the same weights
    compare_results(model, published, image)


def compare_results(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    for training in (True, False):
        model.train(training)
        other.train(training)
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


def test_an_activation_that_serves_elsewhere_too_is_not_swapped() -> None:
    def forward(m: Custom, x: Tensor) -> Tensor:
        return _tensor(m.act(m.head(m.norm(m.act(m.conv(x))))))

    with pytest.raises(RefusedError, match="act before it also serves elsewhere: they cannot"):
        memsave.apply(Custom(forward), ["inplace_abn"], example_inputs=X, reorder=True)


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_slope_that_cannot_be_inverted_is_refused(slope: float) -> None:
    model = sequence(nn.BatchNorm2d(4), nn.LeakyReLU(slope))
    with pytest.raises(RefusedError, match=rf"LeakyReLU has {slope:g} for its slope, and only"):
        memsave.apply(model, ["inplace_abn"])


def test_a_negative_scale_is_refused_for_it_would_act_as_its_absolute_value() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight[1] = -0.5
    model = sequence(norm, nn.LeakyReLU())
    with pytest.raises(RefusedError, match="1 of its 4 scales are negative"):
        memsave.apply(model, ["inplace_abn"])


def _started_by_norm() -> nn.Module:
    region = nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 1))
    return nn.Sequential(nn.Conv2d(3, 4, 1), region, nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("order", [0, 1], ids=["norm first", "checkpoint first"])
def test_an_in_place_norm_must_not_start_a_checkpointed_region(order: int) -> None:
    model = _started_by_norm()
    before = repr(model)
    techniques: list[Any] = ["inplace_abn", ("checkpoint", {"blocks": ["1"]})]
    with pytest.raises(RefusedError, match=r"1\.0 overwrites the input of the checkpointed region"):
        memsave.apply(model, techniques[::-1] if order else techniques, example_inputs=X)
    assert repr(model) == before
    memsave.apply(model, ["recomputed_norm_act", *techniques[1:]], example_inputs=X)
    plain = _started_by_norm()
    plain.load_state_dict(model.state_dict())
    compare(model, plain, torch.randn(2, 3, 8, 8), atol=0, gradient_share=0)


def test_a_region_checkpointed_or_a_norm_in_place_since_earlier_counts_too() -> None:
    model = _started_by_norm()
    memsave.apply(model, [{"checkpoint": {"blocks": ["1"]}}])
    with pytest.raises(RefusedError, match="replace this norm by recomputed_norm_act"):
        memsave.apply(model, ["inplace_abn"], example_inputs=X)
    model = _started_by_norm()
    memsave.apply(model, ["inplace_abn"], example_inputs=X)
    with pytest.raises(RefusedError, match="replace this norm by recomputed_norm_act"):
        memsave.apply(model, [("checkpoint", {"blocks": ["1"]})], example_inputs=X)


def test_a_region_that_starts_with_the_convolution_is_checkpointed_with_its_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sequence(nn.BatchNorm2d(4), nn.LeakyReLU()), nn.Conv2d(2, 2, 1))
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, ["inplace_abn", ("checkpoint", {"blocks": ["0"]})])
    assert [change.technique for change in applied.replaced] == ["inplace_abn", "checkpoint"]
    assert str(applied.replaced[1]) == "replaced 0: Sequence by CheckpointedSequence (checkpoint)"
    compare(model, plain, torch.randn(2, 3, 8, 8), atol=IN_PLACE_ATOL, gradient_share=1e-2)


def test_foreign_blocks_are_checkpointed_by_name_only() -> None:
    model = ResNet()
    with pytest.raises(OptionError, match=r"ResNet does not say .*\"blocks\": \['layers'\]"):
        memsave.apply(model, ["checkpoint"])
    with pytest.raises(UnknownNameError, match=r"unknown block 'layer' .*'layers'"):
        memsave.apply(model, [("checkpoint", {"blocks": ["layer"]})])
    plain = copy.deepcopy(model)
    memsave.apply(model, [("checkpoint", {"blocks": ["layers.0", "layers.1"]})])
    compare(model, plain, torch.randn(2, 3, 8, 8), atol=0, gradient_share=0)


def test_our_own_networks_know_their_blocks() -> None:
    model = FCN(widths=(4, 8), norm="inplace_abn")
    applied = memsave.apply(model, [("checkpoint", {"every": 2})])
    assert [change.modules for change in applied.replaced] == [("encoder.0",), ("decoder.0",)]


def test_a_technique_whose_norm_is_not_there_says_which_one_is() -> None:
    model = sequence(nn.GroupNorm(2, 4), nn.LeakyReLU())
    with pytest.raises(OptionError, match=r"no norm of its kind in Sequence \(1 GroupNorm\): use"):
        memsave.apply(model, ["inplace_abn"])
    with pytest.raises(OptionError, match=r"Sequence \(none left to replace\): leave this"):
        memsave.apply(Sequence(nn.Conv2d(3, 2, 1)), ["inplace_abn"])


@pytest.mark.parametrize(
    ("techniques", "error", "message"),
    [
        (["inplace_bn"], UnknownNameError, "unknown technique 'inplace_bn' .*'inplace_abn'"),
        (["inplace_abn", "inplace_abn"], OptionError, "'inplace_abn' is named twice"),
        ([("checkpoint", {"evry": 2})], UnknownNameError, "'checkpoint' 'evry' .*'every'"),
        ({"checkpoint": {"every": 0}}, OptionError, "every must be 1 or more, got 0"),
        ([3], OptionError, "a technique is its name, .* got 3"),
        ([("checkpoint", 2)], OptionError, "a technique is its name"),
    ],
    ids=str,
)
def test_techniques_that_cannot_be_are_refused(
    techniques: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        memsave.apply(sequence(nn.BatchNorm2d(4), nn.LeakyReLU()), techniques)


def test_a_choice_about_relu_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="relu must be 'keep' or 'leaky', got 'swish'"):
        memsave.apply(nn.Conv2d(1, 1, 1), [], relu="swish")  # type: ignore[arg-type]


def test_hooks_and_subclasses_and_statistics_are_reasons_to_keep_a_norm() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    def report(norm: nn.Module, technique: str = "inplace_abn") -> str:
        model = nn.Sequential(sequence(norm, nn.LeakyReLU()), nn.Conv2d(2, 2, 1))
        return str(memsave.apply(model, [technique], dry_run=True))

    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda *_: None)
    assert "kept 0.1: it or its activation has hooks" in report(hooked)
    assert "kept 0.1: it is Doubled, and inplace_abn takes BatchNorm1d" in report(Doubled(4))
    tracked = nn.InstanceNorm2d(4, track_running_stats=True)
    assert "kept 0.1: it has running statistics" in report(tracked, "inplace_instance_norm")
