"""Other processes on the GPU, a GPU that is lost, a context that is poisoned: in real processes.

Children and processes are real; the driver is a stand-in that all of them share.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bench.gpu
from bench import backends, nvml
from bench.case import Case
from bench.child import Child
from bench.cli import app
from bench.errors import MembenchError
from bench.neighbours import IDLE_BYTES, Occupants, Watch, look
from bench.nvml import ProcessUse
from bench.predict.cards import find_card
from bench.record import Environment, Record, read_records
from bench.runner import Backend, Run, run_cases
from tests.bench.fake_gpu_worker import GIB, UUID

DRIVER = Path(__file__).parent / "fake_driver"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in reads /proc")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An idle GPU that this process and its children see alike."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    state = {"uuids": [UUID], "idle": 5 * 2**20, "uses": []}
    path = tmp_path / "driver.json"
    path.write_text(json.dumps(state))
    monkeypatch.setenv("FAKE_NVML", str(path))
    monkeypatch.setenv("PYTHONPATH", str(DRIVER))
    monkeypatch.syspath_prepend(str(DRIVER))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    pynvml = importlib.import_module("pynvml")
    assert Path(str(pynvml.__file__)).parent == DRIVER
    yield pynvml
    monkeypatch.delitem(sys.modules, "pynvml")


@pytest.fixture
def stranger(driver: Any) -> Iterator[Any]:
    """Call it: a process that lives until the test ends comes onto the GPU."""
    started: list[subprocess.Popen[bytes]] = []

    def come(size: int = 2 * GIB, number: int | None = None, hidden: bool = False) -> int:
        process = subprocess.Popen(["sleep", "100"])
        started.append(process)
        number = process.pid if number is None else number
        driver.change(use={"pid": number, "bytes": size, "owner": process.pid, "hidden": hidden})
        return number

    yield come
    for process in started:
        process.kill()
        process.wait()


def measured(tmp_path: Path, *variants: str, exclusive: bool = False) -> list[Record]:
    shape = (8, 8, 8)
    plan = Run(
        cases=[
            Case(network="fcn", variant=v, requested_shape=shape, shape=shape, time_limit_s=60.0)
            for v in variants
        ],
        backend=Backend(
            evidence="measured",
            module="tests.bench.fake_gpu_worker",
            card="test-64gb",
            workers=1,
            reuse=False,  # as every measurement
            exclusive=exclusive,
        ),
        environment=Environment(membench="test"),
        path=tmp_path / "s.jsonl",
    )
    records = run_cases(plan, lambda _: None)
    assert list(read_records(plan.path)) == records
    return records


def others(record: Record) -> list[str]:
    """What the record notes of other processes, without the words that all such notes share."""
    notes = record.environment.notes
    return [n.removeprefix("other processes: ") for n in notes if n.startswith("other processes")]


@pytest.mark.usefixtures("driver")
def test_a_case_alone_on_its_gpu_has_no_note_of_others(tmp_path: Path) -> None:
    (record,) = measured(tmp_path, "a", exclusive=True)

    assert (record.status, others(record)) == ("ok", [])
    assert record.environment.gpu_uuid == UUID


def test_a_process_that_was_there_before_is_noted_with_its_size(
    tmp_path: Path, stranger: Any
) -> None:
    pid = stranger(2 * GIB)

    (record,) = measured(tmp_path, "a")

    assert record.status == "ok"
    assert others(record) == [f"on the GPU before the case: process {pid} (2.0 GiB)"]


def test_with_exclusive_a_case_does_not_begin_beside_another_process(
    tmp_path: Path, stranger: Any
) -> None:
    pid = stranger(2 * GIB)

    (record,) = measured(tmp_path, "SIGSEGV", exclusive=True)  # it would crash, if it began

    assert record.status == "failed"
    assert record.reason == f"--exclusive: on the GPU before the case: process {pid} (2.0 GiB)"


@pytest.mark.usefixtures("driver")
def test_a_process_that_comes_and_stays_is_noted_and_there_for_the_next_case(
    tmp_path: Path,
) -> None:
    first, second = measured(tmp_path, "intruder", "a")

    assert others(first) == ["came while the case ran: process 4242 (7.0 GiB)"]
    assert others(second) == ["on the GPU before the case: process 4242 (7.0 GiB)"]
    assert (first.status, second.status) == ("ok", "ok")


@pytest.mark.usefixtures("driver")
def test_a_process_that_comes_and_goes_within_the_case_is_seen(tmp_path: Path) -> None:
    (record,) = measured(tmp_path, "passer-by")

    assert others(record) == ["came while the case ran: process 4242 (7.0 GiB)"]


@pytest.mark.usefixtures("driver")
def test_with_exclusive_a_process_that_comes_midway_fails_the_case_and_keeps_its_phases(
    tmp_path: Path,
) -> None:
    before, during, after = measured(tmp_path, "a", "intruder", "a2", exclusive=True)

    assert (before.status, during.status, after.status) == ("ok", "failed", "failed")
    assert during.reason == (
        "--exclusive: came onto the GPU while the case ran: process 4242 (7.0 GiB)"
    )
    assert during.phases["forward"].peak_allocated_bytes == GIB
    assert during.process_bytes is None
    assert "before the case: process 4242" in after.reason


# -- containers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("how", ["renumbered", "hidden"])
def test_in_a_container_our_own_process_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("FAKE_CONTAINER", how)

    (record,) = measured(tmp_path, "a", exclusive=True)

    assert record.status == "ok"
    assert len(others(record)) == 1
    assert "NVML does not list ours" in others(record)[0]
    assert "device's memory in use before and after" in others(record)[0]


@pytest.mark.usefixtures("driver")
def test_in_a_container_one_process_more_than_ours_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CONTAINER", "renumbered")

    (record,) = measured(tmp_path, "passer-by")

    assert "process 4242 (7.0 GiB)" in others(record)[1]
    assert others(record)[1].endswith(", one of them our own")


@pytest.mark.usefixtures("driver")
def test_where_no_process_is_listed_the_devices_use_tells_of_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CONTAINER", "hidden")

    first, second = measured(tmp_path, "intruder-hidden", "a")

    assert others(first)[1] == (
        "came while the case ran: 7.0 GiB more in use after the case than before it"
    )
    # 7 GiB and the 5 MiB that the idle device has in use
    assert "are in use by processes that NVML does not list" in others(second)[1]


def test_a_process_under_our_number_before_we_came_is_another(stranger: Any) -> None:
    """The worst that a container's numbers can do."""
    stranger(GIB, number=1234)
    stranger(3 * GIB, number=77)
    watch = Watch(UUID, 1234, look(UUID), interval_s=0.01)
    stranger(5 * GIB, number=79)

    assert watch.end() == "process 79 (5.0 GiB)"
    assert not watch.own_listed


