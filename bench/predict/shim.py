"""The library that lets fake tensors live on ``cuda:0`` without a GPU: found, compiled, loaded.

``fake_cuda.cpp`` says what it answers and why. It is compiled once for a torch build and a
compiler, kept in the cache folder, and loaded before torch in a process of its own: a prediction's
child process calls ``load_shim(build_shim())`` as its first act. Nothing here imports torch.

Which tracer a machine gets is decided here too, from files alone: ``cuda`` (a GPU is there), else
``cuda-shim``, else ``cpu``, which traces the CPU's operators and is marked so in every record.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench.errors import MembenchError, nearest
from bench.predict.folders import expanded
from bench.record import Tracer

__all__ = [
    "TRACER_VARIABLE",
    "ShimUnavailable",
    "TorchBuild",
    "build_shim",
    "cache_folder",
    "choose_tracer",
    "find_compiler",
    "gpu_visible",
    "load_shim",
    "torch_build",
    "wanted_cache_folder",
]

TRACER_VARIABLE = "MEMBENCH_TRACER"
_SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_LIMIT_S = 300  # 1.6 s on two slow cores; a network file system may need many times that


class ShimUnavailable(MembenchError):
    """The shim cannot be had here; the message says why and what would cure it."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch, read from its files: ``cuda`` is None for a build without CUDA."""

    folder: Path
    version: str
    git_version: str
    cuda: str | None
    hip: str | None

    @property
    def release(self) -> tuple[int, int] | None:
        """``(2, 13)`` of 2.13.0+cpu, None of a version that does not begin so."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else None


def torch_build() -> TorchBuild | None:
    """Return the torch that ``import torch`` would give, without importing it; None without one."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        values = _assigned_literals((folder / "version.py").read_text())
    except (OSError, SyntaxError):
        return None
    return TorchBuild(
        folder=folder,
        version=str(values.get("__version__", "unknown")),
        git_version=str(values.get("git_version", "unknown")),
        cuda=values.get("cuda"),
        hip=values.get("hip"),
    )


