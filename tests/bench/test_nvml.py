"""The seam to NVML, against a stand-in for the package ``pynvml``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench import nvml

MIB = 1 << 20


class NVMLError(Exception):
    """As pynvml's: what a call that NVML refuses raises."""


class FakeNvml(ModuleType):
    """Two GPUs; on the second runs process 42, and process 43 of unknown size."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.open = 0
        self.refuse: set[str] = set()
        self.as_bytes = False

    def _check(self, call: str) -> None:
        if call in self.refuse:
            raise NVMLError(f"{call} Not Supported")
        assert self.open == 1, "called outside nvmlInit and nvmlShutdown"

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.refuse:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._check("count")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        name = ("NVIDIA T1", "NVIDIA H200")[handle]
        return name.encode() if self.as_bytes else name

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ("GPU-aaaa-1", "GPU-bbbb-2")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        self._check("memory v2" if version else "memory v1")
        reserved = 0 if version == self.nvmlMemory_v2 else 600 * MIB
        return SimpleNamespace(total=(handle + 1) * 1000 * MIB, used=300 * MIB + reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        self._check("processes")
        if handle == 0:
            return []
        return [
            SimpleNamespace(pid=42, usedGpuMemory=200 * MIB),
            SimpleNamespace(pid=43, usedGpuMemory=None),
        ]

    def nvmlSystemGetDriverVersion(self) -> str:
        self._check("driver")
        return "580.65.06"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.fixture
def notes(fake: FakeNvml) -> Iterator[list[str]]:
    """A list for the notes; whatever a test reads, every session is closed again."""
    yield []
    assert fake.open == 0


def test_the_devices_are_those_that_nvml_lists(fake: FakeNvml) -> None:
    assert nvml.devices() == (
        nvml.Device(index=0, name="NVIDIA T1", uuid="GPU-aaaa-1", memory_bytes=1000 * MIB),
        nvml.Device(index=1, name="NVIDIA H200", uuid="GPU-bbbb-2", memory_bytes=2000 * MIB),
    )
    assert fake.open == 0


def test_names_given_as_bytes_are_read_as_text(fake: FakeNvml) -> None:
    fake.as_bytes = True

    assert nvml.devices()[0].name == "NVIDIA T1"


def test_a_gpu_without_memory_of_its_own_is_still_listed(fake: FakeNvml) -> None:
    fake.refuse = {"memory v1"}

    assert [device.memory_bytes for device in nvml.devices()] == [None, None]


@pytest.mark.parametrize("uuid", ["GPU-bbbb-2", "bbbb-2", "BBBB-2"])
@pytest.mark.usefixtures("fake")
def test_a_device_is_found_by_its_uuid_as_torch_and_as_nvml_write_it(uuid: str) -> None:
    device = nvml.find_device(uuid)

    assert device is not None
    assert device.index == 1


@pytest.mark.usefixtures("fake")
def test_an_unknown_uuid_is_no_device() -> None:
    assert nvml.find_device("cccc-3") is None


def test_a_process_has_the_memory_that_nvml_says(notes: list[str]) -> None:
    assert nvml.process_bytes("bbbb-2", 42, notes) == 200 * MIB
    assert notes == []


def test_a_process_of_unknown_size_is_none_with_the_reason(notes: list[str]) -> None:
    assert nvml.process_bytes("bbbb-2", 43, notes) is None
    assert notes == ["process memory: NVML lists process 43 without its memory"]


def test_a_process_that_nvml_does_not_see_is_none_with_the_reason(notes: list[str]) -> None:
    """As in a container, whose process numbers are not the host's."""
    assert nvml.process_bytes("bbbb-2", 7, notes) is None
    assert len(notes) == 1
    assert "NVML lists 2 processes and process 7 is not one of them" in notes[0]
    assert "container" in notes[0]


def best(notes: list[str], pid: int, reserved_mib: int, before_mib: int | None) -> int | None:
    return nvml.best_process_bytes(
        "bbbb-2",
        pid,
        reserved_bytes=reserved_mib * MIB,
        used_before_bytes=None if before_mib is None else before_mib * MIB,
        notes=notes,
    )


LESS_BEFORE = "process_bytes: the device's memory in use less what was in use before this process"


@pytest.mark.parametrize("reserved_mib", [150, 200], ids=["less", "equal"])
def test_the_best_reading_of_a_process_is_its_own(notes: list[str], reserved_mib: int) -> None:
    assert best(notes, 42, reserved_mib, 100) == 200 * MIB
    assert notes == []


def test_a_process_that_holds_less_than_our_allocator_is_not_ours(notes: list[str]) -> None:
    """The device has 300 MiB in use, 120 of them before."""
    assert best(notes, 42, 201, 120) == 180 * MIB
    assert notes == [LESS_BEFORE]


def test_a_process_that_nvml_hides_is_the_devices_use_less_that_before(notes: list[str]) -> None:
    assert best(notes, 7, 10, 120) == 180 * MIB
    assert "process 7 is not one of them" in notes[0]
    assert notes[1:] == [LESS_BEFORE]


def test_without_what_was_used_before_there_is_no_best_reading(notes: list[str]) -> None:
    assert best(notes, 7, 10, None) is None
    assert LESS_BEFORE not in notes


def test_without_the_devices_use_there_is_no_best_reading(fake: FakeNvml, notes: list[str]) -> None:
    fake.refuse = {"processes", "memory v1", "memory v2"}

    assert best(notes, 42, 10, 120) is None
    assert [note.split(":")[0] for note in notes] == ["process memory", "device memory"]


