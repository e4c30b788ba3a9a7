"""The in-place norms among what else a script has: hooks, checkpoints, threads, devices."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from memsave import FCN, InPlaceABN, InPlaceABNSync, InPlaceGroupNorm
from memsave.errors import InputError
from memsave.in_place_abn import in_place_abn
from memsave.in_place_backward_maths import backward_
from memsave.in_place_group_maths import backward_groups_
from memsave.in_place_group_norm import in_place_group_norm

N, C, S = 2, 4, 6
NORMS: dict[str, Callable[[], nn.Module]] = {
    "abn": lambda: InPlaceABN(C),
    "group": lambda: InPlaceGroupNorm(2, C),
}


def _network(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, C, 1), NORMS[norm](), nn.Conv1d(C, 2, 1))


def _image() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(N, 3, S, requires_grad=True)


def _gradients(model: nn.Module, image: Tensor) -> list[Tensor]:
    return [t.grad for t in (image, *model.parameters()) if t.grad is not None]


def _step(
    model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)
) -> list[Tensor]:
    """Return all gradients of a step, and the buffers after it."""
    model.zero_grad()
    image = _image()
    torch.autograd.backward(run(model, image).float().square().sum())
    return [*(g.clone() for g in _gradients(model, image)), *(b.clone() for b in model.buffers())]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) >= 7
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


ELSEWHERE = {
    "weight of abn": ("in-place ABN", "weight"),
    "bias of abn": ("in-place ABN", "bias"),
    "running_mean of abn": ("in-place ABN", "running_mean"),
    "running_var of abn": ("in-place ABN", "running_var"),
    "weight of group": ("in-place group norm", "weight"),
    "bias of group": ("in-place group norm", "bias"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_numbers_on_another_device_are_refused_before_the_input_is_touched(
    name: str, training: bool
) -> None:
    """A kernel would take the address for one of its own device's."""
    norm, wrong = ELSEWHERE[name]
    given: dict[str, Any] = {"weight": torch.ones(C), "bias": torch.zeros(C)}
    if "abn" in name:
        given |= {"running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    given[wrong] = given[wrong].to("meta")
    x = torch.randn(N, C, S)
    before = x.clone()
    if "abn" in name:
        run = functools.partial(in_place_abn, training=training)
    else:
        run = functools.partial(in_place_group_norm, num_groups=2)
    with pytest.raises(InputError, match=rf"{norm} has its {wrong} on meta, got an input on cpu"):
        run(x, **given)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layer", [InPlaceABN, InPlaceABNSync])
def test_a_layer_that_was_not_moved_is_refused(layer: type[InPlaceABN]) -> None:
    with pytest.raises(InputError, match="move one of them to the other's device"):
        layer(C)(torch.empty(N, C, S, device="meta"))


TWINS = {
    "inplace_abn": "batch_norm_leaky_relu",
    "inplace_group_norm": "group_norm_leaky_relu",
    "inplace_instance_norm": "instance_norm_leaky_relu",
}


@pytest.mark.parametrize("norm", TWINS)
def test_a_plain_networks_weights_load_and_give_its_outputs(norm: str) -> None:
    """Its norms and leaky ReLUs are pairs, ours one layer each; eps more of scale is all between.

    Each of 6 norms has 1 + eps for 1, 1e-5 more, which the next but one divides out again. A
    negative scale acts as its absolute value: the outputs are those of a positive one.
    """
    torch.manual_seed(0)
    plain = FCN(widths=(4, 8), norm=TWINS[norm]).double()
    ours = FCN(widths=(4, 8), norm=norm).double()
    image = torch.randn(1, 1, 8, 8, 8).double()
    plain(image)  # statistics of their own
    given = plain.state_dict()
    names = list(given)
    assert ours.load_state_dict(given) == ([], [])
    assert list(given) == names
    for model in (plain, ours):
        model.eval()
    with torch.no_grad():
        expected = plain(image)
        error = (ours(image) - expected).abs().max()
        assert error <= 6e-5 * expected.abs().max()
        for name, weight in ours.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.neg_()
        assert (ours(image) - expected).abs().max() == error


def test_what_is_not_such_a_pair_does_not_load() -> None:
    """Activation, then norm, is another function."""
    other = nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(C)))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.1\.weight"'):
        nn.Sequential(InPlaceABN(C)).load_state_dict(other.state_dict())
    both = {**InPlaceABN(C).state_dict(), "0.weight": torch.zeros(C)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.weight"'):
        InPlaceABN(C).load_state_dict(both)


@pytest.mark.parametrize("norm", NORMS)
def test_hooks_on_what_is_kept_get_z_and_may_give_back_another(norm: str) -> None:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t.clone()

    def hooked(model: nn.Module, x: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, lambda t: t):
            result: Tensor = model(x)
        return result

    model = _network(norm)
    expected = _step(copy.deepcopy(model))
    _assert_same(_step(copy.deepcopy(model), hooked), expected)
    assert [tuple(t.shape) for t in kept].count((N, C, S)) == 2  # z, of the norm and its reader
    assert len({t.data_ptr() for t in kept if t.shape == (N, C, S)}) == 1

    def on_cpu(model: nn.Module, x: Tensor) -> Tensor:
        with save_on_cpu():
            result: Tensor = model(x)
        return result

    _assert_same(_step(copy.deepcopy(model), on_cpu), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_hooks_on_the_layer_and_its_result_are_called(norm: str) -> None:
    model, seen = _network(norm), list[str]()

    def of_gradient(gradient: Tensor) -> Tensor:
        seen.append("gradient")
        return gradient * 0

    model[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[1].register_forward_hook(lambda *_: seen.append("after"))

    def run(model: nn.Module, x: Tensor) -> Tensor:
        conv, layer, last = model.children()
        z = layer(conv(x))
        z.register_hook(of_gradient)
        result: Tensor = last(z)
        return result

    gradients = _step(model, run)
    assert seen == ["before", "after", "gradient"]
    assert not gradients[0].any()  # of the image: what the hook made of it went on
    assert gradients[-1 if norm == "group" else -4].any()  # of the last layer's bias


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_around_the_layer_changes_no_gradient(norm: str, reentrant: bool) -> None:
    """But running statistics, which are updated once more in the second forward."""
    model = _network(norm)
    model[1].register_buffer("running_mean", None)
    model[1].register_buffer("running_var", None)

    def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return result

    expected, actual = _step(copy.deepcopy(model)), _step(model, checkpointed)
    _assert_same(actual[:7], expected[:7])


@pytest.mark.parametrize("kept", ["nothing", "convolution"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_that_chooses_by_operator_is_asked_about_ours(norm: str, kept: str) -> None:
    """A convolution's result that it keeps, and the norm overwrites, is an error of torch's own."""
    asked: list[str] = []

    def policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        asked.append(operator.name())
        save = kept in asked[-1]
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(model: nn.Module, x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        result: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        return result

    model = _network(norm)
    if kept == "convolution":
        with pytest.raises(RuntimeError, match="selective activation checkpoint has been mutated"):
            _step(model, selective)
        return
    expected = _step(copy.deepcopy(model))[:7]
    _assert_same(_step(model, selective)[:7], expected)
    assert asked.count("memsave::in_place_norm") == 1


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_around_backward_too_changes_nothing(norm: str) -> None:
    """The plain maths runs inside of it, in the types of its operands."""

    def run(model: nn.Module, whole: bool) -> list[Tensor]:
        image = _image()
        with torch.autocast("cpu", torch.bfloat16):
            z = model[:2](image)  # type: ignore[index]
            if whole:
                torch.autograd.backward(z, torch.ones_like(z))
        if not whole:
            torch.autograd.backward(z, torch.ones_like(z))
        assert z.dtype == torch.bfloat16
        return [*_gradients(model, image), *model.buffers()]

    model = _network(norm)
    ours, theirs = (run(copy.deepcopy(model), whole) for whole in (True, False))
    assert len(ours) >= 5
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_that_train_side_by_side_do_not_disturb_each_other(norm: str) -> None:
    """As replicas of a model on several devices do."""
    model = _network(norm)
    expected, results = _step(copy.deepcopy(model)), [[] for _ in range(4)]  # type: ignore[var-annotated]

    def train(n: int) -> None:
        for _ in range(5):
            results[n] = _step(copy.deepcopy(model))

    threads = [threading.Thread(target=train, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        _assert_same(result, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_a_copy_and_a_pickle_of_a_trained_layer_train_on_alike(norm: str) -> None:
    model = _network(norm)
    _step(model)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = _step(model)
    for other in others:
        _assert_same(_step(other), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_and_maps_are_refused_by_torch() -> None:
    x = torch.randn(N, C, S)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="implement the jvp function"),
    ):
        in_place_abn(forward_ad.make_dual(x, x) * 1)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.vmap(InPlaceABN(C).eval())(torch.randn(3, N, C, S))


class _Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The weights that the plain maths' operator of sums is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights: list[Tensor | None] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.weights.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [None, 2])
def test_the_plain_maths_asks_only_for_sums_that_cuda_gives_too(groups: int | None) -> None:
    """CUDA's kernel makes the weight's gradient like the weight, so there must be one.

    It runs the plain maths for float64, and for places at uneven distances.
    """
    z, dz, numbers = torch.randn(N, C, S), torch.randn(N, C, S), torch.ones(C)
    with _Sums() as sums:
        if groups is None:
            backward_(z, dz, numbers, numbers, numbers, True, "leaky_relu", 0.01)
        else:
            rstd = torch.ones(N * groups)
            backward_groups_(z, dz, groups, numbers, numbers, rstd, "leaky_relu", 0.01)
    assert sums.weights
    assert all(w is not None for w in sums.weights)
