"""``membench doctor``: what is found, missing or broken, and whether anything can run."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench import doctor as diagnosis
from bench import nvml
from bench.cli import doctor as command
from bench.doctor import Check, Diagnosis, diagnose
from bench.errors import MembenchError
from bench.predict import cards
from bench.predict.shim import ShimUnavailable, TorchBuild

MIB = 1 << 20
app = typer.Typer()
app.command()(command.doctor)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "MEMBENCH_TRACER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEMBENCH_CARDS", str(tmp_path / "cards"))
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: ())
    monkeypatch.setattr(nvml, "installed", lambda: True)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials that pass without a process; returns the tracers that were tried."""
    tried: list[str] = []

    def trial(tracer: str) -> Check:
        tried.append(tracer)
        return Check(name="trial", state="ok", found="tried")

    monkeypatch.setattr(diagnosis, "_trial", trial)
    monkeypatch.setattr(diagnosis, "choose_tracer", lambda: ("cuda-shim", "no GPU; shim at /s"))
    return tried


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the version and CUDA of the installed torch."""

    def install(version: str | None, cuda: str | None = None) -> None:
        build = TorchBuild(Path("/torch"), version, "f00", cuda, None) if version else None
        monkeypatch.setattr(diagnosis, "torch_build", lambda: build)
        monkeypatch.setattr("bench.predict.shim.torch_build", lambda: build)

    return install


def found(name: str) -> Check:
    (check,) = (check for check in diagnose().checks if check.name == name)
    return check


def raises(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


def test_this_machine_is_really_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU here, so that it needs no compiler; the shim's own trial is in test_shim."""
    monkeypatch.setenv("MEMBENCH_TRACER", "cpu")
    monkeypatch.setenv("MEMBENCH_CACHE", str(tmp_path))

    result = CliRunner().invoke(app, ["--json"])

    assert result.exit_code == 0
    told = json.loads(result.stdout)
    checks = {check["name"]: check for check in told["checks"]}
    assert told["can_predict"] is True
    assert checks["trial"] == {
        "name": "trial",
        "state": "ok",
        "found": "a training step in bfloat16 on fake cpu",
        "advice": "",
    }
    assert checks["tracer"]["state"] == "problem"  # never silently
    assert checks["tracer"]["found"] == "cpu: MEMBENCH_TRACER=cpu"
    assert checks["cache folder"]["found"] == str(tmp_path)


def test_a_trial_that_fails_is_told_in_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "choose_tracer", lambda: ("cuda-shim", "because"))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")

    diagnosed = diagnose()

    assert diagnosed.checks[-4].name == "trial"
    assert diagnosed.checks[-4].state == "problem"
    assert "ShimUnavailable: no C++ compiler" in diagnosed.checks[-4].found
    assert not diagnosed.can_predict


@pytest.mark.parametrize(
    ("stderr", "says"), [("", "exit status -11 without a word"), ("a\nlast\n", "last")]
)
def test_a_trial_that_crashes_is_told(
    stderr: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], -11, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    check = diagnosis._trial("cuda-shim")

    assert (check.state, check.found) == ("problem", says)
    assert "MEMBENCH_TRACER=cpu" in check.advice


def test_a_trial_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hang)

    assert diagnosis._trial("cuda").found == "no answer in 300 s"


@pytest.mark.usefixtures("trials")
def test_without_a_gpu_cases_can_be_predicted(torch: Callable[..., None]) -> None:
    torch("2.13.0+cpu")

    result = CliRunner().invoke(app)

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "torch: ok: 2.13.0+cpu in /torch"
    assert lines[1].startswith("CUDA: missing: torch is built without CUDA; predictions need none")
    assert lines[2].startswith("GPU: missing: torch 2.13.0+cpu is built without CUDA; ")
    assert "tracer: ok: cuda-shim: no GPU; shim at /s" in lines
    assert lines[-1] == "cases can be predicted here, not measured"


def test_with_a_gpu_cases_can_be_measured(
    torch: Callable[..., None], trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = nvml.Device(index=0, name="NVIDIA H200", uuid="GPU-1", memory_bytes=143_771 * MIB)
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: (device,))
    monkeypatch.setattr(nvml, "driver_version", lambda _notes=None: "580.1")
    monkeypatch.setattr(diagnosis, "choose_tracer", lambda: ("cuda", "NVIDIA H200"))
    torch("2.11.0+cu130", "13.0")

    diagnosed = diagnose()

    assert (diagnosed.can_predict, diagnosed.can_measure) == (True, True)
    assert trials == ["cuda"]
    checks = {check.name: check for check in diagnosed.checks}
    assert checks["CUDA"].found == "torch is built for CUDA 13.0"
    assert checks["GPU"].found == "NVIDIA H200, 140.4 GiB, GPU-1, card h200-141gb"
    assert checks["NVML"].found == "driver 580.1"
    assert command._verdict(diagnosed) == "cases can be measured here and predicted"


