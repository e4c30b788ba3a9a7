"""Which cases run one step for every slice, and after how many slices they repeat themselves."""

from __future__ import annotations

import dataclasses
import math

from bench.case import Case
from memsave.errors import MemsaveError
from memsave.networks import find_network
from memsave.techniques import CheckpointStepsOptions, TakesSteps, find_technique, parse_options

__all__ = ["repeated_steps", "with_steps"]


def repeated_steps(case: Case) -> tuple[int, int] | None:
    """Return (steps, period) of a recurrent network that walks over the slices, else None.

    A period is one step, or as many as lie between two checkpoints. A case that cannot be built
    has none: whoever builds it says why.
    """
    try:
        network = find_network(case.network)
        if not (isinstance(network.factory, type) and issubclass(network.factory, TakesSteps)):
            return None
        period = network.divisor(case.network_options)[-1]
        for use in case.techniques:
            options = parse_options(find_technique(use.name), use.options)
            # Where all steps lie between two checkpoints they are alike as without any.
            if isinstance(options, CheckpointStepsOptions) and options.every < case.shape[-1]:
                period = math.lcm(period, options.every)
    except MemsaveError:
        return None
    return case.shape[-1], period


def with_steps(case: Case, steps: int) -> Case:
    """Return the case with as many slices."""
    return dataclasses.replace(case, shape=(*case.shape[:-1], steps))
