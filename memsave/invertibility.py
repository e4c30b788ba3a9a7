"""Is a block its own inverse's inverse? A check for blocks of your own, before training on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memsave.checkpoint import _statistics_untouched
from memsave.errors import InputError, OptionError

__all__ = ["Invertibility", "check_invertible"]

_UNITS = 64  # roundings of the largest value; a coupling has 4, each weighed by what f amplifies


@dataclass(frozen=True, slots=True)
class Invertibility:
    """What ``check_invertible`` found. True where nothing is wrong; prints as a report."""

    max_error: float | None  # of ``inverse(block(x)) - x``; None where it could not be taken
    tolerance: float
    problems: tuple[str, ...]  # what must be put right
    notes: tuple[str, ...]  # what to know

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "invertible" if self else "not invertible"
        error = "" if self.max_error is None else f": error {self.max_error:.3g}"
        lines = [f"{verdict}{error}, tolerance {self.tolerance:.3g}"]
        return "\n".join([*lines, *(f"- {text}" for text in (*self.problems, *self.notes))])


def check_invertible(
    block: nn.Module, example: Tensor, *, tolerance: float | None = None
) -> Invertibility:
    """Run ``block`` forward and its ``inverse`` back on ``example``, and say what is wrong.

    The block is as it was afterwards: running statistics and the generators' states are put back.

    Shapes: ``example`` any that the block takes, of a floating-point type; it is not changed.
    Exact: ``max_error`` is the largest ``|inverse(block(x)) - x|``. A small error on one example
        proves no inverse; a large one disproves it.
    Errors: OptionError for a block without a method ``inverse(y)``, and for a tolerance that is
        not positive; InputError for an example that is not of a floating-point type or is empty.

    Args:
        block: with ``forward(x)`` and ``inverse(y)``, such as a ``ReversibleBlock``.
        example: an input such as those it will see.
        tolerance: what the error may be; 64 roundings of the example's type at the largest value
            of input and result unless told.
    """
    inverse: Any = getattr(block, "inverse", None)
    if not callable(inverse):
        raise OptionError(
            f"{type(block).__name__} has no method inverse(y): give it one, or make it of two "
            "modules with memsave.ReversibleBlock"
        )
    if not example.is_floating_point() or not example.numel():
        raise InputError(
            f"an example must hold floating-point values, got {example.dtype} of shape "
            f"{tuple(example.shape)}"
        )
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"tolerance must be more than 0, got {tolerance}")
    devices = [example.device] if example.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices), _statistics_untouched([block]):
        return _check(block, inverse, example.detach(), tolerance)


def _check(block: nn.Module, inverse: Any, x: Tensor, tolerance: float | None) -> Invertibility:
    problems: list[str] = []
    result: Any = block(given := x.clone())
    if not torch.equal(given, x):
        problems.append("forward overwrites its input: let it start with what does not")
    allowed = tolerance or _usual_tolerance(x, result if isinstance(result, Tensor) else x)
    if not isinstance(result, Tensor) or result.numel() != x.numel():
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        problems.append(
            f"forward gives {shape} for {tuple(x.shape)}: only a result of as many values can be "
            "inverted, so channels and strides must keep their number"
        )
        return Invertibility(None, allowed, tuple(problems), ())
    if result.dtype != x.dtype:
        problems.append(f"forward gives {result.dtype} for {x.dtype}: what it rounds is lost")
    if not torch.equal(block(x.clone()), result):
        problems.append(
            "forward gives another result the second time: draw no random numbers, or use "
            "memsave.ReversibleSequence, which restores their state, and check in eval()"
        )
    error = _error(inverse, result, x, problems)
    if error is not None and not error <= allowed:
        problems.append(
            f"inverse misses the input by {error:.3g}, more than {allowed:.3g}: it must undo "
            "forward's steps last to first, with every sum's sign turned"
        )
    return Invertibility(error, allowed, tuple(problems), _notes(block))


def _error(inverse: Any, result: Tensor, x: Tensor, problems: list[str]) -> float | None:
    given = result.clone()
    back: Any = inverse(given)
    if not torch.equal(given, result):
        problems.append("inverse overwrites the result, which a later layer may have kept")
    if not isinstance(back, Tensor) or back.shape != x.shape:
        shape = tuple(back.shape) if isinstance(back, Tensor) else type(back).__name__
        problems.append(f"inverse gives {shape}, not the input's {tuple(x.shape)}")
        return None
    return float((back.double() - x.double()).abs().max())


def _usual_tolerance(x: Tensor, result: Tensor) -> float:
    largest = max(float(x.abs().max()), float(result.abs().max()))
    return _UNITS * torch.finfo(x.dtype).eps * max(largest, torch.finfo(x.dtype).tiny)


def _notes(block: nn.Module) -> tuple[str, ...]:
    names = [n for n, m in block.named_modules() if isinstance(m, _BatchNorm) and m.training]
    if not names:
        return ()
    note = (
        f"{names[0]} is a BatchNorm in training: inverse must see the same batch, since it divides "
        "by that batch's deviation, and running it again must not update its statistics twice "
        "(memsave.ReversibleSequence sees to both; a GroupNorm needs neither)"
    )
    return (note,)
