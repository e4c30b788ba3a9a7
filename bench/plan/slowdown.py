"""How much longer a step takes than that of the same network with everything kept: an estimate.

Measured step times are used where results hold them. Otherwise the time is made up of FLOPs, of
activations written and read in device memory, with what a technique adds to them, and of bytes
moved to the host and back, as far as the rest does not hide those. The rates are constants that
stand below, chosen for the order of magnitude of one current card with a PCIe 4.0 x16 link, and not
calibrated: their ratios decide, and a card that differs in them gives other slowdowns.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from bench.case import Case
from bench.record import Record, read_records

__all__ = ["measured_times", "predicted_slowdown"]

# Sustained, about half of what such a card's data sheet gives for tensor cores under TF32 and fp16.
FLOPS_PER_S = {"fp32": 3.0e13, "fp16": 6.0e13, "bf16": 6.0e13}
DEVICE_BYTES_PER_S = 8.0e11
HOST_BYTES_PER_S = 2.0e10  # of the 32 GB/s of a PCIe 4.0 x16 link, one way
# Any step writes its activations and reads them in forward; backward reads them again, writes their
# gradients and reads those.
_FORWARD_PASSES, _BACKWARD_PASSES = 2.0, 3.0
# Reads and writes of all activations that a technique adds and whose FLOPs are not counted.
_PASSES = {
    "recomputed_norm_act": 1.0,  # half of them are read, half written again
    "inplace_abn": 0.5,  # the norm's input is found again from its result
    "inplace_group_norm": 0.5,
    "inplace_instance_norm": 0.5,
    "checkpoint_selective": 1.0,
    "compress_activations": 3.0,  # read, written in a part of the bytes, and the way back
}
_STATE_BYTES_PER_PARAMETER = 16  # weight, gradient and Adam's two moments in float32


def predicted_slowdown(record: Record, plain: Record) -> float | None:
    """Return the predicted time over that of ``plain``, the same network with no technique.

    None where no FLOPs were counted, so that there is nothing to compare.
    """
    if not plain.step_flops:
        return None
    kept = (plain.needs_bytes or 0) - _STATE_BYTES_PER_PARAMETER * (plain.parameters or 0)
    added = sum(_PASSES.get(name, 0.0) for name in record.techniques)
    return _time_s(record, max(0, kept), added) / _time_s(plain, max(0, kept), 0.0)


def _time_s(record: Record, kept_bytes: int, added_passes: float) -> float:
    rate, forward = FLOPS_PER_S[record.precision], record.forward_flops or 0
    pass_s = kept_bytes / DEVICE_BYTES_PER_S
    forward_s = forward / rate + _FORWARD_PASSES * pass_s
    backward_s = ((record.step_flops or 0) - forward) / rate
    backward_s += (_BACKWARD_PASSES + added_passes) * pass_s
    host_s = (record.peak_host_bytes or 0) / HOST_BYTES_PER_S  # each way
    return max(forward_s, host_s) + max(backward_s, host_s)


def measured_times(folder: Path, card: str) -> Mapping[str, float]:
    """Return the median step time of every case measured on ``card``, by the case's digest.

    A GPU that was capped to the card is not the card: it is as fast as it is.
    """
    times: dict[str, float] = {}
    for path in sorted(folder.rglob("*.measured.jsonl")):
        for record in read_records(path):
            if record.status == "ok" and record.step_times_s and record.card == card:
                case = Case.from_definition(record.definition)
                times[case.digest()] = statistics.median(record.step_times_s)
    return times
