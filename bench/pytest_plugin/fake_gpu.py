"""What ``torch.cuda`` says in a child process that has no GPU: the card's name, its memory, peaks.

The library loaded before torch makes operators run on fake ``cuda:0`` tensors; this is for the
questions that a test's own code asks. The counters are those of the simulated allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from bench.predict.cards import Card
from bench.pytest_plugin.ledger import PredictedMeter

__all__ = ["answer_for"]


def answer_for(card: Card, meter: PredictedMeter) -> None:
    """Let ``torch.cuda`` answer as on ``card``, for the rest of this process."""
    for name, answer in _answers(card, meter).items():
        setattr(torch.cuda, name, answer)
    # Other functions of torch.cuda.memory ask these by their name in that module.
    torch.cuda.memory.memory_stats = torch.cuda.memory_stats
    torch.cuda.memory.empty_cache = torch.cuda.empty_cache


def _answers(card: Card, meter: PredictedMeter) -> dict[str, Callable[..., Any]]:
    major, minor = card.compute_capability
    properties = SimpleNamespace(
        name=card.model, total_memory=card.memory_bytes, major=major, minor=minor
    )

    def mem_get_info(_device: Any = None) -> tuple[int, int]:
        used = meter.memory_stats()["reserved_bytes.all.current"] + card.context_bytes
        return card.memory_bytes - used, card.memory_bytes

    def counter(name: str) -> Callable[..., int]:
        return lambda device=None: meter.memory_stats()[name]  # noqa: ARG005

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing(),
        "_lazy_init": _nothing(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "get_device_name": lambda device=None: card.model,  # noqa: ARG005
        "get_device_capability": lambda device=None: (major, minor),  # noqa: ARG005
        "get_device_properties": lambda device=None: properties,  # noqa: ARG005
        "mem_get_info": mem_get_info,
        "memory_stats": lambda device=None: meter.memory_stats(),  # noqa: ARG005
        "memory_allocated": counter("allocated_bytes.all.current"),
        "max_memory_allocated": counter("allocated_bytes.all.peak"),
        "memory_reserved": counter("reserved_bytes.all.current"),
        "max_memory_reserved": counter("reserved_bytes.all.peak"),
        "empty_cache": meter.empty_cache,
        "reset_peak_memory_stats": lambda device=None: meter.reset_peaks(),  # noqa: ARG005
        "manual_seed": _nothing(),
        "manual_seed_all": _nothing(),
    }


def _nothing() -> Callable[..., None]:
    """Return a function of its own: torch's compiler has a rule for each, and refuses one twice."""
    return lambda *_args, **_kwargs: None
