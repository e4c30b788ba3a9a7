"""What a case's measured steps say of its speed: median, spread, and whether to trust them.

The spread is the interquartile range (IQR): half of the steps lie within it. One above a tenth of
the median is noise, of a GPU that others use or that changes its clock. The warm-up step is not
among a record's times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.record import Record

__all__ = ["NOISY_SHARE", "Timing", "step_time_cell", "timing", "voxel_rate_cell"]

NOISY_SHARE = 0.1  # of the median


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and spread of readings in one unit; ``iqr`` is None of a single reading."""

    median: float
    iqr: float | None

    @property
    def noisy(self) -> bool:
        """Whether the spread is above a tenth of the median."""
        return self.iqr is not None and self.iqr > NOISY_SHARE * self.median


def timing(readings: Sequence[float]) -> Timing | None:
    """Return median and IQR; None without readings.

    Quartiles are interpolated between readings, the least and the greatest being the ends.
    """
    if not readings:
        return None
    if len(readings) == 1:
        return Timing(readings[0], None)
    first, _, third = statistics.quantiles(readings, n=4, method="inclusive")
    return Timing(statistics.median(readings), third - first)


def step_time_cell(record: Record) -> str:
    """Return ``0.512 s, IQR 0.012 s``, with ``, noisy`` behind where it is; else a dash."""
    found = timing(record.step_times_s)
    if found is None:
        return "-"
    return _cell(f"{found.median:.3g} s", "" if found.iqr is None else f"{found.iqr:.2g} s", found)


def voxel_rate_cell(record: Record) -> str:
    """Return ``4,120,000, IQR 99,000``: voxels of the whole batch, as run, a second of a step."""
    voxels = record.batch_size * math.prod(record.shape)
    found = timing([voxels / time_s for time_s in record.step_times_s if time_s > 0])
    if found is None:
        return "-"
    spread = "" if found.iqr is None else _rounded(found.iqr, 2)
    return _cell(_rounded(found.median, 3), spread, found)


def _cell(median: str, spread: str, found: Timing) -> str:
    return median + (f", IQR {spread}" if spread else "") + (", noisy" if found.noisy else "")


def _rounded(value: float, digits: int) -> str:
    return f"{float(f'{value:.{digits}g}'):,.0f}"
