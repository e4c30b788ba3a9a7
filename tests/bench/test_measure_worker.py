"""The measuring child: what it says of itself, and what it does with a case and without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.cuda
import bench.measure
from bench import gpu as gpu_module
from bench import measure_worker, nvml
from bench.case import Case
from bench.cuda import TorchCuda
from bench.errors import MembenchError
from bench.gpu import GpuIdentity, gpu_identity
from bench.record import Environment, read_records
from bench.runner import Backend, Run, run_cases
from bench.units import MIB
from tests.bench.fake_cuda import UUID, FakeCuda

CASE = Case(network="fcn", variant="test", requested_shape=(8, 8, 8), shape=(8, 8, 8))
Served = Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Run ``main`` and return what it would have served."""

    def run() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        got: list[Any] = []
        monkeypatch.setattr(measure_worker, "serve", lambda *arguments: got.extend(arguments))
        measure_worker.main()
        return got[0], got[1]

    return run


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(bench.cuda, "TorchCuda", lambda: cuda)
    monkeypatch.setattr(nvml, "uuids", lambda: (UUID,))
    monkeypatch.setattr(nvml, "processes", lambda *_: ())
    monkeypatch.setattr(nvml, "device_used_bytes", lambda *_: 3 * MIB)
    monkeypatch.setattr(nvml, "driver_version", lambda *_: "580.159.04")
    return cuda


def test_the_hello_names_the_gpu_and_the_versions(with_gpu: FakeCuda, served: Served) -> None:
    hello, _ = served()

    assert hello["gpu"] == "NVIDIA Test"
    assert hello["gpu_uuid"] == UUID
    assert hello["memory_bytes"] == with_gpu.total_bytes
    assert hello["driver"] == "580.159.04"
    assert hello["torch"] == torch.__version__
    assert hello["compute_capability"] == "9.0"
    assert hello["cuda"] == torch.version.cuda
    assert "error" not in hello


