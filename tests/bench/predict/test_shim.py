"""The library that lets fake tensors live on cuda:0: compiled, cached, loaded, chosen."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from bench import nvml
from bench.errors import MembenchError
from bench.predict import shim
from bench.predict.shim import (
    ShimUnavailable,
    TorchBuild,
    build_shim,
    cache_folder,
    choose_tracer,
    find_compiler,
    gpu_visible,
    load_shim,
    torch_build,
    wanted_cache_folder,
)
from bench.predict.trial import trial

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="the CUDA shim needs Linux and a C++ compiler",
)
# Writes the file that -o names, as a compiler does, but with its arguments in it.
COMPILES = """
while [ $# -gt 0 ]; do [ "$1" = -o ] && target="$2"; shift; done
echo "fake 1.0"
[ -z "$target" ] || echo library > "$target"
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests, and a cache of the test's own."""
    for name in ("CXX", "MEMBENCH_TRACER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: ())


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a shell script the only compiler there is."""

    def make(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


@pytest.fixture
def any_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_try_loading", lambda _library: None)


def torch_of(folder: Path, version: str = "2.11.0+cu130", cuda: str | None = "13.0") -> TorchBuild:
    header = folder / "include/ATen/detail/CUDAHooksInterface.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    return TorchBuild(folder=folder, version=version, git_version="f00", cuda=cuda, hip=None)


def install_torch(monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None) -> None:
    monkeypatch.setattr(shim, "torch_build", lambda: build)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
        timeout=120,
    )


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


# --- the torch that is installed ---


def test_torch_is_read_without_importing_it() -> None:
    code = (
        "import sys, bench.predict.shim as shim, bench.environment, bench.predict.cards\n"
        "shim.choose_tracer(); bench.environment.read_environment()\n"
        "assert 'torch' not in sys.modules\n"
        "print(shim.torch_build().version)"
    )
    done = run_python(code, MEMBENCH_TRACER="cpu")

    assert done.returncode == 0, done.stderr
    # a wheel's metadata leaves out the local part, "+cpu", that version.py has
    assert done.stdout.partition("+")[0].strip() == metadata.version("torch").partition("+")[0]


def test_version_py_is_read_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(
        "from typing import Optional\n"
        "__all__ = ['x']\n"
        "__version__ = '2.11.0+cu130'\n"
        "debug = False\n"
        "cuda: Optional[str] = '13.0'\n"
        "git_version = 'f00'\n"
        "hip: Optional[str] = None\n"
    )
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: spec)

    assert torch_build() == TorchBuild(
        folder=tmp_path, version="2.11.0+cu130", git_version="f00", cuda="13.0", hip=None
    )


def test_no_torch_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert torch_build() is None

    empty = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: empty)
    assert torch_build() is None


# --- the compiler ---


def test_the_compiler_named_by_cxx_goes_first(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiler("")
    monkeypatch.setenv("CXX", f"{path} -flag")

    assert find_compiler() == [str(path), "-flag"]


def test_a_cxx_that_is_no_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-O2")
    with pytest.raises(ShimUnavailable, match=r"CXX=g.*'-O2 is no command: No closing quotation"):
        find_compiler()


def test_without_cxx_the_first_known_compiler_on_the_path_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("clang++", "c++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")

    assert find_compiler() == ["c++"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_error_says_what_was_looked_for() -> None:
    with pytest.raises(ShimUnavailable, match=r"no C\+\+ compiler.*CXX.*g\+\+, c\+\+, clang\+\+"):
        build_shim()


# --- building ---


@needs_compiler
def test_a_training_step_traces_on_fake_cuda_and_the_library_is_kept(tmp_path: Path) -> None:
    """The real thing: compiled, loaded before torch, convolution and backward in half precision."""
    # os._exit: autograd's thread for cuda:0 may abort the interpreter's own way out
    done = run_python(
        "import os; from bench.predict.trial import trial; "
        "print(trial('cuda-shim'), flush=True); os._exit(0)"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "a training step in float16 on fake cuda:0\n"
    (name,) = cached(tmp_path)
    assert name.startswith("fake_cuda-")
    assert name.endswith(".so")
    assert build_shim().name == name  # not compiled anew under another name


def test_without_the_shim_the_trial_traces_on_the_cpu() -> None:
    assert trial("cpu") == "a training step in bfloat16 on fake cpu"


@pytest.mark.usefixtures("any_library_loads")
def test_a_library_in_the_cache_is_not_compiled_again(compiler: Callable[[str], Path]) -> None:
    compiler(COMPILES)
    library = build_shim()
    library.write_text("kept")

    assert build_shim() == library
    assert library.read_text() == "kept"


@pytest.mark.usefixtures("any_library_loads")
def test_another_torch_or_compiler_gets_a_library_of_its_own(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler(COMPILES)
    builds = [
        torch_of(tmp_path / "a"),
        torch_of(tmp_path / "b"),  # the same build in another place: its path is compiled in
        torch_of(tmp_path / "a", version="2.13.0+cu130"),
        torch_of(tmp_path / "a", cuda="12.6"),
    ]
    libraries = set()
    for build in builds:
        install_torch(monkeypatch, build)
        libraries.add(build_shim())
    compiler(COMPILES.replace("fake 1.0", "fake 2.0"))
    libraries.add(build_shim())

    assert len(libraries) == 5


@pytest.mark.usefixtures("any_library_loads")
def test_two_builds_at_once_end_with_one_whole_library(
    compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    # Each compiler waits until both run, so neither finds the other's result.
    both = f"[ $(ls {tmp_path}/*.here | wc -l) -ge 2 ] && break"
    meet = f"touch {tmp_path}/$$.here; for i in $(seq 100); do {both}; sleep 0.05; done"
    compiler(f'case "$*" in *-o*) {meet};; esac\n{COMPILES}')

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(build_shim) for _ in range(2))

    assert first.result() == second.result()
    assert first.result().read_text() == "library\n"
    assert cached(tmp_path) == [first.result().name]


def test_a_compile_error_is_told_in_its_own_line_and_leaves_nothing(
    compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    compiler(
        "echo 'In file included from here:' >&2\n"
        "echo 'fake_cuda.cpp:3: error: no such thing' >&2\n"
        "echo 'compilation terminated.' >&2\n"
        "exit 1\n"
    )

    with pytest.raises(ShimUnavailable, match=r": fake_cuda\.cpp:3: error: no such thing$"):
        build_shim()
    assert cached(tmp_path) == []


def test_a_compiler_that_fails_without_a_word_is_told_by_its_status(
    compiler: Callable[[str], Path],
) -> None:
    compiler("exit 7")

    with pytest.raises(ShimUnavailable, match="exit status 7"):
        build_shim()


def test_a_compiler_that_cannot_be_run_is_told(compiler: Callable[[str], Path]) -> None:
    compiler("").write_text("#!/no/such/shell\n")

    with pytest.raises(ShimUnavailable, match="could not be run"):
        build_shim()


def test_a_library_that_does_not_load_is_not_kept(
    compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    compiler(COMPILES)

    with pytest.raises(ShimUnavailable, match=r"does not load.*OSError"):
        build_shim()
    assert cached(tmp_path) == []


def test_without_torchs_headers_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_torch(monkeypatch, TorchBuild(tmp_path, "2.13.0", "f00", None, None))

    with pytest.raises(ShimUnavailable, match=r"torch 2\.13\.0 .* without C\+\+ headers"):
        build_shim()


def test_without_torch_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(monkeypatch, None)

    with pytest.raises(ShimUnavailable, match="torch is not installed"):
        build_shim()


def test_a_torch_for_amd_is_not_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_torch(monkeypatch, TorchBuild(tmp_path, "2.13.0+rocm", "f00", None, "6.4"))

    with pytest.raises(ShimUnavailable, match="ROCm"):
        build_shim()


def test_only_linux_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(ShimUnavailable, match="Linux only, and this is darwin"):
        build_shim()


# --- the cache folder ---


def test_the_cache_is_the_first_folder_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")

    monkeypatch.setenv("MEMBENCH_CACHE", "/cache")
    assert wanted_cache_folder() == Path("/cache")
    monkeypatch.delenv("MEMBENCH_CACHE")
    assert wanted_cache_folder() == Path("/caches/membench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wanted_cache_folder() == Path("/home/somebody/.cache/membench")


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that cannot be made, even by root; returns the temporary folder instead."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMBENCH_CACHE", str(tmp_path / "file" / "cache"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_without_a_home_the_cache_is_a_private_temporary_folder(
    unwritable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEMBENCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() == unwritable / f"membench-{os.getuid()}"


def test_an_unwritable_cache_gives_way_to_a_private_temporary_folder(unwritable: Path) -> None:
    folder = cache_folder()

    assert folder == unwritable / f"membench-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


def test_a_temporary_folder_that_others_can_write_is_not_trusted(unwritable: Path) -> None:
    """Somebody could have put a library there that we would load."""
    open_to_all = unwritable / f"membench-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)

    folder = cache_folder()

    assert folder != open_to_all
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_temporary_folders_place_is_passed_by(unwritable: Path) -> None:
    (unwritable / f"membench-{os.getuid()}").touch()

    assert cache_folder().is_dir()


# --- loading ---


def test_after_torch_the_shim_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(RuntimeError, match="before torch"):
        load_shim(tmp_path / "any.so")


def test_a_file_that_is_no_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    path = tmp_path / "broken.so"
    path.write_text("not a library")

    with pytest.raises(ShimUnavailable, match=r"broken\.so does not load"):
        load_shim(path)


def test_a_process_that_loads_the_shim_sees_no_gpu() -> None:
    code = (
        "import os\n"
        "from bench.predict.shim import build_shim, load_shim\n"
        "load_shim(build_shim()); print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    done = run_python(code, CUDA_VISIBLE_DEVICES="0")

    assert (done.returncode, done.stdout) == (0, "''\n"), done.stderr


# --- the choice of a tracer ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with an H200 and a torch built for CUDA."""
    device = nvml.Device(index=0, name="NVIDIA H200", uuid="GPU-1", memory_bytes=1)
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: (device,))
    install_torch(monkeypatch, torch_of(tmp_path / "torch"))


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu_the_tracer_is_cuda() -> None:
    assert choose_tracer() == ("cuda", "NVIDIA H200, torch built for CUDA 13.0")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("value", ["0", "1,0", "GPU-1"])
def test_a_gpu_chosen_by_cuda_visible_devices_is_seen(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)

    assert gpu_visible()[0]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("value", ["", " ", "-1", "-1,0"])
def test_cuda_visible_devices_hides_every_gpu(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)

    assert gpu_visible() == (False, f"CUDA_VISIBLE_DEVICES={value} hides every GPU")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_of_no_use_to_a_torch_without_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_torch(monkeypatch, torch_of(tmp_path, version="2.13.0+cpu", cuda=None))

    assert gpu_visible() == (False, "torch 2.13.0+cpu is built without CUDA")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_of_no_use_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(monkeypatch, None)

    assert gpu_visible() == (False, "torch is not installed")


@pytest.mark.usefixtures("gpu")
def test_without_the_nvml_package_the_device_files_tell_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvml, "devices", lambda _notes=None: ())
    monkeypatch.setattr(shim, "_device_files", lambda: [Path("/dev/nvidia0")])

    monkeypatch.setattr(nvml, "installed", lambda: False)
    assert gpu_visible() == (True, "/dev/nvidia0, torch built for CUDA 13.0")
    monkeypatch.setattr(nvml, "installed", lambda: True)  # and lists no GPU: the driver is broken
    assert gpu_visible() == (False, "no NVIDIA GPU is visible (the driver lists none)")


