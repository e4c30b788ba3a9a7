"""FLARE21's two stages as one pipeline: find the abdomen, segment its organs, clean up.

A volume of any size is resized to 96x96x96, where a light U-Net finds the region; the box around
its largest component, with a margin, is cut out of the full volume and resized to 96x128x192
(slices, y, x), where DenseVNet finds the organs; their scores are resized back, and the largest
component of each organ stays. Only the two forward passes run on the device, at shapes that never
change: all that depends on the volume stays on the CPU, so the device's memory can be predicted.

Source: He and Luo, "Fast and Low GPU Memory Abdominal organ segmentation" (FLARE21). Our choices
where the paper says nothing: intensities limited to percentiles 0.5 and 99.5 and z-scored (for CT
and MR alike), a margin of 5 % of each axis, components connected by corners too. One component is
kept of the kidneys, as of every organ, so where they do not touch, one is lost; ``components=2``
keeps both, and one more speck of every other organ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.infer.stages import ARRAY_AXES, ORGANS, REGION, SEGMENTATION, Stage
from bench.preprocess import (
    Box,
    fill_nonfinite,
    foreground_box,
    largest_components,
    percentile_window,
    resize,
    resize_scores,
    zscore,
)

__all__ = ["MARGIN_PERCENT", "Pipeline", "Segmentation"]

MARGIN_PERCENT = 5  # of each axis of the volume, on both sides of the box

Around = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What the pipeline made of a volume. ``times_s``: seconds by step, stages by their names."""

    labels: npt.NDArray[np.uint8]  # x, y, slices; 0 background, then ``ORGANS``
    box: Box  # what stage two saw
    region_found: bool  # False: stage one found nothing, and ``box`` is the whole volume
    nonfinite_voxels: int  # NaN and infinities, taken for air
    times_s: dict[str, float] = field(default_factory=dict)

    def organ_voxels(self) -> dict[str, int]:
        """Return how many voxels each organ has; 0 for one that was not found."""
        counts = np.bincount(self.labels.ravel(), minlength=len(ORGANS) + 1)
        return {organ: int(counts[label]) for label, organ in enumerate(ORGANS, start=1)}


class Pipeline:
    """Both stages, for any number of volumes.

    ``networks``: by name, in eval mode, on the CPU; each is on ``device`` during its stage only.
    ``around(stage)``: a scope in which that stage's device work happens, to read its memory.
    ``components``: how many of each organ stay, the largest.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device | str = "cpu",
        around: Around | None = None,
        components: int = 1,
    ) -> None:
        self._networks = networks
        self._device = torch.device(device)
        self._around: Around = around or (lambda _stage: nullcontext())
        self._components = components

    def segment(self, voxels: npt.NDArray[np.float32]) -> Segmentation:
        """Segment a volume with canonical axes x, y, slices, of any size and intensities.

        Errors: MembenchError when no voxel is finite; what ``around`` and the device raise.
        """
        times: dict[str, float] = {}
        with _timed(times, "intensities"):
            finite, nonfinite = fill_nonfinite(voxels)
            image = zscore(percentile_window(finite))
        found = self._find_region(image, times)
        box = found or Box.whole(image.shape)
        with _timed(times, "crop"):
            crop = resize(image[box.slices], SEGMENTATION.volume_shape)
        scores = self._run(SEGMENTATION, crop, times)
        with _timed(times, "restore"):
            labels = np.zeros(image.shape, dtype=np.uint8)
            labels[box.slices] = resize_scores(scores, box.shape)
        with _timed(times, "components"):
            labels = largest_components(labels, self._components)
        return Segmentation(
            labels=labels,
            box=box,
            region_found=found is not None,
            nonfinite_voxels=nonfinite,
            times_s=times,
        )

    def _find_region(self, image: npt.NDArray[np.float32], times: dict[str, float]) -> Box | None:
        """Return the box of stage one in the full volume, its margin included."""
        with _timed(times, "shrink"):
            small = resize(image, REGION.volume_shape)
        scores = self._run(REGION, small, times)
        with _timed(times, "box"):
            box = foreground_box((scores[1] > scores[0]).numpy())
            if box is None:
                return None
            in_volume = box.scaled(REGION.volume_shape, image.shape)
            return in_volume.grown(MARGIN_PERCENT, image.shape)

    def _run(
        self, stage: Stage, voxels: npt.NDArray[np.float32], times: dict[str, float]
    ) -> Tensor:
        """Return the scores of a stage's network, (classes, x, y, slices), on the CPU.

        The network itself sees slices, y, x.
        """
        network = self._networks[stage.network]
        try:
            with _timed(times, stage.name), self._around(stage.name), torch.no_grad():
                network.to(self._device)
                array = np.ascontiguousarray(voxels.transpose(ARRAY_AXES))
                images = torch.from_numpy(array)[None, None].to(self._device)
                scores: Tensor = network(images)[0]
                return scores.cpu().permute(0, *(1 + axis for axis in ARRAY_AXES))
        finally:
            network.cpu()


@contextmanager
def _timed(times: dict[str, float], step: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    times[step] = time.perf_counter() - begun