def test_a_case_is_measured_with_what_was_used_before_and_the_cap(
    with_gpu: FakeCuda, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def measured(*positional: Any, **named: Any) -> dict[str, Any]:
        seen.extend([positional, named])
        return {"status": "ok"}

    monkeypatch.setattr(bench.measure, "measure", measured)
    _, handle = served()

    assert handle({"case": CASE.to_definition(), "capacity_bytes": 12}) == {"status": "ok"}
    assert seen == [(CASE, with_gpu), {"used_before_bytes": 3 * MIB, "capacity_bytes": 12}]


def test_a_gpu_that_nvml_does_not_list_has_no_figure_of_before(
    with_gpu: FakeCuda, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu.uuid = "GPU-5678"
    monkeypatch.setattr(bench.measure, "measure", lambda *_, **named: named)

    _, handle = served()

    assert handle({"case": CASE.to_definition()}) == {
        "used_before_bytes": None,
        "capacity_bytes": None,
    }


def test_nvml_is_asked_before_cuda_is_touched(
    with_gpu: FakeCuda, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def used(*_: Any) -> int:
        order.append("nvml")
        return 0

    def cuda() -> FakeCuda:
        order.append("cuda")
        return with_gpu

    monkeypatch.setattr(nvml, "device_used_bytes", used)
    monkeypatch.setattr(bench.cuda, "TorchCuda", cuda)

    served()

    assert order == ["nvml", "cuda"]


def test_without_a_gpu_hello_and_every_case_say_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hello, handle = served()

    assert hello["gpu"] is None
    assert "no CUDA GPU found" in hello["error"]
    with pytest.raises(MembenchError, match=r"no CUDA GPU found: .*; use --device predict"):
        handle({"case": CASE.to_definition()})


@pytest.mark.parametrize(
    ("cuda_build", "why"), [(None, "is built without CUDA"), ("13.0", "sees no NVIDIA GPU")]
)
def test_no_gpu_says_which_half_is_missing(
    monkeypatch: pytest.MonkeyPatch, cuda_build: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda_build)

    with pytest.raises(MembenchError, match=why):
        TorchCuda()


def test_a_real_child_on_a_machine_without_a_gpu_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is one

    with pytest.raises(MembenchError, match=r"^no CUDA GPU found: [^\n]*--device predict"):
        gpu_identity()


def test_the_identity_is_what_the_child_says(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class HelloOnly:
        def __init__(self, module: str) -> None:
            assert module == "bench.measure_worker"
            self.hello = {"gpu": "NVIDIA H200", "gpu_uuid": UUID, "memory_bytes": 150109945856}

        def close(self) -> None:
            closed.append("closed")

    monkeypatch.setattr(gpu_module, "Child", HelloOnly)

    assert gpu_identity() == GpuIdentity(
        name="NVIDIA H200", uuid=UUID, memory_bytes=150109945856, card="h200-141gb"
    )
    assert closed == ["closed"]


def test_a_measured_case_becomes_a_record_on_disk(tmp_path: Path) -> None:
    """Child, worker, readings, runner and record together; only the GPU is a stand-in."""
    options = {"base_width": 4, "levels": 2}
    small = dataclasses.replace(CASE, network_options=options, timed_steps=1)
    too_large = dataclasses.replace(small, variant="oom", batch_size=2)
    backend = Backend(
        evidence="measured",
        module="tests.bench.fake_measure_worker",
        card="test-1gb",
        workers=1,
        reuse=True,  # for real it is one process a case; torch's import takes seconds
    )
    path = tmp_path / "t.jsonl"

    run_cases(
        Run(
            cases=(small, too_large),
            backend=backend,
            environment=Environment(membench="0"),
            path=path,
        ),
        lambda _: None,
    )

    ok, oom = read_records(path)
    assert (ok.status, ok.reason, ok.evidence) == ("ok", "", "measured")
    assert (ok.environment.gpu, ok.environment.gpu_uuid) == ("NVIDIA Test", UUID)
    assert ok.process_bytes is not None
    assert list(ok.phases) == ["model", "forward", "backward", "optimizer"]
    assert len(ok.step_times_s) == 1
    assert ok.tracer is None
    assert (oom.status, oom.process_bytes) == ("oom", None)
    assert "out of memory in forward of step 1" in oom.reason


# -- torch's own CUDA interface, as this module calls it ------------------------------------------


class Properties:
    name = "NVIDIA H200"
    total_memory = 150109945856
    major, minor = 9, 0
    uuid = "d61d4b1c-0000-1111-2222-333344445555"


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> TorchCuda:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return TorchCuda()


def test_the_uuid_is_written_as_nvml_does(torch_cuda: TorchCuda) -> None:
    assert torch_cuda.uuid == "GPU-d61d4b1c-0000-1111-2222-333344445555"
    assert torch_cuda.device == torch.device("cuda:0")
    assert (torch_cuda.name, torch_cuda.compute_capability) == ("NVIDIA H200", "9.0")


def test_the_visible_gpus_are_all_that_torch_counts(
    torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one = {"name": "NVIDIA H200", "uuid": torch_cuda.uuid, "memory_bytes": 150109945856}

    assert torch_cuda.visible() == [one, one]


@pytest.mark.parametrize(
    ("method", "function", "arguments", "answer"),
    [
        ("memory_stats", "memory_stats", (), {"allocated_bytes.all.peak": 5}),
        ("reset_peak_memory_stats", "reset_peak_memory_stats", (), None),
        ("synchronize", "synchronize", (), None),
        ("mem_get_info", "mem_get_info", (), (1, 2)),
        ("set_memory_fraction", "set_per_process_memory_fraction", (0.5,), None),
    ],
)
def test_each_question_goes_to_torch_with_the_device(
    torch_cuda: TorchCuda,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    function: str,
    arguments: tuple[Any, ...],
    answer: Any,
) -> None:
    calls: list[Any] = []

    def answering(*given: Any) -> Any:
        calls.append(given)
        return answer

    monkeypatch.setattr(torch.cuda, function, answering)

    assert getattr(torch_cuda, method)(*arguments) == answer
    assert calls == [(*arguments, torch.device("cuda:0"))]


@pytest.mark.parametrize(
    "refusal",
    [
        "CUDA-capable device(s) is/are busy or unavailable",
        "unspecified launch failure: GPU is lost",
    ],
)
def test_a_gpu_that_is_lost_or_taken_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    def refuse(_: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {refusal}\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)

    with pytest.raises(MembenchError) as caught:
        TorchCuda()
    assert str(caught.value).startswith(f"the GPU cannot be used: CUDA error: {refusal}; look at")
    assert "\n" not in str(caught.value)


def test_time_is_between_two_events_and_waits_for_the_second(
    torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {sum('made' in line for line in log)}"
            log.append(f"{self.name} made")

        def record(self) -> None:
            log.append(f"{self.name} recorded")

        def synchronize(self) -> None:
            log.append(f"{self.name} waited for")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0 if end.name == "event 1" else -1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("device idle"))

    assert torch_cuda.time_s(lambda: log.append("run")) == 1.5
    assert log[2:] == [
        "device idle",
        "event 0 recorded",
        "run",
        "event 1 recorded",
        "event 1 waited for",
    ]
