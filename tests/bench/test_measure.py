"""Readings of a scripted workload on a stand-in GPU, each number worked out by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import measure as measure_module
from bench import nvml
from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError
from bench.measure import measure, memory_fraction
from bench.record import Parts, Peaks
from bench.units import GIB, MIB
from memsave.streams import PlainStreams, use_streams
from tests.bench.fake_cuda import UUID, FakeCuda

Script = Callable[[str], None]


@dataclass
class ScriptedWorkload:
    """Holds 10 MiB from the model phase on; ``script`` says what a phase of a step does."""

    cuda: FakeCuda
    script: Script
    seconds_a_step: float = 0.25
    steps: int = 0
    collecting: list[bool] = field(default_factory=list)

    def step(self, mark: Callable[[str], None]) -> None:
        self.steps += 1
        self.collecting.append(gc.isenabled())
        for phase in ("forward", "backward", "optimizer"):
            mark(phase)
            self.script(phase)
        self.cuda.clock_s += self.seconds_a_step

    def parameter_count(self) -> int:
        return 7


def case(**changes: Any) -> Case:
    fields: dict[str, Any] = {"timed_steps": 0, **changes}
    shape = (8, 8, 8)
    return Case(network="fcn", variant="test", requested_shape=shape, shape=shape, **fields)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(autouse=True)
def visible_process(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    """NVML sees this process, unless a test says otherwise."""
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: cuda.process_bytes)


Scripted = Callable[[Script], ScriptedWorkload]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Scripted:
    """Make ``measure`` build a scripted workload."""

    def use(script: Script) -> ScriptedWorkload:
        workload = ScriptedWorkload(cuda, script)

        def build(_case: Case, mark: Callable[[str], None], _device: str) -> ScriptedWorkload:
            mark("model")
            cuda.allocate(10 * MIB)
            script("model")
            return workload

        monkeypatch.setattr(measure_module, "build_workload", build)
        return workload

    return use


def steps_of(cuda: FakeCuda, sizes: dict[str, int]) -> Script:
    """Each phase allocates its bytes and frees them at once."""

    def script(phase: str) -> None:
        if phase in sizes:
            cuda.allocate(sizes[phase])
            cuda.free(sizes[phase])

    return script


def test_peaks_are_the_highest_of_all_phases_and_each_phase_has_its_own(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    scripted(steps_of(cuda, {"forward": 30 * MIB + 1, "backward": 50 * MIB, "optimizer": MIB}))

    readings = measure(case(), cuda)

    assert (readings["status"], readings["reason"], readings["parameters"]) == ("ok", "", 7)
    assert readings["peak_requested_bytes"] == 60 * MIB
    assert readings["peak_allocated_bytes"] == 60 * MIB
    assert readings["peak_active_bytes"] == 60 * MIB
    assert readings["peak_reserved_bytes"] == 60 * MIB
    phases = {name: Peaks(**peaks) for name, peaks in readings["phases"].items()}
    assert list(phases) == ["model", "forward", "backward", "optimizer"]
    # 10 MiB held; the forward's request of 30 MiB and one byte takes a block of 30 MiB + 512
    assert phases["forward"].peak_requested_bytes == 40 * MIB + 1
    assert phases["forward"].peak_allocated_bytes == 40 * MIB + 512
    assert phases["optimizer"].peak_allocated_bytes == 11 * MIB
    assert phases["model"].peak_reserved_bytes == 10 * MIB


def test_a_phase_keeps_the_highest_of_all_its_visits(cuda: FakeCuda, scripted: Scripted) -> None:
    sizes = iter([5 * MIB, 40 * MIB, 20 * MIB])

    def script(phase: str) -> None:
        if phase == "forward":
            size = next(sizes)
            cuda.allocate(size)
            cuda.free(size)

    scripted(script)

    readings = measure(case(steps=3), cuda)

    assert readings["phases"]["forward"]["peak_allocated_bytes"] == 50 * MIB


def test_the_last_phase_is_read_before_the_time_pass_begins(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    visits = 0

    def script(phase: str) -> None:
        nonlocal visits
        visits += phase == "optimizer"
        # two steps of the memory pass, then the time pass, which must leave no trace
        size = 20 * MIB if visits <= 2 else 200 * MIB
        if phase == "optimizer":
            cuda.allocate(size)
            cuda.free(size)

    scripted(script)

    readings = measure(case(timed_steps=3), cuda)

    assert readings["phases"]["optimizer"]["peak_allocated_bytes"] == 30 * MIB
    assert readings["peak_reserved_bytes"] == 30 * MIB
    assert readings["process_bytes"] == (100 + 30) * MIB


def test_no_peak_is_read_while_the_gpu_is_still_working(cuda: FakeCuda, scripted: Scripted) -> None:
    scripted(steps_of(cuda, {"forward": MIB, "backward": MIB, "optimizer": MIB}))

    measure(case(timed_steps=1), cuda)

    assert cuda.reads_while_busy == 0


def test_host_bytes_are_the_peak_since_the_measurement_began(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    streams = PlainStreams()
    with use_streams(streams):
        streams.pinned(9 * MIB)  # taken and given back before

        def take(phase: str) -> None:
            if phase == "forward":
                streams.pinned(3 * MIB)

        scripted(take)
        assert measure(case(), cuda)["peak_host_bytes"] == 3 * MIB
        scripted(lambda _: None)
        assert measure(case(), cuda)["peak_host_bytes"] is None


def test_times_leave_out_the_warm_up_and_come_one_a_step(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    workload = scripted(lambda _: None)
    workload.seconds_a_step = 0.25

    readings = measure(case(steps=2, timed_steps=3), cuda)

    assert readings["step_times_s"] == [0.25, 0.25, 0.25]
    assert workload.steps == 2 + 1 + 3


def test_without_timed_steps_there_is_no_warm_up_either(cuda: FakeCuda, scripted: Scripted) -> None:
    workload = scripted(lambda _: None)

    readings = measure(case(steps=2, timed_steps=0), cuda)

    assert readings["step_times_s"] == []
    assert workload.steps == 2


def test_a_time_pass_that_does_not_fit_leaves_the_memory_pass_standing(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    workload = scripted(lambda _: None)

    def script(_phase: str) -> None:
        if workload.steps > 2:
            cuda.allocate(2 * GIB)

    workload.script = script

    readings = measure(case(steps=2, timed_steps=3), cuda)

    assert readings["status"] == "ok"
    assert readings["step_times_s"] == []
    assert "step_times_s: the time pass ran out of memory" in readings["notes"]


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_time_pass_forgives_want_of_memory_by_any_name_and_nothing_else(
    cuda: FakeCuda, scripted: Scripted, text: str, memory: bool
) -> None:
    workload = scripted(lambda _: None)

    def script(_phase: str) -> None:
        if workload.steps > 2:
            raise RuntimeError(text)

    workload.script = script

    if memory:
        readings = measure(case(steps=2, timed_steps=3), cuda)
        assert readings["notes"] == ["step_times_s: the time pass ran out of memory"]
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            measure(case(steps=2, timed_steps=3), cuda)


def test_pythons_cycle_collector_rests_while_it_measures(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    workload = scripted(lambda _: None)

    measure(case(timed_steps=1), cuda)

    assert workload.collecting == [False] * 4
    assert gc.isenabled()


def test_the_workload_is_built_on_the_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.device = torch.device("meta")
    workload = build_workload(case(), lambda _: None, cuda.device)
    seen: list[torch.device] = []

    def build(_case: Case, _mark: Callable[[str], None], device: torch.device) -> Any:
        seen.append(device)
        raise MembenchError("seen enough")

    monkeypatch.setattr(measure_module, "build_workload", build)
    with pytest.raises(MembenchError, match="seen enough"):
        measure(case(), cuda)

    assert seen == [cuda.device]
    assert {p.device for p in workload.model.parameters()} == {cuda.device}


@pytest.mark.parametrize("asked", [True, False])
def test_cudnn_benchmark_is_what_the_case_says(
    cuda: FakeCuda, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not asked)
    seen: list[bool] = []
    scripted(lambda _: seen.append(torch.backends.cudnn.benchmark))

    measure(case(cudnn_benchmark=asked), cuda)

    assert set(seen) == {asked}


# -- out of memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "where"),
    [
        ("model", "in model: "),
        ("forward", "in forward of step 1: "),
        ("backward", "in backward of step 1: "),
        ("optimizer", "in optimizer of step 1: "),
    ],
)
def test_out_of_memory_in_any_phase_is_a_result_that_names_it(
    cuda: FakeCuda, scripted: Scripted, phase: str, where: str
) -> None:
    scripted(steps_of(cuda, {phase: 2048 * MIB}))

    readings = measure(case(timed_steps=2), cuda)

    assert readings["status"] == "oom"
    assert where in readings["reason"]
    assert "tried to allocate 2048.00 MiB" in readings["reason"]
    assert "10 MiB allocated at the peak, 924 MiB capacity" in readings["reason"]
    assert readings["parameters"] == (None if phase == "model" else 7)
    assert readings["process_bytes"] is None
    assert readings["step_times_s"] == []


def test_out_of_memory_keeps_the_peaks_reached_so_far(cuda: FakeCuda, scripted: Scripted) -> None:
    def script(phase: str) -> None:
        if phase == "forward":
            cuda.allocate(60 * MIB)
        if phase == "backward":
            cuda.allocate(2 * GIB)

    scripted(script)

    readings = measure(case(), cuda)

    assert readings["peak_allocated_bytes"] == 70 * MIB
    assert readings["phases"]["forward"]["peak_allocated_bytes"] == 70 * MIB
    assert readings["phases"]["backward"]["peak_reserved_bytes"] == 70 * MIB
    assert "optimizer" not in readings["phases"]
    assert readings["parts"]["context_bytes"] == 100 * MIB


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA driver error: out of memory"),
        torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
    ],
    ids=str,
)
def test_whoever_says_it_got_no_memory_is_out_of_memory(
    cuda: FakeCuda, scripted: Scripted, error: RuntimeError
) -> None:
    def script(phase: str) -> None:
        if phase == "backward":
            raise error

    scripted(script)

    readings = measure(case(), cuda)

    assert readings["status"] == "oom"
    assert readings["reason"].startswith("out of memory in backward of step 1: ")
    assert str(error).splitlines()[0] in readings["reason"]
    assert "\n" not in readings["reason"]


NO_ENGINE = "GET was unable to find an engine to execute this computation"


def test_cudnn_finding_no_engine_after_a_refused_workspace_is_out_of_memory(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    def script(phase: str) -> None:
        if phase == "forward":
            try:
                cuda.allocate(2 * GIB)  # cuDNN's front end swallows the refusal
            except torch.OutOfMemoryError:
                raise RuntimeError(NO_ENGINE) from None

    scripted(script)

    assert measure(case(), cuda)["status"] == "oom"


def test_cudnn_finding_no_engine_for_another_reason_is_raised(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    cuda.ooms = 3  # of before this case

    def script(_phase: str) -> None:
        raise RuntimeError(NO_ENGINE)

    scripted(script)

    with pytest.raises(RuntimeError, match="unable to find an engine"):
        measure(case(), cuda)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_any_other_error_of_the_workload_is_raised(
    cuda: FakeCuda, scripted: Scripted, error: Exception
) -> None:
    def script(_phase: str) -> None:
        raise error

    scripted(script)

    with pytest.raises(type(error), match="memory") as caught:
        measure(case(), cuda)
    assert caught.value is error


# -- the process's memory -----------------------------------------------------------------------


def test_parts_add_up_to_the_process(cuda: FakeCuda, scripted: Scripted) -> None:
    scripted(steps_of(cuda, {"backward": 31 * MIB}))

    readings = measure(case(), cuda)

    # 10 + 31 MiB of tensors in segments of 2 MiB: 42 MiB reserved
    assert Parts(**readings["parts"]) == Parts(
        tensors_bytes=41 * MIB,
        allocator_bytes=1 * MIB,
        workspace_bytes=None,
        context_bytes=100 * MIB,
    )
    assert readings["process_bytes"] == (41 + 1 + 100) * MIB
    assert readings["capacity_bytes"] == (1024 - 100) * MIB
    assert readings["notes"] == []


def test_the_process_is_at_its_peak_even_where_the_cache_was_given_back(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    scripted(steps_of(cuda, {"backward": 90 * MIB}))
    release = steps_of(cuda, {"backward": 90 * MIB})

    def script(phase: str) -> None:
        release(phase)
        cuda.release_cache()

    scripted(script)

    readings = measure(case(), cuda)

    assert cuda.process_bytes == 110 * MIB
    assert readings["process_bytes"] == (100 + 100) * MIB


def hide_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_listed(_uuid: str, _pid: int, notes: list[str] | None = None) -> None:
        if notes is not None:
            notes.append("process memory: not listed")

    monkeypatch.setattr(nvml, "process_bytes", not_listed)


def test_in_a_container_the_devices_use_less_what_was_used_before_is_the_process(
    cuda: FakeCuda, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.others_bytes = 300 * MIB
    hide_process(monkeypatch)
    asked: list[str] = []

    def used(uuid: str, _notes: list[str] | None = None) -> int:
        asked.append(uuid)
        return cuda.others_bytes + cuda.process_bytes

    monkeypatch.setattr(nvml, "device_used_bytes", used)
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, used_before_bytes=300 * MIB)

    assert readings["process_bytes"] == 140 * MIB
    assert readings["notes"][0] == "process memory: not listed"
    assert "less what was in use before this process" in readings["notes"][1]
    assert asked == [UUID]


@pytest.mark.parametrize("before", [None, 300 * MIB])
def test_without_nvml_cuda_says_what_is_in_use_and_a_note_says_whose(
    cuda: FakeCuda, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, before: int | None
) -> None:
    cuda.others_bytes = 50 * MIB
    hide_process(monkeypatch)
    used = None if before else 1  # either reading may be the one that is missing
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: used)
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, used_before_bytes=before)

    assert readings["process_bytes"] == (50 + 100 + 40) * MIB
    assert "other processes' memory is among it" in readings["notes"][-1]


def test_a_process_of_our_number_that_holds_less_than_we_do_is_another(
    cuda: FakeCuda, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "process_bytes", lambda *_: 5 * MIB)
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: cuda.process_bytes + 7 * MIB)
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, used_before_bytes=7 * MIB)

    assert readings["process_bytes"] == 140 * MIB


def test_a_device_that_others_left_meanwhile_gives_no_negative_context(
    cuda: FakeCuda, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_process(monkeypatch)
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: cuda.process_bytes)
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, used_before_bytes=900 * MIB)

    assert readings["parts"]["context_bytes"] == 0
    assert readings["process_bytes"] == readings["peak_reserved_bytes"] == 40 * MIB


# -- a smaller card -----------------------------------------------------------------------------


def test_a_cap_is_what_the_allocator_may_hold_to_the_byte(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    cuda.total_bytes = 1_000_000_007
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, capacity_bytes=40 * MIB)

    assert cuda.limit_bytes == 40 * MIB
    assert readings["status"] == "ok"
    assert readings["capacity_bytes"] == 40 * MIB


def test_one_byte_less_than_the_case_needs_is_out_of_memory(
    cuda: FakeCuda, scripted: Scripted
) -> None:
    scripted(steps_of(cuda, {"backward": 30 * MIB}))

    readings = measure(case(), cuda, capacity_bytes=40 * MIB - 1)

    assert readings["status"] == "oom"
    assert "40 MiB capacity" in readings["reason"]
    assert readings["capacity_bytes"] == 40 * MIB - 1


def test_a_cap_above_what_is_free_is_refused(cuda: FakeCuda, scripted: Scripted) -> None:
    workload = scripted(lambda _: None)
    cuda.others_bytes = 100 * MIB

    with pytest.raises(MembenchError, match=r"900 MiB: this GPU has 824 MiB free of 1\.0 GiB"):
        measure(case(), cuda, capacity_bytes=900 * MIB)
    assert workload.steps == 0


@given(total=st.integers(2**20, 2**40), data=st.data())
def test_a_memory_fraction_gives_back_the_bytes_it_was_made_from(
    total: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(1, total))

    assert int(memory_fraction(capacity, total) * total) == capacity


# -- the real workload --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_real_workload_runs_through_its_phases(cuda: FakeCuda, mode: Any) -> None:
    small = case(network_options={"base_width": 4, "levels": 2}, mode=mode, timed_steps=1)

    readings = measure(small, cuda)

    assert readings["status"] == "ok"
    expected = ["model", "forward"] + ["backward", "optimizer"] * (mode == "train")
    assert list(readings["phases"]) == expected
    assert readings["parameters"] > 0
    assert cuda.timed == 1
