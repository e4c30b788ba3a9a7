"""``memsave.apply`` on networks in the ways people write them: found, changed, reported."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from memsave.errors import OptionError
from memsave.networks import FCN
from memsave.surgery.dataflow_run import guessed_inputs
from memsave.surgery.report import size
from memsave.techniques import TECHNIQUES, Technique
from tests.memsave.apply_models import (
    IN_PLACE_ATOL,
    Choosing,
    ResNet,
    compare,
    kept_bytes,
    sequence,
)

LOSSLESS = "recomputed_norm_act"


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 8)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def leaky_in_place(x: Tensor) -> Tensor:
    return F.leaky_relu(x, negative_slope=0.1, inplace=True)


@pytest.mark.parametrize(
    ("norm", "activation", "technique", "layer"),
    [
        (nn.BatchNorm2d(4), nn.LeakyReLU(0.2), "inplace_abn", "InPlaceABN"),
        (nn.BatchNorm2d(4, affine=False), nn.ELU(0.5), "inplace_abn", "InPlaceABN"),
        (nn.SyncBatchNorm(4), nn.LeakyReLU(), "inplace_abn", "InPlaceABNSync"),
        (nn.GroupNorm(2, 4), nn.LeakyReLU(inplace=True), "inplace_group_norm", "InPlaceGroupNorm"),
        (nn.InstanceNorm2d(4), nn.ELU(), "inplace_instance_norm", "InPlaceInstanceNorm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
@pytest.mark.parametrize("inputs", ["given", "none"])
def test_a_pair_becomes_one_layer_with_the_same_parameters(
    norm: nn.Module, activation: nn.Module, technique: str, layer: str, inputs: str, x: Tensor
) -> None:
    model = sequence(copy.deepcopy(norm), copy.deepcopy(activation))
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    applied = memsave.apply(model, [technique], example_inputs=x if inputs == "given" else None)
    assert applied.model is model
    assert type(model[1]).__name__ == layer
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    if layer != "InPlaceABNSync":  # plain SyncBatchNorm does not run on a CPU
        compare(model, plain, x, atol=IN_PLACE_ATOL, gradient_share=1e-2)


def test_an_optimizer_made_before_still_trains_the_network(x: Tensor) -> None:
    model = sequence(nn.BatchNorm2d(4), nn.LeakyReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    applied = memsave.apply(model, ["inplace_abn"])
    parameters = list(model.parameters())
    before = parameters[2].detach().clone()  # the norm's scale
    with applied.step():
        model(x).square().sum().backward()
    applied.optimizer(optimizer).step()
    assert not torch.equal(before, parameters[2])


def test_bytes_from_shapes_are_those_that_autograd_no_longer_keeps(x: Tensor) -> None:
    for inplace, tensors in ((True, 1), (False, 2)):
        # An activation that is not in place keeps the norm's result beside its own.
        model = sequence(nn.BatchNorm2d(4), nn.LeakyReLU(inplace=inplace))
        plain_bytes = kept_bytes(model, x)
        applied = memsave.apply(model, [LOSSLESS], example_inputs=x)
        assert applied.saved_bytes == tensors * 2 * 4 * 8 * 8 * 4
        assert plain_bytes - kept_bytes(model, x) == applied.saved_bytes


class ByShape(nn.Module):
    """Its forward decides by its input's sides, which symbols do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act, self.head = nn.LeakyReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, 1))
        result: Tensor = self.head(self.act(self.norm(self.conv(x))))
        return result


def test_bytes_are_not_told_without_an_input_of_the_users() -> None:
    for model, way in (
        (sequence(nn.BatchNorm2d(4), nn.ELU()), "symbolic"),
        (ByShape(), "made-up input of shape (2, 3, 64, 64)"),
    ):
        applied = memsave.apply(model, [LOSSLESS])
        assert applied.replaced
        assert applied.saved_bytes is None
        assert way in str(applied)


@pytest.mark.parametrize("function", [leaky, leaky_in_place])
@pytest.mark.parametrize("inputs", ["given", "none"])
@pytest.mark.parametrize("technique", ["inplace_abn", LOSSLESS])
def test_an_activation_that_is_a_function_is_left_out_where_its_norm_applies_it(
    function: Callable[[Tensor], Tensor], inputs: str, technique: str, x: Tensor
) -> None:
    model = ResNet(function)
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, [technique], example_inputs=x if inputs == "given" else None)
    assert [change.modules for change in applied.replaced] == [
        ("bn", "leaky_relu() in the forward"),
        ("layers.0.bn1", "leaky_relu() in layers.0"),
        ("layers.1.bn1", "leaky_relu() in layers.1"),
    ]
    assert [kept.modules[0] for kept in applied.kept] == [
        "layers.0.bn2", "layers.1.bn2", "layers.1.downsample.1"
    ]  # fmt: skip
    exact = technique == LOSSLESS
    compare(
        model, plain, x, atol=0 if exact else IN_PLACE_ATOL, gradient_share=0 if exact else 1e-2
    )


