"""A case built on a device: a network known by name, or one that is the user's own."""

from __future__ import annotations

import torch

from bench.case import Case
from bench.errors import MembenchError
from bench.imported_workload import build_imported
from bench.named_workload import build_named
from bench.workload import Mark, Workload
from memsave.errors import MemsaveError

__all__ = ["build_workload"]


def build_workload(case: Case, mark: Mark, device: str | torch.device) -> Workload:
    """Build the model, the optimizer and a random batch on ``device``, such as "cuda:0".

    Modules are made there rather than moved. The steps then run outside of any device scope, as
    a training script's do: an optimizer keeps its step counters on the CPU.
    Raises MembenchError where the case names what does not exist or cannot be combined.
    """
    mark("model")
    try:
        with torch.device(device):
            torch.manual_seed(case.seed)
            return build_named(case) if case.imported is None else build_imported(case)
    except MemsaveError as error:
        raise MembenchError(str(error)) from error
