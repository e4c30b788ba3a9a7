"""Two levels of checkpoints for a long recurrence: memory about the square root of the steps.

One level keeps a state for every k-th step, so its memory still grows with the steps. Here the
steps are cut into segments of which only the first state is kept; when backward comes to a segment
it runs again, keeping the states inside, and each of those runs again for its activations. A step
runs forward three times instead of two, the last of a segment twice.

Source: the two-level case of Griewank, "Achieving logarithmic growth of temporal and spatial
complexity in reverse automatic differentiation", 1992; Chen, Xu, Zhang, Guestrin,
arXiv:1604.06174, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from memsave.checkpoint import _run, checkpoint_steps
from memsave.errors import OptionError

__all__ = ["check_segment", "checkpoint_nested_steps", "kept_states", "segment_length"]

State = TypeVar("State")
Output = TypeVar("Output")


def checkpoint_nested_steps(
    step: Callable[[State, Tensor], tuple[State, Output]],
    every: int = 1,
    segment: int | None = None,
    modules: Sequence[nn.Module] = (),
) -> Callable[[State, Iterable[Tensor]], tuple[State, list[Output]]]:
    """Return a function that runs a recurrent ``step`` along a sequence with two-level checkpoints.

    As ``memsave.checkpoint_steps``, which is the inner level; ``step``, ``modules`` and what is
    returned are the same.

    Memory: keeps the inputs and the outputs, and one state for every ``segment`` steps; while
        backward runs a segment, one for every ``every`` steps of it, and ``every`` steps'
        activations. With the segment left to us at most ``kept_states(steps, every)`` states,
        about 2 sqrt(steps / every): 36 for 320 steps, 64 for 1,000. A state that is an output
        too, as h of an LSTM, is in the outputs anyway.
    Exact: results and gradients are those of the plain loop, bit for bit; running statistics are
        updated once, dropout draws the same masks.
    Errors: OptionError if ``every`` is less than 1, or ``segment`` no multiple of it.

    Args:
        step: ``step(state, x_t)`` returns ``(state, output)``.
        every: steps from one state kept to the next inside a segment.
        segment: steps of a segment; None chooses ``segment_length`` for each sequence.
        modules: those whose running statistics ``step`` updates, if it is not a module's own.
    """
    inner = checkpoint_steps(step, every, modules)
    check_segment(segment, every)
    owner = getattr(step, "__self__", step)
    regions = [*modules, *([owner] if isinstance(owner, nn.Module) else [])]

    def one_segment(state: State, *inputs: Tensor) -> tuple[State, list[Output]]:
        return inner(state, inputs)

    def run(state: State, inputs: Iterable[Tensor]) -> tuple[State, list[Output]]:
        remaining = tuple(inputs)
        length = segment or segment_length(max(1, len(remaining)), every)
        outputs: list[Output] = []
        for first in range(0, len(remaining), length):
            of_segment = remaining[first : first + length]
            state, results = _run(one_segment, regions, (state, *of_segment))
            outputs += results
        return state, outputs

    return run


def segment_length(steps: int, every: int = 1) -> int:
    """Return the steps of a segment with which fewest states are kept, a multiple of ``every``.

    Of several such, one that divides ``steps``, so that all segments are alike; then the shortest.
    """
    if steps < 1 or every < 1:
        raise OptionError(f"steps and every must be 1 or more, got {steps} and {every}")
    groups = math.ceil(steps / every)
    return min(
        (every * inner for inner in range(1, groups + 1)),
        key=lambda length: (kept_states(steps, every, length), steps % length != 0, length),
    )


def kept_states(steps: int, every: int = 1, segment: int | None = None) -> int:
    """Return how many states are alive at most: of all segments, and inside of the last whole one.

    The state before a segment is the first one inside it: it is one tensor, and counts as two
    here only in name, so this is an upper bound by one.
    """
    length = segment or segment_length(steps, every)
    return math.ceil(steps / length) + math.ceil(min(length, steps) / every)


def check_segment(segment: int | None, every: int) -> None:
    """Raise OptionError unless ``segment`` is None or a multiple of ``every``."""
    if segment is not None and (segment < every or segment % every):
        raise OptionError(
            f"segment must be a multiple of every, {every} steps, and at least that, got {segment}"
        )
