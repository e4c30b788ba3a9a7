"""What a recipe tells while it trains, and the weights that it leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.errors import MembenchError
from bench.training import Reading

__all__ = ["Progress", "Tell", "check_weights_file", "fits_the_device", "overlap", "save_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A reading of a stage; ``dice`` by class, None where nothing was evaluated."""

    stage: str
    step: int
    loss: float
    learning_rate: float
    dice: tuple[float, ...] | None

    @classmethod
    def of(cls, stage: str, reading: Reading) -> Progress:
        """Return a reading of the training loop as one of ``stage``."""
        return cls(
            stage=stage,
            step=reading.step,
            loss=reading.loss,
            learning_rate=reading.learning_rate,
            dice=reading.scores,
        )


Tell = Callable[[Progress], None]


def overlap(prediction: Tensor, reference: Tensor) -> float:
    """Return the Dice coefficient of two masks of one shape; 1 where both are empty."""
    total = int(prediction.sum() + reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else 1.0


def check_weights_file(path: Path, force: bool) -> None:
    """Raise MembenchError unless weights can be written to ``path``: before the work, not after."""
    try:
        if path.is_dir():
            raise MembenchError(f"output {path} is a folder; name a file in it")
        if path.exists() and not force:
            raise MembenchError(f"output {path} exists; choose another name or give --force")
        if not path.parent.is_dir():
            raise MembenchError(f"no folder {path.parent} to write {path.name} to; make it first")
        part = _part(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def save_weights(path: Path, network: str, state: dict[str, Tensor], **about: Any) -> None:
    """Write ``{network: state, **about}``, whole or not at all; ``membench infer`` reads it.

    ``about`` are plain values, such as the network's options: the file is read without running
    code of it.
    """
    part = _part(path)
    try:
        torch.save({network: {k: v.cpu() for k, v in state.items()}, **about}, part)
        os.replace(part, path)
    except OSError as error:
        raise _not_writable(path, error) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def fits_the_device() -> Iterator[None]:
    """Turn a GPU's running out of memory into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0].rstrip(".")[:200]
        raise MembenchError(
            f"out of memory in training: {first}; take a coarser --spacing, or --device cpu"
        ) from None


def _part(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")


def _not_writable(path: Path, error: OSError) -> MembenchError:
    return MembenchError(
        f"cannot write {path}: {error.strerror or error}; choose another output with -o"
    )
