"""Random programs, run by the simulator and by PyTorch's own allocator, and compared throughout.

``python -m tests.stand_in.allocator_programs --seed 0 --count 20`` in an environment in which
``torch.cuda`` answers by the stand-in: its memory is set here, and its addresses are known. After
each step all counters are compared, after every tenth all segments and blocks; the snapshot that
PyTorch recorded is replayed. Exit code 1 at a difference. One process of PyTorch for each setup.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.stand_in.allocator_compare import Simulated, first_difference, replay_difference
from tests.stand_in.allocator_setups import MIB, SETUPS, Setup

__all__ = ["main", "random_program", "real_answers"]

_GRANULE = 2 * MIB
_LIMIT_S = 1800


def _size(rng: random.Random, largest: int, seen: Sequence[int]) -> int:
    kind = rng.random()
    if seen and kind < 0.3:
        return max(1, rng.choice(seen) + rng.choice((0, 0, 0, 1, -1, 512, -512, 65536)))
    if kind < 0.4:
        return rng.choice((1, 511, 512, 513, 1024, 4096, 1000, 100_000))
    if kind < 0.5:
        return rng.randint(1, MIB)
    if kind < 0.6:
        corner = rng.choice((1, 2, 4, 8, 9, 10, 12, 16, 20, 22, 24, 32, 40, 64)) * MIB
        return corner + rng.choice((-MIB, -513, -512, -1, 0, 1, 512, 513, MIB, MIB + 512))
    if kind < 0.8:
        return rng.randint(MIB, 12 * MIB)
    if kind < 0.85:
        return _GRANULE * rng.randint(1, max(1, largest // _GRANULE))
    return rng.randint(10 * MIB, largest)


def random_program(setup: Setup, seed: int, steps: int = 120) -> dict[str, Any]:
    """Return a program: its share of the memory, its steps, what of it the history shall hold.

    The simulator runs along so that only what exists is freed: what does not fit stays out.
    """
    rng = random.Random(seed)
    fraction = None if "per_process" in setup.conf else rng.choice((1.0, setup.fraction))
    program: dict[str, Any] = {"fraction": fraction}
    simulated = Simulated(setup, program["fraction"])
    done: list[list[Any]] = []
    seen: list[int] = []
    crowded = rng.choice((4, 10, 30))
    for name in range(steps):
        live = list(simulated.live)
        kind = rng.random()
        step: list[Any]
        if kind < 0.03:
            step = ["empty_cache"]
        elif kind < 0.05:
            step = ["reset_peaks"]
        elif setup.switches and kind > 0.95:
            step = ["expandable", rng.random() < 0.5]
        elif kind < 0.1:
            step = ["complete_events", rng.randrange(3)]
        elif live and kind < 0.17:
            step = ["record_stream", rng.choice(live), rng.randrange(3)]
        elif live and rng.random() < min(0.8, 0.5 * len(live) / crowded):
            step = ["free", rng.choice(live)]
        else:
            size = _size(rng, setup.largest, seen)
            seen.append(size)
            step = ["alloc", name, size, rng.choice((0, 0, 0, 0, 1, 2))]
            if setup.pools and rng.random() < 0.4:
                step.append(rng.randint(1, setup.pools))
        simulated.step(step)
        done.append(step)
    return {**program, "steps": done, "history": _history(random.Random(seed))}


def _history(rng: random.Random) -> dict[str, Any]:
    """Return when the recording begins and how many entries its buffer keeps, the last ones."""
    return {
        "from": rng.choice((0, 0, rng.randrange(100))),
        "context": rng.choice(("all", "all", None, "alloc", "state")),
        "entries": rng.choice((100_000, 30, 60, 100)),
    }


def real_answers(setup: Setup, programs: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Have PyTorch's allocator run the programs, in a process of its own; snapshots go to a folder.

    Errors: RuntimeError with what that process printed.
    """
    environment = {
        **os.environ,
        "PYTORCH_ALLOC_CONF": "",
        "PYTORCH_CUDA_ALLOC_CONF": setup.conf,
        "STANDIN_MEMORY_BYTES": str(setup.total),
        "STANDIN_CONTEXT_BYTES": str(setup.total - setup.capacity),
    }
    asked, answered = folder / "programs.json", folder / "answers.json"
    asked.write_text(json.dumps(programs))
    command = [sys.executable, "-m", "tests.stand_in.allocator_answers", str(asked), str(answered)]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S
    )
    if run.returncode:
        raise RuntimeError(f"PyTorch's run failed under {setup.conf!r}:\n{run.stderr[-3000:]}")
    answers: dict[str, Any] = json.loads(answered.read_text())
    return answers


def _differences(name: str, seed: int, count: int) -> Iterator[str]:
    setup = SETUPS[name]
    programs = [random_program(setup, seed + number) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        answers = real_answers(setup, programs, Path(folder))["answers"]
        for number, (program, answer) in enumerate(zip(programs, answers, strict=True)):
            found = first_difference(setup, program, answer)
            # A history does not say when expandable segments are switched on and off.
            if found is None and not setup.switches:
                found = replay_difference(Path(folder, f"{number}.pickle"))
            if found is not None:
                yield f"{name}, seed {seed + number}, share {program['fraction']}: {found}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--count", type=int, default=20, help="programs for each setup")
    parser.add_argument("--setup", choices=SETUPS, action="append", help="only this setup")
    parser.add_argument("--show", type=int, default=3, help="differences shown for each setup")
    asked = parser.parse_args(arguments)
    if asked.count < 1:
        parser.error("--count must be at least 1")
    different = 0
    for name in asked.setup or SETUPS:
        found = list(_differences(name, asked.seed, asked.count))
        different += len(found)
        print(f"{name}: {asked.count - len(found)} of {asked.count} programs alike", flush=True)
        for line in found[: asked.show]:
            print(f"  {line}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