@pytest.mark.parametrize(("used", "said"), [(IDLE_BYTES, False), (IDLE_BYTES + 1, True)])
def test_memory_in_use_by_nobody_listed_counts_above_what_an_idle_device_has(
    used: int, said: bool
) -> None:
    assert bool(Occupants(processes=(), used_bytes=used).describe()) is said


def test_who_is_on_a_gpu_goes_through_json() -> None:
    listed = Occupants(
        processes=(ProcessUse(pid=1, used_bytes=None),), used_bytes=None, notes=("why",)
    )
    for occupants in (listed, Occupants(processes=None, used_bytes=3)):
        assert Occupants.from_dict(json.loads(json.dumps(occupants.to_dict()))) == occupants
    assert listed.describe() == "process 1 (of unknown size)"


# -- no NVML, and a GPU that is lost --------------------------------------------------------------


def test_without_nvml_a_case_is_measured_and_says_that_others_are_not_known(
    tmp_path: Path, driver: Any
) -> None:
    driver.change(lost=True)

    (record,) = measured(tmp_path, "a")

    assert record.status == "ok"
    assert others(record)[0].startswith("not known: processes: NVML says: GPU is lost")


def test_without_nvml_exclusive_refuses_what_it_cannot_know(tmp_path: Path, driver: Any) -> None:
    driver.change(lost=True)

    (record,) = measured(tmp_path, "a", exclusive=True)

    assert record.status == "failed"
    assert "cannot tell who else is on the GPU: processes: NVML says: GPU is lost" in record.reason


@pytest.mark.usefixtures("driver")
def test_a_gpu_lost_while_a_case_runs_costs_that_case_and_the_run_goes_on(tmp_path: Path) -> None:
    before, lost, after = measured(tmp_path, "a", "lost", "a2")

    assert (before.status, lost.status) == ("ok", "failed")
    assert lost.reason.startswith("RuntimeError: CUDA error: the GPU is lost")
    assert after.status == "ok"
    assert others(after)[0].startswith("not known: ")


def test_a_refused_list_of_processes_leaves_the_devices_use(tmp_path: Path, driver: Any) -> None:
    driver.change(no_processes=True)

    (record,) = measured(tmp_path, "intruder")

    assert "(processes: NVML says: Not Supported)" in others(record)[0]
    assert "7.0 GiB more in use after the case than before it" in others(record)[1]