def _assigned_literals(source: str) -> dict[str, Any]:
    """Return the module-level ``name = literal`` and ``name: type = literal`` of a source text."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if isinstance(node.value, ast.Constant):
            values.update({t.id: node.value.value for t in targets if isinstance(t, ast.Name)})
    return values


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: ``$CXX``, else g++, c++ or clang++ from the path.

    Raises ShimUnavailable when there is none, or when ``$CXX`` cannot be read as a command.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:  # a quote that is not closed
        raise ShimUnavailable(f"CXX={os.environ['CXX']} is no command: {error}") from None
    for command in [named, *([name] for name in _COMPILERS)]:
        if command and shutil.which(command[0]) is not None:
            return command
    raise ShimUnavailable(
        f"no C++ compiler found ($CXX, {', '.join(_COMPILERS)}); install one, for example g++"
    )


def cache_folder() -> Path:
    """Return a folder that can be written and outlives the process, made if need be.

    ``$MEMBENCH_CACHE``, else ``$XDG_CACHE_HOME/membench``, else ``~/.cache/membench``; where that
    cannot be written, a folder of this user's alone under the system's temporary folder.
    """
    wanted = wanted_cache_folder()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        return _temporary_cache_folder()


def wanted_cache_folder() -> Path:
    """Return the cache folder that the environment names, whether or not it can be written."""
    if named := os.environ.get("MEMBENCH_CACHE"):
        return expanded("MEMBENCH_CACHE", named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "membench"
    try:
        return Path.home() / ".cache" / "membench"
    except RuntimeError:  # a user without a home folder
        return _temporary_cache_folder()


def _temporary_cache_folder() -> Path:
    # A library is loaded from here, so a folder that someone else made beforehand must not serve.
    folder = Path(tempfile.gettempdir()) / f"membench-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="membench-"))
    if folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="membench-"))
    return folder


def build_shim() -> Path:
    """Return the compiled shim of this torch, compiling it (1.6 s) if the cache has none.

    Two processes may build at once: each writes a file of its own and renames it into place.
    Raises ShimUnavailable when it cannot be compiled or cannot be loaded here.
    """
    torch = _suitable_torch()
    compiler = find_compiler()
    library = cache_folder() / f"fake_cuda-{_cache_key(torch, compiler)}.so"
    if library.exists():
        return library
    handle, name = tempfile.mkstemp(dir=library.parent, prefix="building-", suffix=".so")
    os.close(handle)
    unfinished = Path(name)
    try:
        _compile(compiler, torch, unfinished)
        _try_loading(unfinished)
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return library


def _suitable_torch() -> TorchBuild:
    """Return the installed torch, or raise ShimUnavailable if no shim can be made for it."""
    if sys.platform != "linux":
        raise ShimUnavailable(f"the CUDA shim is made on Linux only, and this is {sys.platform}")
    torch = torch_build()
    if torch is None:
        raise ShimUnavailable("torch is not installed; install torch 2.11 or later")
    if torch.hip is not None:
        raise ShimUnavailable(f"torch {torch.version} is built for ROCm, which names its GPUs cuda")
    if not (torch.folder / "include/ATen/detail/CUDAHooksInterface.h").exists():
        raise ShimUnavailable(f"torch {torch.version} at {torch.folder} comes without C++ headers")
    return torch


def _cache_key(torch: TorchBuild, compiler: list[str]) -> str:
    """Hash what the library depends on; torch's folder too, which is compiled in as its rpath."""
    facts = (
        *(torch.version, torch.git_version, str(torch.cuda), str(torch.folder)),
        _SOURCE.read_text(),
        shlex.join(compiler),
        _compiler_version(compiler),
        platform.machine(),
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _compiler_version(compiler: list[str]) -> str:
    """Return the compiler's own first line about itself, "" if it says nothing."""
    done = _run([*compiler, "--version"], limit_s=30)
    return done.stdout.partition("\n")[0]


def _compile(compiler: list[str], torch: TorchBuild, library: Path) -> None:
    """Compile the shim to ``library``, or raise ShimUnavailable with the first error line."""
    libraries = torch.folder / "lib"
    command = [
        *compiler,
        *("-shared", "-fPIC", "-O1", "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1"),
        f"-I{torch.folder / 'include'}",
        str(_SOURCE),
        *("-o", str(library)),
        *(f"-L{libraries}", "-lc10", "-ltorch_cpu"),
        # Loaded before torch, the shim must find torch's libraries by itself.
        f"-Wl,-rpath,{libraries}",
    ]
    done = _run(command, limit_s=_COMPILE_LIMIT_S)
    if done.returncode != 0:
        raise ShimUnavailable(f"{compiler[0]} could not compile the CUDA shim: {_error_line(done)}")


def _try_loading(library: Path) -> None:
    """Load the library in a child process: a compiler's C++ runtime may be newer than torch's."""
    script = "import ctypes, sys; ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)"
    done = _run([sys.executable, "-c", script, str(library)], limit_s=_COMPILE_LIMIT_S)
    if done.returncode != 0:
        raise ShimUnavailable(f"the compiled CUDA shim does not load: {_error_line(done)}")


def _run(command: list[str], *, limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShimUnavailable(f"{command[0]} could not be run: {error}") from None


def _error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first line that names an error, else the last line, else the exit status."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors[:1] or lines[-1:] or [f"exit status {done.returncode}"])[0]


def load_shim(library: Path) -> ctypes.CDLL:
    """Load the shim into this process, which must not have imported torch yet.

    A GPU that is here is hidden from the process: fake tensors would otherwise make a context on
    it, through an allocator that the shim keeps torch from setting up.
    Raises RuntimeError where torch is imported: forward and backward would fail later, one by one.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the CUDA shim must be loaded before torch; use a process of its own")
    try:
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ShimUnavailable(f"the CUDA shim at {library} does not load: {error}") from None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return loaded


def choose_tracer() -> tuple[Tracer, str]:
    """Return the tracer of this machine, and why it is that one, in a few words.

    Builds the shim if that is the answer. ``$MEMBENCH_TRACER`` forces one.
    Raises MembenchError for a bad value there, ShimUnavailable if a forced shim cannot be had.
    """
    forced = os.environ.get(TRACER_VARIABLE)
    if forced:
        return _forced_tracer(forced)
    visible, why = gpu_visible()
    if visible:
        return "cuda", why
    try:
        library = build_shim()
    except ShimUnavailable as error:
        return "cpu", f"{why}, and {error}"
    return "cuda-shim", f"{why}; shim at {library}"


def _forced_tracer(name: str) -> tuple[Tracer, str]:
    why = f"{TRACER_VARIABLE}={name}"
    for tracer in get_args(Tracer):
        if name == tracer:
            if name == "cuda-shim":
                build_shim()
            return tracer, why
    known = get_args(Tracer)
    raise MembenchError(f"{why} is not a tracer{nearest(name, known)}; use {', '.join(known)}")


def gpu_visible() -> tuple[bool, str]:
    """Return whether torch, once imported, would find an NVIDIA GPU, and which, or why not.

    Decided from files, the environment, NVML and, where that fails, CUDA's driver. That a driver is
    too old for torch's CUDA is not seen.
    """
    torch = torch_build()
    if torch is None:
        return False, "torch is not installed"
    if torch.cuda is None:
        return False, f"torch {torch.version} is built without CUDA"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and (not chosen.strip() or chosen.strip().startswith("-")):
        return False, f"CUDA_VISIBLE_DEVICES={chosen} hides every GPU"
    from bench import nvml

    notes: list[str] = []
    devices = nvml.devices(notes)
    if devices:
        return True, f"{devices[0].name}, torch built for CUDA {torch.cuda}"
    # Where NVML cannot be asked (no package; a container without the driver's utilities), the
    # device files still tell of a driver.
    files = _device_files()
    if files and (notes or not nvml.installed()):
        return True, f"{files[0]}, torch built for CUDA {torch.cuda}"
    if notes and _driver_lists_one():
        return True, f"a GPU that CUDA's driver lists, torch built for CUDA {torch.cuda}"
    why = notes[0].removeprefix("GPUs: ") if notes else "the driver lists none"
    return False, f"no NVIDIA GPU is visible ({why})"


def _driver_lists_one() -> bool:
    """Ask CUDA's driver, without making a context; False where there is none."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return False
    return not failed and count.value > 0


def _device_files(folder: Path = Path("/dev")) -> list[Path]:
    return sorted(folder.glob("nvidia[0-9]*"))
