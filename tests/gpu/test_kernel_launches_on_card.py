"""A norm's second step launches what the first one did, past Triton's search for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memsave import InPlaceABN, InPlaceGroupNorm

pytest.importorskip("triton")

from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import LazyDict
from triton.knobs import HookChain
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.gpu

Launches = list[tuple[Any, ...]]


def _address(argument: Any) -> Any:
    """Return an address for a tensor; hooks, and what they would be told, are left out."""
    if isinstance(argument, (LazyDict, HookChain)):
        return None
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What reaches Triton's launcher: grid, stream, kernel, and arguments with plain addresses."""
    seen: Launches = []
    launch: Callable[..., None] = CudaLauncher.__call__

    def spy(self: Any, *arguments: Any) -> None:
        seen.append(tuple(_address(a) for a in arguments))
        launch(self, *arguments)

    monkeypatch.setattr(CudaLauncher, "__call__", spy)
    return seen


def _searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run: Callable[..., Any] = JITFunction.run

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", spy)
    return names


@pytest.mark.parametrize(
    "norm",
    [
        InPlaceABN(6),
        InPlaceABN(6, affine=False, track_running_stats=False, activation="elu"),
        InPlaceGroupNorm(2, 6, activation_param=1),  # an integer
    ],
    ids=["abn", "abn without numbers", "group"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_later_step_launches_what_the_first_did_without_a_search(
    norm: Any, dtype: torch.dtype, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but a momentum that changes is the same, the buffers' addresses too."""
    norm = norm.cuda()
    x = torch.randn(2, 6, 5, 7, 9, device="cuda", dtype=dtype, requires_grad=True)
    dz = torch.randn(2, 6, 5, 7, 9, device="cuda", dtype=dtype)
    rounds: list[Launches] = []
    searches = _searches(monkeypatch)
    for step in range(3):
        norm.momentum = 1 / (1 + step)
        launches.clear()
        searches.clear()
        torch.autograd.backward(norm(x * 1), dz)
        rounds.append(list(launches))
        norm.zero_grad(set_to_none=True)
        x.grad = None
    assert searches == []
    assert len(rounds[2]) == 6
    for first, third in zip(rounds[0], rounds[2], strict=True):
        different = [(a, b) for a, b in zip(first, third, strict=True) if a != b]
        assert different in ([], [(1.0, 1 / 3)])


def test_a_hook_on_launches_is_told_of_every_one() -> None:
    """Triton's profiler asks so."""
    norm, told = InPlaceABN(6).cuda(), []
    x = torch.randn(2, 6, 5, device="cuda")
    norm(x.clone())
    knobs.runtime.launch_enter_hook.add(hook := lambda launch: told.append(launch.get()["name"]))
    try:
        norm(x.clone())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert told == ["_partial_statistics", "_combine_statistics", "_normalise"]