@pytest.mark.usefixtures("trials")
def test_a_gpu_that_torch_cannot_use_is_a_problem(
    torch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = nvml.Device(index=0, name="NVIDIA GB10", uuid="GPU-1", memory_bytes=None)
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: (device,))
    torch("2.13.0+cpu")

    check = found("GPU")

    assert check.state == "problem"
    assert check.found.endswith("built without CUDA; the driver lists NVIDIA GB10, GPU-1")
    assert not diagnose().can_measure


@pytest.mark.usefixtures("trials")
def test_a_gpu_known_by_its_device_file_alone_is_named(
    torch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch("2.13.0+cu130", "13.0")
    monkeypatch.setattr(diagnosis, "gpu_visible", lambda: (True, "/dev/nvidia0"))

    assert found("GPU") == Check(name="GPU", state="ok", found="/dev/nvidia0")


@pytest.mark.parametrize(
    ("version", "state", "says"),
    [
        (None, "missing", "not installed"),
        ("2.10.1+cu128", "problem", "2.10.1+cu128 is older than 2.11"),
        ("nonsense", "problem", "nonsense is older than 2.11"),
    ],
)
def test_without_a_usable_torch_nothing_can_run(
    version: str | None, state: str, says: str, torch: Callable[..., None]
) -> None:
    torch(version, "12.8")

    result = CliRunner().invoke(app)

    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"torch: {state}: {says}; nothing runs without it")
    assert "tracer: missing: no usable torch; put torch right first" in lines
    assert lines[-1] == "no case can be run here"


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1", "3.0.0"])
@pytest.mark.usefixtures("trials")
def test_the_oldest_torch_that_will_do_is_2_11(version: str, torch: Callable[..., None]) -> None:
    torch(version)

    assert found("torch").state == "ok"


@pytest.mark.usefixtures("trials")
def test_a_missing_compiler_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "find_compiler", raises(ShimUnavailable("no compiler")))

    check = found("compiler")

    assert (check.state, check.found) == ("missing", "no compiler")
    assert "install g++" in check.advice


def test_a_bad_tracer_variable_is_a_problem_and_nothing_is_tried(
    trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "choose_tracer", raises(MembenchError("not a tracer")))

    diagnosed = diagnose()

    assert trials == []
    assert not diagnosed.can_predict
    assert (
        Check(
            name="tracer",
            state="problem",
            found="not a tracer",
            advice="predictions end with this error",
        )
        in diagnosed.checks
    )


@pytest.mark.usefixtures("trials")
def test_missing_nvml_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver_version(notes: list[str]) -> None:
        notes.append("driver version: NVML says: Driver Not Loaded")

    monkeypatch.setattr(nvml, "driver_version", driver_version)

    assert found("NVML").found == "NVML says: Driver Not Loaded"
    monkeypatch.setattr(nvml, "installed", lambda: False)
    assert found("NVML").advice == "pip install nvidia-ml-py"


@pytest.mark.usefixtures("trials")
def test_missing_triton_is_not_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", raises(metadata.PackageNotFoundError("triton")))

    assert found("Triton").state == "missing"
    assert diagnose().can_predict


@pytest.mark.usefixtures("trials")
def test_an_unwritable_cache_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMBENCH_CACHE", str(tmp_path / "file/cache"))

    check = found("cache folder")

    assert check.state == "problem"
    assert check.found.startswith(f"{tmp_path}/file/cache cannot be written; ")


@pytest.mark.usefixtures("trials")
def test_own_cards_are_counted_and_a_broken_one_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cards"
    shipped = list(Path(cards.__file__).parent.glob("*.json"))
    assert found("cards folder").found == f"{folder}: 0 of {len(shipped)} cards"
    folder.mkdir()
    (folder / "mine-8gb.json").write_text("{}")
    device = nvml.Device(index=0, name="NVIDIA H200", uuid="GPU-1", memory_bytes=1 << 37)
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: (device,))

    check = found("cards folder")

    assert check.state == "problem"
    assert "mine-8gb.json: field 'name'" in check.found
    assert found("GPU").found.endswith("NVIDIA H200, 128.0 GiB, GPU-1")  # without its card


def test_on_a_terminal_it_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (
        Check(name="torch", state="ok", found="[2.13]"),
        Check(name="GPU", state="missing", found="none", advice="buy one"),
    )
    told = Diagnosis(can_predict=False, can_measure=True, checks=checks)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(diagnosis, "diagnose", lambda: told)
    monkeypatch.setattr(command, "out", lambda: console)

    assert CliRunner().invoke(app).exit_code == 0
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["torch", "ok", "[2.13]"],
        ["GPU", "missing", "none", "buy", "one"],
        ["cases", "can", "be", "measured", "here"],
    ]