@pytest.mark.usefixtures("fake")
def test_the_other_processes_are_all_but_ones_own() -> None:
    assert nvml.other_processes("bbbb-2", 42) == (nvml.ProcessUse(pid=43, used_bytes=None),)
    assert nvml.other_processes("aaaa-1", 42) == ()


def test_the_device_figure_leaves_out_the_drivers_reserve(notes: list[str]) -> None:
    assert nvml.device_used_bytes("bbbb-2", notes) == 300 * MIB
    assert notes == []


def test_an_old_drivers_device_figure_says_that_it_holds_the_reserve(
    fake: FakeNvml, notes: list[str]
) -> None:
    fake.refuse = {"memory v2"}

    assert nvml.device_used_bytes("bbbb-2", notes) == 900 * MIB
    assert notes == ["device memory: used includes the driver's reserve (old driver)"]


@pytest.mark.usefixtures("fake")
def test_the_driver_has_a_version() -> None:
    assert nvml.driver_version() == "580.65.06"


READINGS: dict[str, Any] = {
    "GPUs": lambda notes: nvml.devices(notes) or None,
    "driver version": nvml.driver_version,
    "process memory": lambda notes: nvml.process_bytes("bbbb-2", 42, notes),
    "other processes": lambda notes: nvml.other_processes("bbbb-2", 42, notes),
    "processes": lambda notes: nvml.processes("bbbb-2", notes),
    "device memory": lambda notes: nvml.device_used_bytes("bbbb-2", notes),
}


@pytest.mark.parametrize("reading", READINGS)
def test_without_a_driver_a_reading_is_none_with_the_reason(
    reading: str, fake: FakeNvml, notes: list[str]
) -> None:
    fake.refuse = {"nvmlInit"}

    assert READINGS[reading](notes) is None
    assert notes == [f"{reading}: NVML says: Driver Not Loaded"]
    assert READINGS[reading](None) is None


@pytest.mark.parametrize("reading", READINGS)
def test_without_the_package_a_reading_is_none_with_the_reason(
    reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    notes: list[str] = []

    assert READINGS[reading](notes) is None
    assert notes == [f"{reading}: the Python package nvidia-ml-py is not installed"]


@pytest.mark.parametrize(
    ("call", "reading"),
    [
        ("count", "GPUs"),
        ("driver", "driver version"),
        ("processes", "process memory"),
        ("processes", "other processes"),
        ("memory v1", "device memory"),
    ],
)
def test_a_refused_call_is_none_and_closes_the_session(
    call: str, reading: str, fake: FakeNvml, notes: list[str]
) -> None:
    fake.refuse = {call, "memory v2"}

    assert READINGS[reading](notes) is None
    assert notes[-1] == f"{reading}: NVML says: {call} Not Supported"
    assert fake.open == 0


def test_a_gpu_that_nvml_does_not_list_is_named(notes: list[str]) -> None:
    assert nvml.device_used_bytes("cccc-3", notes) is None
    assert notes == ["device memory: NVML lists no GPU cccc-3"]


@pytest.mark.usefixtures("fake")
def test_the_package_is_installed_when_it_can_be_found() -> None:
    assert nvml.installed()


def test_the_package_is_not_installed_when_it_cannot_be_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(sys, "path", [])

    assert not nvml.installed()


# -- slices, and a GPU that is lost ----------------------------------------------------------------


class Sliced(FakeNvml):
    """The second GPU is cut into two slices, in the first and the third of four places."""

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        if handle == 0:
            raise NVMLError("Not Supported")
        return 4

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, place: int) -> int:
        assert handle == 1
        if place not in (0, 2):
            raise NVMLError("Not Found")
        return 100 + place

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"MIG-cccc-{handle}" if handle >= 100 else super().nvmlDeviceGetUUID(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        if handle >= 100:
            return SimpleNamespace(total=500 * MIB, used=handle * MIB)
        return super().nvmlDeviceGetMemoryInfo(handle, version)


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> Sliced:
    module = Sliced()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.mark.usefixtures("sliced")
def test_all_that_a_case_can_run_on_are_gpus_and_slices() -> None:
    assert nvml.uuids() == ("GPU-aaaa-1", "GPU-bbbb-2", "MIG-cccc-100", "MIG-cccc-102")


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("uuid", ["MIG-cccc-102", "GPU-cccc-102", "cccc-102", "mig-CCCC-102"])
def test_a_slice_is_read_by_its_uuid_however_it_is_written(uuid: str) -> None:
    """torch writes a slice's UUID bare, and ``bench.cuda`` puts ``GPU-`` in front of a bare one."""
    assert nvml.device_used_bytes(uuid) == 102 * MIB


class PartlyLost(FakeNvml):
    """The first GPU has fallen off the bus."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 0:
            raise NVMLError("GPU is lost")
        return index


def test_a_lost_gpu_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", PartlyLost())
    notes: list[str] = []

    assert [device.uuid for device in nvml.devices(notes)] == ["GPU-bbbb-2"]
    assert notes == ["GPUs: GPU 0: NVML says: GPU is lost"]
    assert nvml.device_used_bytes("bbbb-2") == 300 * MIB
    assert nvml.device_used_bytes("aaaa-1", notes) is None
    assert notes[-1] == "device memory: NVML lists no GPU aaaa-1; GPU 0: GPU is lost"
