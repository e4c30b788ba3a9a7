"""What was compiled for a launch is found again for the like of it, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from memsave.kernels import launch
from memsave.kernels.launch import Kernel

STREAM = 7


@dataclass
class _Made:
    """Stands for what Triton compiled: it notes how it is launched."""

    number: int
    launched: list[tuple[str, tuple[Any, ...]]]
    function: int = 11
    packed_metadata: int = 12

    def run(self, *arguments: Any) -> None:
        self.launched.append((f"{self.number} past hooks", arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def runner(*arguments: Any, stream: int) -> None:
            self.launched.append((f"{self.number} with hooks", (*grid, stream, *arguments)))

        return runner


@dataclass
class _Triton:
    """Stands for a kernel that Triton compiles: it notes what it searches for."""

    searches: list[tuple[Any, ...]] = field(default_factory=list)
    launched: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Made]:
        def search(*arguments: Any, **options: int) -> _Made:
            self.searches.append((*grid, arguments, options))
            return _Made(len(self.searches), self.launched)

        return search


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> _Triton:
    fake = _Triton()
    monkeypatch.setattr(launch, "jit", lambda _: fake)
    monkeypatch.setattr(launch, "CompiledKernel", _Made)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
    return fake


def _kernel() -> Kernel:
    return Kernel(lambda: None)


def test_a_second_launch_gives_addresses_and_the_numbers_of_its_own(triton: _Triton) -> None:
    kernel, x, y = _kernel(), torch.ones(4), torch.ones(4)
    kernel.launch(3, 8, (x, None), (0.5,), (4, "elu"))
    kernel.launch(3, 8, (y, None), (0.25,), (4, "elu"))
    assert len(triton.searches) == 1
    programs, (first, *rest), options = triton.searches[0]
    assert (programs, first is x, rest, options) == (
        3,
        True,
        [None, 0.5, 4, "elu"],
        {"num_warps": 8},
    )
    expected = (3, 1, 1, STREAM, 11, 12, None, None, None, y.data_ptr(), None, 0.25, 4, "elu")
    assert triton.launched == [("1 past hooks", expected)]


class _Elsewhere(torch.Tensor):
    """On another device, by its word."""

    def get_device(self) -> int:
        return 1


X = torch.ones(8)
OTHERS: dict[str, tuple[int, int, tuple[Any, ...], tuple[float, ...], tuple[Any, ...]]] = {
    "programs": (2, 8, (X, X), (0.5,), (4,)),
    "warps": (3, 4, (X, X), (0.5,), (4,)),
    "type": (3, 8, (X, X.half()), (0.5,), (4,)),
    "no tensor": (3, 8, (X, None), (0.5,), (4,)),
    "size": (3, 8, (X, X), (0.5,), (5,)),
    "address": (3, 8, (X, X[1:]), (0.5,), (4,)),
    "device": (3, 8, (X, X.as_subclass(_Elsewhere)), (0.5,), (4,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_specialised_on_is_searched_for_anew(triton: _Triton, name: str) -> None:
    kernel = _kernel()
    kernel.launch(3, 8, (X, X), (0.5,), (4,))
    kernel.launch(*OTHERS[name])
    assert len(triton.searches) == 2
    assert triton.launched == []
    kernel.launch(3, 8, (X, X), (0.5,), (4,))
    assert [how for how, _ in triton.launched] == ["1 past hooks"]


def test_addresses_that_are_not_aligned_are_never_remembered(triton: _Triton) -> None:
    """Triton's own search knows which of them are."""
    kernel = _kernel()
    for _ in range(3):
        kernel.launch(3, 8, (X, X[1:]), (), ())
    assert len(triton.searches) == 3


def test_an_integer_among_the_numbers_is_given_as_floating_point(triton: _Triton) -> None:
    """Else 1 would be compiled in, and serve for 0.01."""
    _kernel().launch(3, 8, (X,), (1,), ())
    (_, arguments, _), *_ = triton.searches
    assert type(arguments[1]) is float


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_on_launches_are_served_by_tritons_own_launcher(
    triton: _Triton, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _kernel()
    kernel.launch(3, 8, (X,), (), ())
    monkeypatch.setattr(knobs.runtime, hook, print)
    kernel.launch(3, 8, (X,), (), ())
    assert triton.launched == [("1 with hooks", (3, 1, 1, STREAM, X.data_ptr()))]


def test_another_triton_is_asked_to_launch_itself(
    triton: _Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_KNOWS_LAUNCHER", False)
    kernel = _kernel()
    for _ in range(2):
        kernel.launch(3, 8, (X,), (), ())
    assert [how for how, _ in triton.launched] == ["1 with hooks"]


def test_shapes_that_change_forever_do_not_fill_the_memory(
    triton: _Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MOST_REMEMBERED", 10)
    kernel = _kernel()
    for size in range(25):
        kernel.launch(3, 8, (X,), (), (size,))
    assert len(kernel._ready) <= 10
    kernel.launch(3, 8, (X,), (), (24,))
    assert [how for how, _ in triton.launched] == ["25 past hooks"]


class _Target:
    def __init__(self, backend: str, arch: int) -> None:
        self.backend, self.arch = backend, arch

    def get_current_target(self) -> _Target:
        return self


@pytest.mark.parametrize(
    ("backend", "arch", "capped"),
    [("cuda", 90, False), ("cuda", 100, True), ("cuda", 103, True), ("cuda", 120, False),
     ("hip", 100, False)],
)  # fmt: skip
def test_registers_are_capped_on_data_centre_blackwell_alone(
    triton: _Triton, backend: str, arch: int, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Driver:
        active = _Target(backend, arch)

    monkeypatch.setattr(launch, "JITFunction", _Triton)
    monkeypatch.setattr(launch, "driver", _Driver)
    _kernel().launch(3, 8, (X,), (), (), registers=80)
    *_, options = triton.searches[0]
    assert options == {"num_warps": 8, **({"maxnreg": 80} if capped else {})}


@pytest.mark.usefixtures("triton")
def test_an_interpreted_kernel_leaves_nothing_behind() -> None:
    class _Interpreted:
        def __getitem__(self, _: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: None

    kernel = _kernel()
    kernel.compiled = _Interpreted()
    kernel.launch(3, 8, (X,), (), (), registers=80)
    assert kernel._ready == {}
