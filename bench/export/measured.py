"""A measured run as PyTorch's own snapshot: its memory history recorded on the GPU that is here.

The history's frames are Python's own; the module whose forward ran is put between them, where torch
keeps what is said of an allocation (2.10 and later).
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.child import Child
from bench.errors import MembenchError

__all__ = ["measure_snapshot", "recording_history", "with_module_frames"]

_MAX_ENTRIES = 1_000_000


def measure_snapshot(case: Case, path: Path, card_name: str | None = None) -> tuple[str, int]:
    """Run a case's memory pass on the GPU, write its snapshot, return the GPU and the entries.

    ``card_name``: the card that the allocator is capped to.

    Errors: MembenchError where the case fails, or ends without a snapshot.
    """
    from bench.backends import measured_backend
    from bench.predict.cards import find_card

    backend = measured_backend(None if card_name is None else find_card(card_name))
    child = Child(backend.module, backend.child_environment)
    try:
        definition = dataclasses.replace(case, timed_steps=0).to_definition()
        request = {"case": definition, "snapshot": str(path.resolve()), **backend.request}
        reply = child.ask(request, case.time_limit_s)
        child.finish()
    finally:
        child.close()
    if reply["status"] not in ("ok", "oom"):
        raise MembenchError(f"{case.name} cannot be traced: {reply['reason']}")
    return backend.card, int(reply["snapshot_entries"])


@contextmanager
def recording_history(path: Path) -> Iterator[dict[str, int]]:
    """Record the GPU's memory history, and write it to ``path`` at the end.

    Yields a dict that has ``"snapshot_entries"`` afterwards.
    """
    import torch

    memory: Any = torch.cuda.memory  # its recording has no types
    found: dict[str, int] = {}
    memory._record_memory_history(max_entries=_MAX_ENTRIES)
    try:
        with _naming_modules(getattr(memory, "_set_memory_metadata", None)):
            yield found
        data = with_module_frames(memory._snapshot())
    finally:
        memory._record_memory_history(enabled=None)
    path.write_bytes(pickle.dumps(data, protocol=4))
    found["snapshot_entries"] = sum(len(trace) for trace in data["device_traces"])


@contextmanager
def _naming_modules(say: Any) -> Iterator[None]:
    """Let each allocation carry the name of the module that runs, where torch has a way to."""
    if say is None:
        yield
        return
    from torch import nn
    from torch.nn.modules.module import (
        register_module_forward_hook,
        register_module_forward_pre_hook,
    )

    names: dict[int, str] = {}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if not stack:  # the outermost is the model, or a loss
            names.update({id(part): name for name, part in module.named_modules()})
        stack.append(names.get(id(module), "") or type(module).__name__)
        say(stack[-1])

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        if stack:
            stack.pop()
        say(stack[-1] if stack else "")

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        say("")


def with_module_frames(data: dict[str, Any]) -> dict[str, Any]:
    """Return a snapshot with a frame for the module of each allocation that carries its name."""
    for trace in data["device_traces"]:
        for entry in trace:
            module = entry.get("user_metadata")
            if module and entry["action"] in ("alloc", "oom"):
                frame = {"filename": "module", "line": 0, "name": module}
                entry["frames"] = [*entry.get("frames", ()), frame]
    return data
