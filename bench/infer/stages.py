"""The two stages of FLARE21's pipeline, as data: networks and the one shape that each ever sees.

The paper's 96x128x192 is taken for an array of slices, y, x, as readers of its time gave it: it
says that the sides keep the abdomen's proportions, and an abdomen is wider from left to right than
from back to front, and has fewer slices than either has voxels.

Source: He and Luo, "Fast and Low GPU Memory Abdominal organ segmentation" (FLARE21). Fixed shapes
are what lets a stage be predicted: its memory does not depend on the volume. torch is not imported
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.case import Case

__all__ = [
    "ARRAY_AXES",
    "ORGANS",
    "PAPER_CARD",
    "PAPER_FLOPS",
    "PAPER_FLOPS_NOTE",
    "PAPER_MEMORY",
    "PAPER_TIME",
    "REGION",
    "SEED",
    "SEGMENTATION",
    "STAGES",
    "Stage",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One network of the pipeline. ``shape``: the sides of its input array: slices, y, x."""

    name: str
    network: str  # in memsave.networks, and in a weights file
    shape: tuple[int, int, int]

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """The same sides as x, y, slices, the axes of volumes."""
        slices, y, x = self.shape
        return x, y, slices

    def case(self) -> Case:
        """Return the stage as a case that can be measured or predicted by itself."""
        return Case(
            network=self.network,
            variant=f"flare21 {self.name}",
            requested_shape=self.shape,
            shape=self.shape,
            mode="infer",
            seed=SEED,
        )


SEED = 0
ARRAY_AXES = (2, 1, 0)  # of x, y, slices: where an array's axes come from, and go back to
REGION = Stage(name="region", network="light_unet", shape=(96, 96, 96))
SEGMENTATION = Stage(name="organs", network="dense_vnet", shape=(96, 128, 192))
STAGES = (REGION, SEGMENTATION)
ORGANS = ("liver", "kidney", "spleen", "pancreas")  # labels 1 to 4; 0 is the background

PAPER_CARD = "titanx-12gb"
PAPER_MEMORY = "about 2 GB"
PAPER_TIME = "about 30 s a case on a TITAN X"
PAPER_FLOPS = 20_339_341_715
PAPER_FLOPS_NOTE = "the paper's figure is not reproduced by its network at this shape"
