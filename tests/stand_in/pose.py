"""The environment in which an interpreter finds the stand-in GPU, posing as one of the cards."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from bench.errors import MembenchError, nearest
from bench.predict.cards import Card, card_name_for_gpu, find_card
from tests.stand_in.build import LIBRARIES

__all__ = ["DEFAULT_CARD", "NAME", "environment", "stand_in_card", "write_card"]

NAME = "stand-in (no kernel runs)"
"""What torch and NVML call the device; a card's name leaves the brackets out."""
DEFAULT_CARD = "h200-141gb"

_ROOT = Path(__file__).resolve().parents[2]
_NUMBERS = {
    *("STANDIN_MEMORY_BYTES", "STANDIN_CAPABILITY", "STANDIN_MULTIPROCESSORS", "STANDIN_DEVICES"),
    *("STANDIN_CONTEXT_BYTES", "STANDIN_WORKSPACE_BYTES", "STANDIN_FAULT_AT", "STANDIN_FILL"),
}
_PIDS = ("own", "host", "hidden")
_NO_WORKSPACE = {"floor_bytes": 0, "operand_fraction": 0.0}


def stand_in_card(
    posed: Card, *, memory_bytes: int, context_bytes: int, multiprocessors: int | None = None
) -> Card:
    """Return the card that the stand-in is: no workspace, and a context of so many bytes.

    ``multiprocessors``: None for as many as the posed card has. The name is never that of a card
    on sale: ``standin-141gb``.
    """
    said = "set by the stand-in GPU's environment"
    workspace = {"float32": _NO_WORKSPACE, "half": _NO_WORKSPACE, "source": said}
    data = {
        **dataclasses.asdict(posed),
        "name": card_name_for_gpu(NAME, memory_bytes),
        "model": NAME,
        "memory_bytes": memory_bytes,
        "memory_source": said,
        "context_bytes": context_bytes,
        "context_source": said,
        "convolution_workspace": workspace,
        "calibration": None,
        "multiprocessors": multiprocessors or posed.multiprocessors,
        "context_cuda": "",
        "context_cuda_source": "",
    }
    return Card.from_dict(data)


def environment(
    libraries: Path,
    state: Path,
    posed: str = DEFAULT_CARD,
    given: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the whole environment of a process that is to see the stand-in.

    ``state``: a folder that the processes on one stand-in share; the stand-in's card file goes
    there too. What ``given`` says in STANDIN_ variables stands above the card ``posed``.
    Raises MembenchError for a card that is not known, or a setting that is not one.
    """
    card = find_card(posed)
    own = {name: value for name, value in given.items() if name.startswith("STANDIN_")}
    _check(own)
    settings = {
        "STANDIN_STATE": str(state),
        "STANDIN_MEMORY_BYTES": str(card.memory_bytes),
        "STANDIN_CAPABILITY": "".join(map(str, card.compute_capability)),
        "STANDIN_MULTIPROCESSORS": str(card.multiprocessors),
        **own,
    }
    cards = state / "cards"
    context_bytes = int(settings.get("STANDIN_CONTEXT_BYTES", "0"))
    write_card(
        posed,
        int(settings["STANDIN_MEMORY_BYTES"]),
        context_bytes,
        cards,
        multiprocessors=int(settings["STANDIN_MULTIPROCESSORS"]),
    )
    preloaded = [_library(libraries, name) for name in LIBRARIES]
    paths = [str(_ROOT), *filter(None, [given.get("PYTHONPATH")])]
    return {
        **given,
        **settings,
        "LD_PRELOAD": ":".join([*preloaded, *filter(None, [given.get("LD_PRELOAD")])]),
        "MEMBENCH_CARDS": str(cards),
        "PYTHONPATH": os.pathsep.join(paths),
        # Triton links its launchers to the driver's library, and keeps them.
        "TRITON_LIBCUDA_PATH": str(libraries),
        "TRITON_CACHE_DIR": str(libraries.with_name(f"{libraries.name}-triton")),
    }


def _check(settings: Mapping[str, str]) -> None:
    known = [*sorted(_NUMBERS), "STANDIN_PIDS", "STANDIN_STATE"]
    for name, value in settings.items():
        if name not in known:
            raise MembenchError(f"{name} is no setting of the stand-in{nearest(name, known)}")
        if name in _NUMBERS and not (value.isascii() and value.isdigit()):
            raise MembenchError(f"{name} must be a whole number, got {value!r}")
        if name == "STANDIN_PIDS" and value not in _PIDS:
            raise MembenchError(f"{name} must be one of {', '.join(_PIDS)}, got {value!r}")


def write_card(
    posed: str,
    memory_bytes: int,
    context_bytes: int,
    folder: Path,
    multiprocessors: int | None = None,
) -> None:
    """Write the stand-in's card file, see ``stand_in_card``, into a folder of cards."""
    card = stand_in_card(
        find_card(posed),
        memory_bytes=memory_bytes,
        context_bytes=context_bytes,
        multiprocessors=multiprocessors,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{card.name}.json").write_text(json.dumps(card.to_dict(), indent=1))


def _library(folder: Path, name: str) -> str:
    found = sorted(folder.glob(f"{name}.so.*"))
    return str(found[0])