@pytest.mark.usefixtures("gpu")
def test_why_nvml_sees_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(notes: list[str]) -> tuple[nvml.Device, ...]:
        notes.append("GPUs: NVML says: Driver Not Loaded")
        return ()

    monkeypatch.setattr(nvml, "devices", devices)
    monkeypatch.setattr(shim, "_device_files", list)
    monkeypatch.setattr(shim, "_driver_lists_one", lambda: False)

    assert gpu_visible() == (
        False,
        "no NVIDIA GPU is visible (NVML says: Driver Not Loaded)",
    )
    monkeypatch.setattr(shim, "_driver_lists_one", lambda: True)
    assert gpu_visible() == (True, "a GPU that CUDA's driver lists, torch built for CUDA 13.0")
    # As in a container without the driver's utilities.
    monkeypatch.setattr(shim, "_device_files", lambda: [Path("/dev/nvidia0")])
    assert gpu_visible() == (True, "/dev/nvidia0, torch built for CUDA 13.0")


class _Driver:
    """CUDA's driver, which lists so many GPUs, or fails to begin."""

    def __init__(self, gpus: int, error: int = 0) -> None:
        self.gpus, self.error = gpus, error

    def cuInit(self, _flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0


@pytest.mark.parametrize(
    ("driver", "there"),
    [(_Driver(2), True), (_Driver(0), False), (_Driver(1, error=100), False), (None, False)],
)
def test_the_driver_is_asked_for_gpus_without_a_context(
    monkeypatch: pytest.MonkeyPatch, driver: _Driver | None, there: bool
) -> None:
    def load(_name: str) -> _Driver:
        if driver is None:
            raise OSError("cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)

    assert shim._driver_lists_one() is there


def test_device_files_are_those_of_gpus(tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()

    assert shim._device_files(tmp_path) == [tmp_path / "nvidia0", tmp_path / "nvidia1"]


@pytest.mark.usefixtures("any_library_loads")
def test_without_a_gpu_the_tracer_is_the_shim(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler(COMPILES)
    install_torch(monkeypatch, torch_of(tmp_path, version="2.13.0+cpu", cuda=None))

    tracer, why = choose_tracer()

    assert tracer == "cuda-shim"
    assert why.startswith("torch 2.13.0+cpu is built without CUDA; shim at ")
    assert cached(tmp_path)


@pytest.mark.usefixtures("no_compiler")
def test_without_gpu_and_compiler_the_tracer_is_the_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_torch(monkeypatch, torch_of(tmp_path, version="2.13.0+cpu", cuda=None))

    tracer, why = choose_tracer()

    assert tracer == "cpu"
    assert "built without CUDA, and no C++ compiler found" in why


@pytest.mark.usefixtures("gpu", "no_compiler")
@pytest.mark.parametrize("tracer", ["cuda", "cpu"])
def test_a_tracer_can_be_forced(tracer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBENCH_TRACER", tracer)

    assert choose_tracer() == (tracer, f"MEMBENCH_TRACER={tracer}")


@pytest.mark.usefixtures("gpu", "any_library_loads")
def test_a_forced_shim_is_built(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler(COMPILES)
    monkeypatch.setenv("MEMBENCH_TRACER", "cuda-shim")

    assert choose_tracer()[0] == "cuda-shim"
    assert cached(tmp_path)


@pytest.mark.usefixtures("gpu", "no_compiler")
def test_a_forced_shim_that_cannot_be_had_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEMBENCH_TRACER", "cuda-shim")

    with pytest.raises(MembenchError, match=r"no C\+\+ compiler"):
        choose_tracer()


def test_an_unknown_tracer_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBENCH_TRACER", "shim")

    with pytest.raises(MembenchError, match=r"MEMBENCH_TRACER=shim .*use cuda, cuda-shim, cpu"):
        choose_tracer()
