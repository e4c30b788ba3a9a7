"""How much longer a step takes than that of the same network with everything kept: an estimate.

Measured step times are used where results hold them. Otherwise the time is made up of FLOPs, of
bytes that a technique moves through device memory, and of bytes that it moves to the host and back,
as far as the computation does not hide those. The rates are constants that stand below, chosen
for the order of magnitude of one current card with a PCIe 4.0 x16 link, and not calibrated: their
ratios decide, and a card that differs in them gives other slowdowns.
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
    passes = sum(_PASSES.get(name, 0.0) for name in record.techniques)
    rate = FLOPS_PER_S[record.precision]
    forward_s = (record.forward_flops or 0) / rate
    backward_s = ((record.step_flops or 0) - (record.forward_flops or 0)) / rate
    backward_s += passes * max(0, kept) / DEVICE_BYTES_PER_S
    host_s = (record.peak_host_bytes or 0) / HOST_BYTES_PER_S
    time_s = max(forward_s, host_s) + max(backward_s, host_s)
    return time_s / (plain.step_flops / rate)


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