@pytest.mark.parametrize("function", [F.relu, torch.relu_, F.silu])
def test_recomputation_takes_functions_that_cannot_be_inverted(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    model = ResNet(function)
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, [LOSSLESS], example_inputs=x)
    assert len(applied.replaced) == 3
    assert kept_bytes(plain, x) - kept_bytes(model, x) == applied.saved_bytes
    compare(model, plain, x, atol=0, gradient_share=0)


def test_a_function_with_options_of_its_own_is_kept(x: Tensor) -> None:
    report = memsave.apply(ResNet(F.gelu), [LOSSLESS], example_inputs=x)
    assert not report.replaced
    assert report.kept[0].reason.startswith("gelu() in the forward is a function with options")


class Shared(nn.Module):
    """One activation after a norm, again on its own result, and after a sum (as in DynUNet)."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.between = between
        self.act = nn.LeakyReLU(0.1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.between is not None:
            y = self.between(y)
        y = self.act(self.act(y))
        result: Tensor = self.act(self.second(y) - y)  # of both signs
        return result


def test_a_shared_activation_works_where_no_fused_norm_has_applied_it(x: Tensor) -> None:
    model = Shared()
    plain = copy.deepcopy(model)
    assert len(memsave.apply(model, ["inplace_abn"], example_inputs=x).replaced) == 1
    for changed in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert type(changed.act).__name__ == "RestingWhenMarkedLeakyReLU"
        compare(changed, copy.deepcopy(plain), x, atol=IN_PLACE_ATOL, gradient_share=1e-2)


@pytest.mark.parametrize("inputs", ["given", "none"])
def test_a_layer_before_a_shared_activation_might_lose_the_mark_so_the_norm_is_kept(
    inputs: str, x: Tensor
) -> None:
    applied = memsave.apply(
        Shared(nn.Identity()), ["inplace_abn"], example_inputs=x if inputs == "given" else None
    )
    assert [k.reason for k in applied.kept] == [
        "act also serves elsewhere, and a layer stands before it"
    ]


@pytest.mark.parametrize("inputs", ["given", "none"])
def test_dropout_between_norm_and_activation_counts_unless_it_drops_nothing(
    inputs: str, x: Tensor
) -> None:
    for p, replaced in ((0.0, 1), (0.5, 0)):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(p), nn.LeakyReLU(), nn.Conv2d(4, 2, 1)
        )
        plain = copy.deepcopy(model)
        applied = memsave.apply(
            model, ["inplace_abn"], example_inputs=x if inputs == "given" else None
        )
        assert len(applied.replaced) == replaced
        if replaced:
            compare(model, plain, x, atol=IN_PLACE_ATOL, gradient_share=1e-2)
        else:
            assert "its result is read by 2" in applied.kept[0].reason


@pytest.mark.parametrize("technique", ["inplace_abn", LOSSLESS])
def test_a_norm_called_twice_is_replaced_if_all_its_calls_agree(technique: str, x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self, agree: bool) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.again, self.act = nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1)
            self.agree = agree

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.again(self.act(self.norm(self.conv(x)))))
            result: Tensor = self.again(self.act(y) if self.agree else y.tanh())
            return result

    model = Twice(agree=True)
    plain = copy.deepcopy(model)
    assert len(memsave.apply(model, [technique], example_inputs=x).replaced) == 1
    exact = technique == LOSSLESS
    compare(
        model, plain, x, atol=0 if exact else IN_PLACE_ATOL, gradient_share=0 if exact else 1e-2
    )
    applied = memsave.apply(Twice(agree=False), [technique], example_inputs=x)
    assert applied.kept[0].reason.startswith("it is called more than once, with different things")


def test_a_norm_in_front_of_a_convolution_alone_is_replaced_too(x: Tensor) -> None:
    for technique, atol, share in (("inplace_abn", IN_PLACE_ATOL, 1e-2), (LOSSLESS, 0.0, 0.0)):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        plain = copy.deepcopy(model)
        applied = memsave.apply(model, [technique], example_inputs=x)
        assert applied.saved_bytes == 2 * 4 * 8 * 8 * 4
        compare(model, plain, x, atol=atol, gradient_share=share)


@pytest.mark.parametrize("inputs", ["given", "none"])
@pytest.mark.parametrize("technique", ["inplace_abn", LOSSLESS])
def test_where_values_decide_the_way_only_the_parts_that_can_be_traced_change(
    technique: str, inputs: str, x: Tensor
) -> None:
    model = Choosing()
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, [technique], example_inputs=x if inputs == "given" else None)
    assert [change.modules for change in applied.replaced] == [("body.1", "body.2")]
    assert [str(kept) for kept in applied.kept] == [
        "kept loose_norm: it is not called in the forward that was seen"
    ]
    assert str(applied).endswith("traced symbolically by themselves: body")
    exact = technique == LOSSLESS
    for image in (x.abs(), -x.abs()):
        compare(
            model, plain, image,
            atol=0 if exact else IN_PLACE_ATOL, gradient_share=0 if exact else 1e-2,
        )  # fmt: skip


def test_the_forward_may_take_several_arguments_and_keywords(x: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequence(nn.BatchNorm2d(4), nn.LeakyReLU())

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.body(a) if a.shape == b.shape else self.body(a + b)}

    for example in ((x, x), {"a": x, "b": x}):
        applied = memsave.apply(Two(), ["inplace_abn"], example_inputs=example)
        assert "in a run on the example inputs" in str(applied)
        assert len(applied.replaced) == 1


def test_inputs_that_the_forward_cannot_take_are_told_and_symbols_are_followed() -> None:
    model = sequence(nn.BatchNorm2d(4), nn.LeakyReLU())
    applied = memsave.apply(model, ["inplace_abn"], example_inputs=torch.zeros(2, 5, 8, 8))
    assert "could not be followed on the example inputs: RuntimeError: Given" in applied.notes[0]
    assert applied.notes[1] == "traced symbolically by themselves: the whole model"
    assert len(applied.replaced) == 1


def test_a_model_in_evaluation_and_a_frozen_norm_stay_as_they_are(x: Tensor) -> None:
    model = sequence(nn.BatchNorm2d(4), nn.LeakyReLU())
    model[1].eval()
    statistics = model.state_dict()["1.running_mean"].clone()
    for inputs in (x, None):
        changed = copy.deepcopy(model)
        memsave.apply(changed, [LOSSLESS if inputs is None else "inplace_abn"],
                      example_inputs=inputs)  # fmt: skip
        assert (changed.training, changed[1].training, changed[0].training) == (True, False, True)
        changed(x)
        assert torch.equal(changed.state_dict()["1.running_mean"], statistics)


def test_finding_pairs_draws_no_random_numbers_and_counts_no_batch() -> None:
    model = FCN(widths=(4, 8))
    plain = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    memsave.apply(model, [LOSSLESS], example_inputs=torch.empty(1, 1, 8, 8, 8, device="meta"))
    assert torch.equal(torch.get_rng_state(), generator)
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain[key])


def test_a_dry_run_reports_the_same_and_changes_nothing(x: Tensor) -> None:
    model = ResNet(leaky)
    before = repr(model), list(model.state_dict()), dict(model.__dict__)
    techniques: list[Any] = ["inplace_abn", ("checkpoint", {"blocks": ["layers.0"]})]
    dry = memsave.apply(model, techniques, example_inputs=x, dry_run=True)
    assert (repr(model), list(model.state_dict()), dict(model.__dict__)) == before
    assert type(model.layers[0]).__name__ == "ResidualBlock"
    assert "(dry run: nothing was changed)" in str(dry)
    wet = memsave.apply(model, techniques, example_inputs=x)
    assert (dry.replaced, dry.kept) == (wet.replaced, wet.kept)


def test_a_dry_run_tells_the_reasons_where_a_real_one_would_raise(x: Tensor) -> None:
    model = sequence(nn.BatchNorm2d(4), nn.ReLU())
    applied = memsave.apply(model, "inplace_abn", example_inputs=x, dry_run=True)
    assert [k.modules for k in applied.kept] == [("1",)]
    assert applied.kept[0].wrong


def test_the_report_is_one_line_a_norm_and_a_summary(x: Tensor) -> None:
    applied = memsave.apply(ResNet(leaky), ["inplace_abn"], example_inputs=x)
    lines = str(applied).splitlines()
    # bn: 2x8x8x8 floats, kept twice (leaky ReLU not in place); bn1 of each block as bn's
    assert lines[0] == "ResNet: 3 replaced, 3 kept; saves 0.0 MiB of activations"
    assert lines[1] == (
        "replaced bn + leaky_relu() in the forward: BatchNorm2d + LeakyReLU by InPlaceABN "
        "(inplace_abn); saves 0.0 MiB"
    )
    assert lines[4] == (
        "kept layers.0.bn2: its result is read by add in layers.0, not by an activation alone"
    )
    assert lines[7].startswith("pairs were found in a run on the example inputs")
    assert applied.saved_bytes == 2 * 4 * (2 * 8 * 8 * 8 + 2 * 8 * 8 * 8 + 2 * 16 * 4 * 4)


def test_sizes_are_written_in_mebibytes_and_gibibytes() -> None:
    assert (size(2**25), size(2**30 - 1), size(3 * 2**29)) == ("32.0 MiB", "1024.0 MiB", "1.50 GiB")


def test_a_second_call_finds_nothing_left_and_says_so(x: Tensor) -> None:
    model = ResNet(leaky)
    memsave.apply(model, ["inplace_abn", LOSSLESS], example_inputs=x)
    again = memsave.apply(model, [LOSSLESS], example_inputs=x)
    assert not again.replaced
    assert len(again.kept) == 3


def test_two_calls_compose(x: Tensor) -> None:
    model = ResNet(F.relu)
    plain = copy.deepcopy(model)
    memsave.apply(model, [LOSSLESS], example_inputs=x)
    memsave.apply(model, [("checkpoint", {"blocks": ["layers.1"]})], example_inputs=x)
    compare(model, plain, x, atol=0, gradient_share=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_does_not_apply_an_activation_twice(x: Tensor) -> None:
    for make in (lambda: ResNet(leaky), Shared):
        model = make()
        memsave.apply(model, ["inplace_abn"], example_inputs=x)
        eager = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)


def test_a_technique_acts_on_module_step_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def scope(_model: nn.Module, _options: Any) -> Iterator[None]:
        seen.append("enter")
        yield
        seen.append("leave")

    def step(model: nn.Module, options: Any) -> AbstractContextManager[None]:
        return scope(model, options)

    def module(model: nn.Module, _options: Any) -> nn.Module:
        return nn.Sequential(model)

    def optimizer(_: Any, model: nn.Module, _options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)

    all_of_it = Technique(
        name="all", summary="x", exact=True, source="x", module=module, step=step,
        optimizer=optimizer,
    )  # fmt: skip
    monkeypatch.setitem(TECHNIQUES, "all", all_of_it)
    monkeypatch.setitem(
        TECHNIQUES, "built", Technique(name="built", summary="x", exact=True, source="x")
    )
    model = nn.Linear(2, 2)
    applied = memsave.apply(model, ["all"])
    assert applied.model is not model
    assert applied.replaced
    with applied.step():
        seen.append("inside")
    assert seen == ["enter", "inside", "leave"]
    given = torch.optim.Adam(model.parameters())
    assert isinstance(applied.optimizer(given), torch.optim.SGD)
    with pytest.raises(OptionError, match="'built' acts when a network is built"):
        memsave.apply(model, ["built"])


def test_an_error_in_a_later_technique_takes_back_the_earlier_ones(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    def module(_model: nn.Module, _options: Any) -> nn.Module:
        raise OptionError("no")

    def step(_model: nn.Module, _options: Any) -> AbstractContextManager[None]:
        raise OptionError("no step")

    broken = Technique(name="broken", summary="x", exact=True, source="x", module=module)
    stepless = Technique(name="stepless", summary="x", exact=True, source="x", step=step)
    monkeypatch.setitem(TECHNIQUES, "broken", broken)
    monkeypatch.setitem(TECHNIQUES, "stepless", stepless)
    model = ResNet(leaky)
    children = dict(model.named_modules())
    before = repr(model)
    with pytest.raises(OptionError, match="no"):
        memsave.apply(model, [LOSSLESS, "broken"], example_inputs=x)
    assert repr(model) == before
    assert dict(model.named_modules()) == children
    assert not model._forward_hooks
    with pytest.raises(OptionError, match="no step"):
        memsave.apply(model, ["stepless"]).step()


def test_nothing_to_apply_is_fine() -> None:
    applied = memsave.apply(nn.Linear(1, 1), [])
    assert str(applied) == "Linear: 0 replaced, 0 kept"
    with applied.step():
        pass


def test_an_input_cannot_be_made_up_without_a_convolution() -> None:
    assert guessed_inputs(nn.Linear(1, 1)) == []
    assert [tuple(i[0].shape) for i in guessed_inputs(nn.Conv1d(5, 1, 3))] == [
        (2, 5, 64), (2, 5, 128), (2, 5, 32)
    ]  # fmt: skip
