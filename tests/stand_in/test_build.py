"""Building the stand-in GPU: what is missing is said in one line, before anything is compiled."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.predict.shim import ShimUnavailable, find_compiler, torch_build
from tests.stand_in import build as build_module
from tests.stand_in.__main__ import main
from tests.stand_in.build import InstalledTorch, build, find_torch, header_folders

HEADERS = ("cuda.h", "nvrtc.h", "cudnn.h", "cublas_v2.h", "crt/host_defines.h", "cccl/nv/target")

OTHERS = ("libcublas.so.13", "libcublasLt.so.13", "libcudnn.so.9")


def interpreter(folder: Path, answer: dict[str, Any]) -> str:
    """A program that answers as a Python with such a torch would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    path.chmod(0o755)
    return str(path)


def cuda_torch(folder: Path, **changes: Any) -> str:
    answer = {"torch": "2.11.0+cu130", "cuda": "13.0", "nvidia": [str(folder / "nvidia")]}
    return interpreter(folder, {**answer, **changes})


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    include = tmp_path / "nvidia" / "cu13" / "include"
    for name in HEADERS:
        (include / name).parent.mkdir(parents=True, exist_ok=True)
        (include / name).touch()
    return include


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"torch": None, "cuda": None, "nvidia": []}, "has no torch"),
        ({"torch": "2.13.0+cpu", "cuda": None, "nvidia": []}, "is built without CUDA"),
        ({"torch": "2.11.0+cu128", "cuda": "12.8", "nvidia": []}, "is built for CUDA 12.8"),
    ],
)
def test_another_torch_is_refused_with_what_to_install(
    tmp_path: Path, answer: dict[str, Any], said: str
) -> None:
    with pytest.raises(MembenchError, match=said) as refused:
        build(interpreter(tmp_path, answer))
    assert "pip install torch==2.11.0" in str(refused.value)


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(MembenchError, match=r"no/such/python does not run: No such file"):
        find_torch("no/such/python")


def test_a_program_that_is_no_python_is_named() -> None:
    with pytest.raises(MembenchError, match=r"false is no Python 3.11 or later: it says nothing"):
        find_torch("false")


def test_the_torch_of_an_interpreter_is_found_without_importing_it(tmp_path: Path) -> None:
    own = torch_build()
    assert own is not None
    if own.cuda is None:
        with pytest.raises(MembenchError, match=rf"torch {own.version.replace('+', '.')} of"):
            find_torch(sys.executable)
    found = find_torch(cuda_torch(tmp_path))
    assert (found.version, found.cuda) == ("2.11.0+cu130", "13.0")
    assert found.nvidia == (tmp_path / "nvidia",)


@pytest.mark.parametrize(
    ("missing", "package"),
    [
        ("crt/host_defines.h", "nvidia-cuda-crt==13.0.*"),
        ("cccl/nv/target", "nvidia-cuda-cccl==13.0.*"),
        ("cudnn.h", "nvidia-cudnn-cu13"),
    ],
)
def test_a_missing_header_names_its_package(
    tmp_path: Path, headers: Path, missing: str, package: str
) -> None:
    python = cuda_torch(tmp_path)
    (headers / missing).unlink()
    with pytest.raises(MembenchError) as refused:
        build(python)
    assert str(refused.value).endswith(f'-m pip install "{package}"')


def test_headers_are_looked_for_in_the_folder_inside_too(tmp_path: Path, headers: Path) -> None:
    torch = InstalledTorch(
        python="python", version="2.11.0", cuda="13.0", nvidia=(tmp_path / "nvidia",)
    )
    assert header_folders(torch) == [headers, headers / "cccl"]


@pytest.mark.usefixtures("headers")
def test_a_missing_library_says_to_install_torch_with_its_dependencies(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match="libcudart is missing beside torch") as refused:
        build(cuda_torch(tmp_path))
    assert str(refused.value).endswith("pip install torch==2.11.0")


@pytest.fixture
def libraries(tmp_path: Path, headers: Path) -> Path:
    folder = headers.parent / "lib"
    folder.mkdir()
    for name in ("libcudart.so.13", "libnvrtc.so.13", *OTHERS):
        (folder / name).touch()
    return tmp_path


