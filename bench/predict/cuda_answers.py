"""What ``torch.cuda`` answers to a user's own network while its step is predicted without a GPU.

Only the user's code is answered so: torch's own, memsave's and Triton's hear the truth, so that
nothing about how they run changes. Tensors and modules may be moved by ``.cuda()``. What would
need kernels or values (streams, events, peaks) is refused in words.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.predict.cards import Card

__all__ = ["answer_as", "answer_users"]

_NOT_USERS = frozenset({"torch", "memsave", "bench", "triton"})
_REFUSED = (
    *("max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats"),
    *("max_memory_cached", "memory_cached", "memory_summary", "memory_snapshot", "mem_get_info"),
    *("current_stream", "default_stream", "stream", "graph", "make_graphed_callables"),
    *("get_rng_state", "set_rng_state", "list_gpu_processes", "utilization", "ipc_collect"),
)
_card: list[Card] = []


def answer_as(card: Card) -> None:
    """Let the questions about the device be answered with ``card`` from here on."""
    _card[:] = [card]


def answer_users() -> None:
    """Let ``torch.cuda`` answer users' code as on a GPU, for the rest of this process."""
    torch.cuda._lazy_init = _nothing  # what .cuda() calls before it asks for a copy
    # The device is the one that there is, in ``with torch.cuda.device(0)`` too.
    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, lambda device: 0)  # noqa: ARG005
    vars(torch.cuda.nvtx)["_nvtx"] = _Marks()
    for name, answer in _ANSWERS.items():
        _put(name, answer)
    for name in _REFUSED:
        _put(name, functools.partial(_refuse, name))


class _Marks:
    """NVTX without a profiler: every mark is level 0."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_args, **_kwargs: 0


def _put(name: str, answer: Callable[..., Any]) -> None:
    theirs = getattr(torch.cuda, name, None)
    if theirs is None:  # not in this torch
        return

    @functools.wraps(theirs)
    def asked(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in _NOT_USERS:
            return theirs(*args, **kwargs)
        return answer(*args, **kwargs)

    setattr(torch.cuda, name, asked)


def _refuse(name: str, *_args: Any, **_kwargs: Any) -> Any:
    raise MembenchError(
        f"{_users_line()}torch.cuda.{name} is not known while a step is predicted: leave it out of "
        "the network, its loss and its optimizer"
    )


def _users_line() -> str:
    from bench.predict.source_lines import user_line

    line = user_line()
    return f"{line}: " if line else ""


def _allocated(_device: Any = None) -> int:
    """Return the bytes of the tensors that live at this moment of the trace, in blocks of 512."""
    from bench.predict.tracer import Tracer

    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tracer):
            return mode.allocated_bytes()
    return 0


def _capability(_device: Any = None) -> tuple[int, int]:
    major, minor = _card[0].compute_capability if _card else (8, 0)
    return major, minor


def _properties(_device: Any = None) -> SimpleNamespace:
    major, minor = _capability()
    return SimpleNamespace(
        name=_name(), major=major, minor=minor, total_memory=_card[0].memory_bytes if _card else 0
    )


def _name(_device: Any = None) -> str:
    return _card[0].model if _card else "a GPU"


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _yes(*_args: Any, **_kwargs: Any) -> bool:
    return True


_ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": _yes,
    "is_initialized": _yes,
    "init": _nothing,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "reset_peak_memory_stats": _nothing,
    "reset_max_memory_allocated": _nothing,
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "memory_allocated": _allocated,
    "get_device_name": _name,
    "get_device_capability": _capability,
    "get_device_properties": _properties,
}
