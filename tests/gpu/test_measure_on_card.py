"""Measuring for real: readings, caps and times of small cases in fresh processes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bench.case import Case
from bench.child import Child
from bench.gpu import GpuIdentity, gpu_identity
from bench.record import PHASES, Parts, Peaks
from bench.units import GIB, MIB
from tests.gpu.cases import small_case

pytestmark = pytest.mark.gpu

COUNTERS = (
    "peak_requested_bytes",
    "peak_allocated_bytes",
    "peak_active_bytes",
    "peak_reserved_bytes",
)


def measured(case: Case, **request: Any) -> dict[str, Any]:
    child = Child("bench.measure_worker")
    try:
        return child.ask({"case": case.to_definition(), **request}, limit_s=300)
    finally:
        child.close()


@pytest.fixture(scope="module")
def readings() -> dict[str, Any]:
    return measured(small_case(timed_steps=3))


def test_the_gpu_is_named_with_uuid_memory_and_card() -> None:
    identity = gpu_identity()

    assert isinstance(identity, GpuIdentity)
    assert identity.uuid.startswith(("GPU-", "MIG-"))
    assert identity.memory_bytes > GIB
    assert identity.card.endswith("gb")


def test_the_hello_says_what_runs(readings: dict[str, Any]) -> None:
    del readings  # the GPU is warm
    child = Child("bench.measure_worker")
    child.close()

    for key in ("torch", "cuda", "cudnn", "gpu", "gpu_uuid"):
        assert isinstance(child.hello[key], str), key


def test_counters_stand_in_their_order_in_every_phase(readings: dict[str, Any]) -> None:
    assert readings["status"] == "ok", readings["reason"]
    assert tuple(readings["phases"]) == PHASES
    for peaks in (readings, *readings["phases"].values()):
        values = [peaks[name] for name in COUNTERS]
        assert values[0] > 0
        assert all(low <= high for low, high in itertools.pairwise(values)), values
    for name in COUNTERS:
        assert readings[name] == max(peaks[name] for peaks in readings["phases"].values())


def test_the_process_is_its_parts_and_the_context_is_a_contexts_size(
    readings: dict[str, Any],
) -> None:
    parts = Parts(**readings["parts"])
    known = (parts.tensors_bytes, parts.allocator_bytes, parts.context_bytes)

    assert sum(size for size in known if size is not None) == readings["process_bytes"]
    assert parts.context_bytes is not None
    # 100 to 700 MiB are reported in public for a bare context; handles and kernels come on top.
    # More means that other processes share the GPU and the driver does not show us ours.
    assert 64 * MIB < parts.context_bytes < 3 * GIB
    total = readings["capacity_bytes"] + parts.context_bytes
    assert abs(total - gpu_identity().memory_bytes) < GIB


@pytest.mark.needs_kernels
def test_steps_are_timed(readings: dict[str, Any]) -> None:
    assert len(readings["step_times_s"]) == 3
    # A U-Net at 64 cubed takes milliseconds; microseconds would mean that nothing was waited for.
    assert all(1e-3 < seconds < 10 for seconds in readings["step_times_s"])


def test_two_processes_measure_the_same_bytes(readings: dict[str, Any]) -> None:
    again = measured(small_case())

    assert [again[name] for name in COUNTERS] == [readings[name] for name in COUNTERS]


def test_a_cap_of_what_was_reserved_changes_nothing(readings: dict[str, Any]) -> None:
    # cuDNN chooses no plan by free memory while benchmark is off, so the run goes the same way.
    capped = measured(small_case(), capacity_bytes=readings["peak_reserved_bytes"])

    assert capped["status"] == "ok", capped["reason"]
    assert capped["capacity_bytes"] == readings["peak_reserved_bytes"]
    assert [capped[name] for name in COUNTERS] == [readings[name] for name in COUNTERS]


def test_a_cap_below_what_tensors_need_is_a_result_with_its_phase(
    readings: dict[str, Any],
) -> None:
    model = Peaks(**readings["phases"]["model"])
    assert model.peak_reserved_bytes is not None
    capacity = model.peak_reserved_bytes + 64 * MIB

    capped = measured(small_case(timed_steps=2), capacity_bytes=capacity)

    assert capped["status"] == "oom"
    assert capped["reason"].startswith("out of memory in forward of step 1: tried to allocate")
    assert capped["parameters"] == readings["parameters"]
    assert 0 < capped["peak_allocated_bytes"] <= capped["peak_reserved_bytes"] <= capacity
    assert capped["process_bytes"] is None
    assert capped["step_times_s"] == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_and_prediction_of_a_volume_run(precision: Any) -> None:
    train = measured(small_case(precision=precision))
    infer = measured(small_case(precision=precision, mode="infer"))

    assert (train["status"], infer["status"]) == ("ok", "ok")
    assert infer["peak_allocated_bytes"] < train["peak_allocated_bytes"]
    assert list(infer["phases"]) == ["model", "forward"]