def test_without_a_compiler_or_nm_it_says_so(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = cuda_torch(libraries)

    def no_compiler() -> list[str]:
        raise ShimUnavailable("no C++ compiler found")

    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(build_module, "find_compiler", lambda: ["g++"])
    with pytest.raises(MembenchError, match="install binutils"):
        build(python)
    monkeypatch.setattr(build_module, "find_compiler", no_compiler)
    with pytest.raises(MembenchError, match=r"no C\+\+ compiler"):
        build(python)


def test_a_compilers_error_is_one_line_and_leaves_nothing_behind(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = libraries / "compiler"
    compiler.write_text("#!/bin/sh\necho 'device.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MEMBENCH_CACHE", str(libraries / "cache"))
    with pytest.raises(MembenchError, match=r"compiler failed .*: device.cpp:1: error: no such"):
        build(cuda_torch(libraries))
    assert list((libraries / "cache").iterdir()) == []


def test_what_was_built_is_taken_again_until_a_source_changes(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    class Builder:
        def __init__(self, _compiler: Any, _headers: Any, made: Path, _scratch: Path) -> None:
            built.append(made)

        def all(self, _real: dict[str, Path]) -> None:
            (built[-1] / "libcuda.so.1").touch()

    sources = libraries / "sources"
    sources.mkdir()
    (sources / "runtime.cpp").write_text("// one\n")
    monkeypatch.setattr(build_module, "_Builder", Builder)
    monkeypatch.setattr(build_module, "SOURCES", sources)
    monkeypatch.setenv("MEMBENCH_CACHE", str(libraries / "cache"))
    python = cuda_torch(libraries)

    first = build(python)
    assert (first / "libcuda.so.1").is_file()
    assert build(python) == first
    (sources / "runtime.cpp").write_text("// two\n")
    assert build(python) != first
    assert len(built) == 2


def compiled(path: Path, code: str) -> None:
    path.unlink(missing_ok=True)
    source = path.with_suffix(".cpp")
    source.write_text(code)
    subprocess.run([*find_compiler(), "-shared", "-fPIC", "-o", path, source], check=True)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_what_we_define_answers_as_we_say_and_all_other_exported_names_answer_0(
    libraries: Path, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sources and libraries of a few lines: the whole way but CUDA's headers."""
    sources = libraries / "sources"
    sources.mkdir()
    ours = {
        "device.cpp": "int shared() { return 5; }",
        "driver.cpp": 'int shared(); extern "C" int cuInit() { return shared(); }',
        "runtime.cpp": 'int shared(); extern "C" int cudaMalloc() { return shared() + 1; }',
        "streams.cpp": 'extern "C" int cudaEventQuery() { return 3; }',
        "nvml.cpp": 'extern "C" int nvmlInit() { return 7; }',
        **dict.fromkeys(["cudnn.cpp", "cublas.cpp", "cublas_lt.cpp", "nvrtc.cpp"], ""),
    }
    for name, code in ours.items():
        (sources / name).write_text(code)
    (headers / "cuda.h").write_text("int cuInit(); int cuOther(); // not cudaMalloc, CUresult")
    real = headers.parent / "lib" / "libcudart.so.13"
    exported = ("cudaMalloc", "cudaFree", "cudaEventQuery")
    compiled(real, "\n".join(f'extern "C" int {name}() {{ return 1; }}' for name in exported))
    for name in ("libnvrtc.so.13", *OTHERS):
        compiled(real.with_name(name), f'extern "C" int {name.split(".")[0]}() {{ return 1; }}')
    monkeypatch.setattr(build_module, "SOURCES", sources)
    monkeypatch.setenv("MEMBENCH_CACHE", str(libraries / "cache"))

    folder = build(cuda_torch(libraries))

    runtime = ctypes.CDLL(str(folder / "libcudart.so.13"))
    assert (runtime.cudaMalloc(), runtime.cudaFree(), runtime.cudaEventQuery()) == (6, 0, 3)
    driver = ctypes.CDLL(str(folder / "libcuda.so"))
    assert (driver.cuInit(), driver.cuOther()) == (5, 0)
    assert not hasattr(driver, "CUresult")
    assert ctypes.CDLL(str(folder / "libcudnn.so.9")).libcudnn() == 0
    assert ctypes.CDLL(str(folder / "libnvidia-ml.so.1")).nvmlInit() == 7
    assert list(folder.parent.iterdir()) == [folder]


def test_the_command_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--python", "no/such/python", "--", "-V"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no/such/python does not run")
    assert error.count("\n") == 1


def test_without_anything_to_run_it_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--python", "python"])
    assert ended.value.code == 2
    assert "usage: python -m tests.stand_in" in capsys.readouterr().err
