"""``python -m tests.stand_in.census_record SIDE OUT [--only TEXT]``: what each program allocates.

SIDE is ``torch``, on the stand-in GPU, or ``predicted``, on fake tensors. OUT gets a line of JSON
for each program of ``tests.stand_in.operator_networks``: its name, and its allocations and releases
in their order, or why it has none. Programs that OUT has already are left out. Allocations are
positive, releases negative, in bytes rounded up to blocks of 512; where each was asked for stands
beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.errors import MembenchError

__all__ = ["main", "read_lines"]

_BLOCK = 512
_REFUSALS = (AssertionError, MembenchError, RuntimeError, TypeError, ValueError)


def main() -> int:
    """Record one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("torch", "predicted"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="", help="programs with this text in their name")
    parser.add_argument("--frames", action="store_true", help="where torch's own code allocated")
    chosen = parser.parse_args()
    if chosen.side == "predicted":
        from bench.predict.shim import build_shim, load_shim

        load_shim(build_shim())
    import torch

    from tests.stand_in.operator_networks import programs

    if chosen.side == "predicted":
        from bench.predict.cuda_kernels import register_cuda_kernels

        register_cuda_kernels()
        torch.cuda.is_bf16_supported = lambda including_emulation=True: True  # noqa: ARG005
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    record = _predicted if chosen.side == "predicted" else _measured(chosen.frames)
    done = set(read_lines(chosen.output))
    with chosen.output.open("a") as lines:
        for name, program in programs().items():
            if chosen.only in name and name not in done:
                # Stays the last word on a program that ends the process.
                lines.write(json.dumps([name, "the process died"]) + "\n")
                lines.flush()
                lines.write(json.dumps([name, _tried(record, program)]) + "\n")
    return 0


def read_lines(path: Path) -> dict[str, Any]:
    """Return what was recorded by program, the last word on each."""
    text = path.read_text() if path.exists() else ""
    return dict(json.loads(line) for line in text.splitlines())


def _tried(record: Callable[[Any], list[Any]], program: Any) -> Any:
    try:
        return record(program)
    except _REFUSALS as error:
        said = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {said}"


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _measured(frames: bool) -> Callable[[Any], list[Any]]:
    import gc

    import torch

    history: Any = torch.cuda.memory._record_memory_history
    clear: Any = torch._C._cuda_clearCublasWorkspaces

    def record(program: Any) -> list[Any]:
        clear()
        gc.collect()
        torch.cuda.empty_cache()
        gc.disable()
        history(
            **({"stacks": "all", "context": "all"} if frames else {"context": None}),
            clear_history=True,
        )
        try:
            with torch.device("cuda:0"):
                step = program()
            for _ in range(2):
                step()
            del step
            # Stops the recording as well; what dies later is no part of the program.
            snapshot: Any = torch.cuda.memory._snapshot()
        finally:
            history(None)
            gc.enable()
        events = []
        for event in snapshot["device_traces"][0]:
            if event["action"] in ("alloc", "free_requested"):
                sign = 1 if event["action"] == "alloc" else -1
                where = _where(event.get("frames", ()))
                events.append([sign * _blocks(event["size"]), where])
        return events

    return record


def _where(frames: Any) -> str:
    names = [f["name"].partition("(")[0].partition("<")[0].split(" ")[-1] for f in frames]
    kept = [n for n in names if "at::" in n or "torch::autograd" in n]
    skipped = ("empty", "wrapper_", "Boxed", "_ops::", "detail", "Dispatch", "Caching")
    return " < ".join([n for n in kept if not any(s in n for s in skipped)][:4])


def _predicted(program: Any) -> list[Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.predict.cards import find_card
    from bench.predict.tracer import Tracer
    from bench.predict.workspaces import fill_workspaces
    from tests.stand_in.pose import DEFAULT_CARD, stand_in_card

    card = stand_in_card(find_card(DEFAULT_CARD), memory_bytes=140 << 30, context_bytes=0)
    with FakeTensorMode():
        tracer = Tracer("cuda")
        with tracer.attributing(), tracer:
            with torch.device("cuda:0"):
                step = program()
            for _ in range(2):
                step()
            del step
            tracer.stop()
    sizes: dict[int, int] = {}
    events: list[Any] = []
    trace = fill_workspaces(tracer.trace, card)
    for event in trace.events:
        if event[0] == "alloc" and event[2]:
            sizes[event[1]] = _blocks(event[2])
            events.append([sizes[event[1]], trace.sites[event[1]].operator])
        elif event[0] == "free" and event[1] in sizes:
            events.append([-sizes[event[1]], trace.sites[event[1]].operator])
    return events


if __name__ == "__main__":
    sys.exit(main())
