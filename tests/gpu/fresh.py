"""Functions that run on the GPU in a process of their own, whose caching allocator is untouched.

``in_fresh_process(run_events, ...)`` starts ``python -m tests.gpu.fresh run_events`` with the
arguments as JSON on its stdin; the result is JSON on its stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["COUNTERS", "FUNCTIONS", "in_fresh_process", "run_events", "train_recorded"]

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = ("requested_bytes", "allocated_bytes", "active_bytes", "reserved_bytes")


def in_fresh_process(
    function: Callable[..., Any], environment: dict[str, str] | None = None, **arguments: Any
) -> Any:
    """Return ``function(**arguments)``, computed in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.fresh", function.__name__],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_events(events: list[list[Any]], limit_bytes: int | None) -> dict[str, Any]:
    """Allocate and free as ``events`` say; return what the allocator did at each.

    ``rows``: after each event, the address of what it allocated (None: nothing, or out of memory)
    and the four counters. ``segments``: the addresses of new segments in order.
    """
    import torch

    from bench.measure import memory_fraction

    total_bytes = torch.cuda.mem_get_info(0)[1]
    if limit_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction(limit_bytes, total_bytes), 0)
    torch.cuda.memory._record_memory_history(context=None, max_entries=10**6)
    stream_type: Any = torch.cuda.Stream  # without types in torch 2.13
    streams = {0: torch.cuda.default_stream(0), 1: stream_type(0)}
    live: dict[int, torch.Tensor] = {}
    rows: list[list[int | None]] = []
    for event in events:
        address = None
        if event[0] == "alloc":
            _, name, size, stream = event
            try:
                with torch.cuda.stream(streams[stream]):
                    live[name] = torch.empty(size, dtype=torch.uint8, device="cuda:0")
                address = live[name].data_ptr()
            except torch.OutOfMemoryError:
                pass
        elif event[0] == "free":
            live.pop(event[1], None)
        else:
            torch.cuda.empty_cache()
        stats = torch.cuda.memory_stats(0)
        rows.append([address, *(stats[f"{name}.all.current"] for name in COUNTERS)])
    stats = torch.cuda.memory_stats(0)
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    return {
        "total_bytes": total_bytes,
        "rows": rows,
        "segments": [e["addr"] for e in history if e["action"] == "segment_alloc"],
        "peaks": [stats[f"{name}.all.peak"] for name in COUNTERS],
        "retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }


def train_recorded(case: dict[str, Any], path: str) -> int:
    """Run a case's steps with PyTorch recording; write its snapshot, return the reserved peak."""
    import torch

    from bench.build_workload import build_workload
    from bench.case import Case

    definition = Case.from_definition(case)
    torch.cuda.memory._record_memory_history(max_entries=10**6)
    workload = build_workload(definition, lambda _: None, "cuda:0")
    for _ in range(definition.steps):
        workload.step(lambda _: None)
    torch.cuda.synchronize()
    memory: Any = torch.cuda.memory
    memory._dump_snapshot(path)
    return torch.cuda.max_memory_reserved()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "run_events": run_events,
    "train_recorded": train_recorded,
}


def main() -> None:
    """Run the function that the command line names."""
    result = FUNCTIONS[sys.argv[1]](**json.loads(sys.stdin.read()))
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