# -- what dies ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("driver")
def test_a_poisoned_context_fails_its_case_and_the_next_has_a_process_of_its_own(
    tmp_path: Path,
) -> None:
    poisoned, after = measured(tmp_path, "poison", "a")

    assert poisoned.status == "failed"
    assert "an illegal memory access was encountered" in poisoned.reason
    assert after.status == "ok"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_measured_case_that_dies_leaves_the_gpu_to_the_next(tmp_path: Path, name: str) -> None:
    died, after = measured(tmp_path, name, "a", exclusive=True)

    assert (died.status, died.reason) == ("failed", f"process killed by {name}")
    assert after.status == "ok"


# -- before anything starts ------------------------------------------------------------------------


@pytest.fixture
def real_start(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``membench run --device cuda`` on the stand-in."""
    monkeypatch.setattr(bench.gpu, "Child", lambda _module: Child("tests.bench.fake_gpu_worker"))
    monkeypatch.setattr("bench.cli.run.use_cuda", lambda _device: True)

    def backend(**fields: Any) -> Backend:
        return Backend(**{**fields, "module": "tests.bench.fake_gpu_worker"})

    monkeypatch.setattr(backends, "Backend", backend)
    return driver


SUITE = """\
title: A small suite
matrix:
  networks:
    - {name: fcn, variant: small, widths: [4, 8]}
  shapes: [16x16x16]
"""


def run(tmp_path: Path, *options: str) -> Any:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE)
    results = str(tmp_path / "results")
    return CliRunner().invoke(app, ["run", str(suite), "--results", results, *options])


@pytest.mark.usefixtures("real_start")
def test_run_exclusive_on_a_free_gpu_measures(tmp_path: Path) -> None:
    result = run(tmp_path, "--exclusive")

    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr


@pytest.mark.usefixtures("real_start")
def test_run_exclusive_on_a_shared_gpu_is_one_line_and_nothing_starts(
    tmp_path: Path, stranger: Any
) -> None:
    pid = stranger(2 * GIB)

    result = run(tmp_path, "--exclusive")

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"is not ours alone: process {pid} (2.0 GiB)" in result.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("real_start")
def test_run_on_a_shared_gpu_warns_and_measures(tmp_path: Path, stranger: Any) -> None:
    pid = stranger(2 * GIB)

    result = run(tmp_path)

    assert result.exit_code == 0
    line = f"warning: NVIDIA Test is not ours alone: process {pid} (2.0 GiB)"
    assert result.stderr.splitlines()[0] == line
    (record,) = read_records(next((tmp_path / "results").rglob("*.measured.jsonl")))
    assert others(record) == [f"on the GPU before the case: process {pid} (2.0 GiB)"]


def test_run_exclusive_without_nvml_is_refused(tmp_path: Path, real_start: Any) -> None:
    real_start.change(lost=True)

    result = run(tmp_path, "--exclusive")

    assert result.exit_code == 2
    assert "cannot tell who else is on NVIDIA Test" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("driver")
def test_run_exclusive_of_a_prediction_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "--exclusive", "--device", "predict", "--card", "v100-32gb")

    assert result.exit_code == 2
    assert "--exclusive: a prediction runs on no GPU" in result.stderr


# -- a smaller card --------------------------------------------------------------------------------


def test_a_cap_is_the_cards_memory_less_its_context_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = find_card("v100-32gb")
    monkeypatch.setattr(bench.gpu, "gpu_identity", lambda: identity("h200-141gb", 140 * GIB))

    backend = backends.measured_backend(card)

    assert backend.request == {"capacity_bytes": card.memory_bytes - card.context_bytes}
    assert (backend.evidence, backend.card, backend.capped_to) == (
        "measured",
        "h200-141gb",
        "v100-32gb",
    )


def identity(card: str, memory_bytes: int) -> bench.gpu.GpuIdentity:
    alone = Occupants(processes=(), used_bytes=0)
    return bench.gpu.GpuIdentity(
        name="NVIDIA Test", uuid=UUID, memory_bytes=memory_bytes, card=card, occupants=alone
    )


def test_a_card_larger_than_the_gpu_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.cli.run.use_cuda", lambda _device: True)
    monkeypatch.setattr(bench.gpu, "gpu_identity", lambda: identity("t4-16gb", 15 * GIB))

    result = run(tmp_path, "--card", "v100-32gb")

    assert result.exit_code == 2
    assert "this GPU (NVIDIA Test) has 15.0 GiB; choose a smaller card" in result.stderr
    assert not (tmp_path / "results").exists()


def test_the_gpus_own_card_caps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gpu, "gpu_identity", lambda: identity("v100-32gb", 31 * GIB))

    backend = backends.measured_backend(find_card("v100-32gb"))

    assert (backend.request, backend.capped_to) == ({}, None)


# -- several GPUs ----------------------------------------------------------------------------------

SECOND = "GPU-bbbb-2"


@pytest.fixture
def two_gpus(real_start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two of one model, and one of another, which is left out."""
    real_start.change(uuids=[UUID, SECOND, "GPU-cccc-3"])
    gpus = [
        {"name": name, "uuid": uuid, "memory_bytes": 2**36}
        for name, uuid in (("NVIDIA Test", UUID), ("NVIDIA Test", SECOND), ("Tesla", "GPU-cccc-3"))
    ]
    monkeypatch.setenv("FAKE_GPUS", json.dumps(gpus))
    return real_start


def on_all_gpus(tmp_path: Path, *variants: str) -> list[Record]:
    shape = (8, 8, 8)
    plan = Run(
        cases=[
            Case(network="fcn", variant=v, requested_shape=shape, shape=shape) for v in variants
        ],
        backend=backends.measured_backend(),
        environment=Environment(membench="test"),
        path=tmp_path / "s.jsonl",
    )
    return run_cases(plan, lambda _: None)


@pytest.mark.usefixtures("two_gpus")
def test_cases_run_on_all_gpus_of_one_model_at_once_and_come_in_the_suites_order(
    tmp_path: Path,
) -> None:
    begun = time.monotonic()
    records = on_all_gpus(tmp_path, "sleep4", "sleep3.9", "a", "b")
    took_s = time.monotonic() - begun

    assert [r.variant for r in records] == ["sleep4", "sleep3.9", "a", "b"]
    assert {r.environment.gpu_uuid for r in records[:2]} == {UUID, SECOND}
    assert {r.status for r in records} == {"ok"}
    assert {others(r) == [] for r in records} == {True}  # neither sees the other's process
    assert took_s < 7.9  # one after the other, the first two alone sleep that long
    note = "step_times_s: 2 GPUs of the machine ran cases at the same time"
    assert all(note in r.environment.notes for r in records)


@pytest.mark.usefixtures("two_gpus")
def test_a_crash_on_one_gpu_does_not_disturb_the_other(tmp_path: Path) -> None:
    records = on_all_gpus(tmp_path, "sleep1", "SIGSEGV", "SIGKILL", "a")

    assert [r.status for r in records] == ["ok", "failed", "failed", "ok"]
    assert records[0].environment.gpu_uuid != records[1].environment.gpu_uuid


@pytest.mark.usefixtures("two_gpus")
def test_gpus_of_another_model_are_left_out_and_named(tmp_path: Path) -> None:
    result = run(tmp_path)

    assert result.exit_code == 0
    assert "GPUs of other models are left out: Tesla" in result.stderr.splitlines()[0]


def test_exclusive_looks_at_every_gpu_that_would_be_used(tmp_path: Path, two_gpus: Any) -> None:
    owner = os.getpid()
    use = {"pid": 4242, "bytes": GIB, "owner": owner, "hidden": False}
    two_gpus.change(use={**use, "uuid": "GPU-cccc-3"})
    assert run(tmp_path, "--exclusive").exit_code == 0

    two_gpus.change(use={**use, "uuid": SECOND})
    result = run(tmp_path, "--exclusive")

    assert result.exit_code == 2
    assert f"NVIDIA Test ({SECOND}) is not ours alone: process 4242 (1.0 GiB)" in result.stderr


@pytest.mark.usefixtures("real_start")
def test_a_single_gpu_is_left_to_the_environment() -> None:
    backend = backends.measured_backend()

    assert (backend.workers, backend.worker_environments, backend.notes) == (1, (), ())


# -- the driver's list -----------------------------------------------------------------------------


@pytest.mark.usefixtures("driver")
def test_an_unlisted_gpu_is_not_known_with_the_reason() -> None:
    occupants = look("GPU-ffff")

    assert not occupants.known
    assert occupants.notes[0] == "processes: NVML lists no GPU GPU-ffff"
    assert nvml.uuids() == (UUID,)
    with pytest.raises(MembenchError, match="NVML lists no GPU"):
        backends._shared(_with(occupants), exclusive=True)


def _with(occupants: Occupants) -> bench.gpu.GpuIdentity:
    return bench.gpu.GpuIdentity(
        name="NVIDIA Test", uuid=UUID, memory_bytes=1, card="t-1gb", occupants=occupants
    )
