"""The in-place norms' operators are called directly where nobody watches, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memsave import InPlaceABN, InPlaceGroupNorm, checkpoint_block
from memsave.in_place_direct import call


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Passes(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _way(*tensors: Tensor | None) -> str:
    """Return which of the two is called for tensors."""

    def operator(*_: object) -> str:
        return "operator"

    def function(*_: object) -> str:
        return "function"

    return call(operator, function, tensors, (), ())


def test_plain_tensors_and_parameters_take_the_direct_way() -> None:
    assert _way(torch.ones(3), nn.Parameter(torch.ones(3)), None) == "function"


def test_what_is_given_reaches_either_way_and_comes_back() -> None:
    x, seen = torch.ones(3), []

    def remember(*arguments: object) -> int:
        seen.append(arguments)
        return len(arguments)

    assert call(remember, remember, (x, None), (2, "elu"), (x,)) == 4
    with _Names():
        assert call(remember, remember, (x, None), (2, "elu"), (x,)) == 4
    assert seen == [(x, None, 2, "elu")] * 2


def test_versions_of_what_is_written_are_counted_up_and_no_others() -> None:
    x, weight, mean = torch.ones(3), torch.ones(3), torch.ones(3)
    call(print, lambda *_: None, (x, weight, mean), (), (x, None, mean))
    assert (x._version, weight._version, mean._version) == (1, 0, 1)


WATCHERS: dict[str, Callable[[], Any]] = {
    "dispatch mode": _Names,
    "fake tensors": FakeTensorMode,
    "function mode": _Passes,
    "default device": lambda: torch.device("cpu"),
    "profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("name", WATCHERS)
def test_who_watches_operators_sees_the_operator(name: str) -> None:
    x = torch.ones(3)
    with WATCHERS[name]():
        assert _way(x) == "operator"
    assert _way(x) == "function"


def test_a_transform_sees_the_operator() -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(_way(torch.ones(3)))
        return x.sum()

    torch.func.grad(watched)(torch.ones(3))
    assert seen == ["operator"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_jit_trace_sees_the_operator() -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(_way(x))
        return x + 1

    torch.jit.trace(watched, torch.ones(3), check_trace=False)  # type: ignore[no-untyped-call]
    assert seen == ["operator"]


ODD: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.ones(3, device="meta"),
    "negative view": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "zeros without memory": lambda: torch._efficientzerotensor(3),
    "subclass": lambda: torch.ones(3).as_subclass(_Subclass),
}


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("name", ODD)
def test_a_tensor_that_the_dispatcher_must_see_takes_the_operator(name: str) -> None:
    assert _way(torch.ones(3), ODD[name]()) == "operator"


NORMS = [InPlaceABN(4), InPlaceGroupNorm(2, 4)]


def _step(norm: nn.Module, x: Tensor) -> list[Tensor]:
    norm.zero_grad()
    leaf = x.clone().requires_grad_()
    z = norm(leaf * 1)
    values = z.detach().clone()
    torch.autograd.backward(z, torch.ones_like(z) * values)
    return [values, *(t.grad.clone() for t in (leaf, *norm.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("norm", NORMS, ids=["abn", "group"])
def test_both_ways_give_the_same_to_the_bit(norm: nn.Module) -> None:
    """Results, gradients, and the names of the two operators where somebody looks."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    directly = _step(norm, x)
    with _Names() as seen:
        watched = _step(norm, x)
    assert [n for n in seen.names if n.startswith("memsave")] == [
        "memsave.in_place_norm.default",
        "memsave.in_place_norm_backward.default",
    ]
    assert len(directly) == 4
    for ours, theirs in zip(directly, watched, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("norm", NORMS, ids=["abn", "group"])
def test_versions_say_the_same_either_way(norm: nn.Module) -> None:
    """Autograd's own refusals rest on them: of x and z, forward and backward."""

    def versions() -> tuple[bool, bool]:
        x = torch.randn(2, 4, 5, requires_grad=True) * 1
        before, z = x._version, norm(x)
        after = z._version
        torch.autograd.backward(z.sum())
        return after > before, z._version > after

    assert versions() == (True, True)
    with _Names():
        assert versions() == (True, True)


def test_running_statistics_count_their_versions() -> None:
    abn = InPlaceABN(4)
    assert abn.running_mean is not None
    abn(torch.randn(2, 4, 5))
    assert abn.running_mean._version > 0


def test_inference_tensors_are_taken() -> None:
    """They have no versions."""
    torch.manual_seed(0)
    x, abn = torch.randn(2, 4, 5), InPlaceABN(4).eval()
    expected = abn(x.clone())
    with torch.inference_mode():
        assert torch.equal(abn(x.clone()), expected)


def test_a_checkpointed_block_computes_the_same() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv1d(3, 4, 1), InPlaceABN(4), nn.Conv1d(4, 2, 1))
    x, results = torch.randn(2, 3, 5), []
    for _ in range(2):
        block.zero_grad()
        torch.autograd.backward(block(x).square().sum())
        results.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
        checkpoint_block(block)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
