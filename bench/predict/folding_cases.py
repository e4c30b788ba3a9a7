"""Which cases run one step for every slice, and after how many slices they repeat themselves."""

from __future__ import annotations

import dataclasses
import math

from bench.case import Case, TechniqueUse
from memsave.checkpoint_nested import segment_length
from memsave.errors import MemsaveError
from memsave.networks import find_network
from memsave.techniques import CheckpointStepsOptions, TakesSteps, find_technique, parse_options

__all__ = ["repeated_steps", "with_steps"]


def repeated_steps(case: Case) -> tuple[int, int] | None:
    """Return (steps, period) of a recurrent network that walks over the slices, else None.

    A period is one step, or as many as lie between two checkpoints. A case that cannot be built
    has none: whoever builds it says why. Nor has a network of the user's own, which may do as it
    likes.
    """
    if case.imported is not None:
        return None
    try:
        network = find_network(case.network)
        if not (isinstance(network.factory, type) and issubclass(network.factory, TakesSteps)):
            return None
        period = network.divisor(case.network_options)[-1]
        for use in case.techniques:
            options = parse_options(find_technique(use.name), use.options)
            if isinstance(options, CheckpointStepsOptions):
                period = math.lcm(period, _alike_after(options, case.shape[-1]))
    except MemsaveError:
        return None
    return case.shape[-1], period


def with_steps(case: Case, steps: int) -> Case:
    """Return the case with as many slices, and segments of checkpoints as long as it has now."""
    return dataclasses.replace(
        case,
        shape=(*case.shape[:-1], steps),
        techniques=tuple(_with_segment(use, case.shape[-1]) for use in case.techniques),
    )


def _alike_after(options: CheckpointStepsOptions, steps: int) -> int:
    """Return the steps of the longest region that there is more than one of."""
    # Where all steps lie between two checkpoints they are alike as without any.
    lengths = (_segment(options, steps), options.every, 1)
    return next(length for length in lengths if length < steps or length == 1)


def _segment(options: CheckpointStepsOptions, steps: int) -> int:
    if not options.nested:
        return options.every
    return options.segment or segment_length(steps, options.every)


def _with_segment(use: TechniqueUse, steps: int) -> TechniqueUse:
    """Return the technique with the length of its segments told: unless told it is the steps'."""
    options = parse_options(find_technique(use.name), use.options)
    if not isinstance(options, CheckpointStepsOptions) or not options.nested:
        return use
    return dataclasses.replace(use, options={**use.options, "segment": _segment(options, steps)})
