"""The options of the checkpointing techniques, as a suite file gives them."""

from __future__ import annotations

from dataclasses import dataclass

from memsave.checkpoint_budget import check_budget
from memsave.checkpoint_nested import check_segment
from memsave.errors import OptionError

__all__ = ["CheckpointBudgetOptions", "CheckpointOptions", "CheckpointStepsOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Which of the blocks that a network calls checkpointable are recomputed."""

    every: int = 1  # every k-th block, the first included
    blocks: tuple[str, ...] = ()  # these blocks instead, by their names in the network

    def __post_init__(self) -> None:
        if self.every < 1:
            raise OptionError(f"every must be 1 or more, got {self.every}")
        if self.blocks and self.every != 1:
            raise OptionError(f"give blocks or every, not both: got {self.blocks}, {self.every}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointBudgetOptions:
    """How many bytes of activations there may be."""

    budget: int | str | None = None  # bytes, or text such as "2 GiB"
    share: float | None = None  # in its place, of what they are with nothing recomputed

    def __post_init__(self) -> None:
        check_budget(self.budget, self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStepsOptions:
    """How often a recurrent network keeps its state."""

    every: int = 1  # steps from one state kept to the next
    nested: bool = False  # two levels: about the square root of the steps' states
    segment: int | None = None  # steps of an outer segment; about the square root unless told

    def __post_init__(self) -> None:
        if self.every < 1:
            raise OptionError(f"every must be 1 or more steps, got {self.every}")
        if self.segment is not None and not self.nested:
            raise OptionError(f"segment is for nested: true alone, got segment {self.segment}")
        check_segment(self.segment, self.every)
