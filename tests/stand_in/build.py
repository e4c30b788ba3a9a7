"""Builds the stand-in GPU's libraries for the torch of an interpreter: ``folder = build(python)``.

Each takes the name of a library that a CUDA build of torch loads. What our source does not define
of all that the real one exports answers 0, success, and does nothing. Headers and the lists of
names come from the pip packages that torch itself brings; no source of anyone else's is kept here.
Built libraries stay in membench's cache folder, under a hash of all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import MembenchError
from bench.predict.shim import cache_folder, find_compiler

__all__ = ["LIBRARIES", "InstalledTorch", "build", "find_torch", "header_folders"]

SOURCES = Path(__file__).with_name("libraries")
LIBRARIES = (
    *("libcudart", "libcuda", "libnvrtc", "libcublasLt", "libcublas", "libcudnn", "libnvidia-ml"),
)
"""What is preloaded, in this order, and symbolic names of the files that ``build`` makes."""

_CUDA_MAJOR = "13"
_COMPILE_LIMIT_S = 300
# A header that is looked for, and the pip package that brings it.
_HEADERS = {
    "cuda.h": "nvidia-cuda-runtime",
    "nvrtc.h": "nvidia-cuda-nvrtc",
    "cudnn.h": "nvidia-cudnn-cu13",
    "cublas_v2.h": "nvidia-cublas",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}
_SOURCES_OF = {
    "libcudart": ("runtime.cpp", "streams.cpp"),
    "libnvrtc": ("nvrtc.cpp",),
    "libcublasLt": ("cublas_lt.cpp",),
    "libcublas": ("cublas.cpp",),
    "libcudnn": ("cudnn.cpp",),
}
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-attributes")
_LOOK = """
import importlib.util as util, json
torch, nvidia = util.find_spec("torch"), util.find_spec("nvidia")
values = {}
if torch is not None:
    exec(open(torch.submodule_search_locations[0] + "/version.py").read(), values)
print(json.dumps({
    "torch": values.get("__version__"),
    "cuda": values.get("cuda"),
    "nvidia": list(nvidia.submodule_search_locations) if nvidia else [],
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledTorch:
    """An interpreter's torch, built for CUDA, and the folders of NVIDIA's packages beside it."""

    python: str
    version: str
    cuda: str
    nvidia: tuple[Path, ...]


def find_torch(python: str) -> InstalledTorch:
    """Return the torch of the interpreter ``python``.

    Raises MembenchError where it does not run, or has no torch that is built for CUDA 13.
    """
    try:
        done = _run([python, "-P", "-c", _LOOK])
    except OSError as error:
        raise MembenchError(f"{python} does not run: {error.strerror}") from None
    if done.returncode != 0:
        raise MembenchError(f"{python} is no Python 3.11 or later: {_last_line(done.stderr)}")
    found = json.loads(done.stdout)
    wanted = f"install one from PyPI: {python} -m pip install torch==2.11.0"
    if found["torch"] is None:
        raise MembenchError(f"{python} has no torch; {wanted}")
    if found["cuda"] is None or found["cuda"].split(".")[0] != _CUDA_MAJOR:
        built = "without CUDA" if found["cuda"] is None else f"for CUDA {found['cuda']}"
        raise MembenchError(
            f"torch {found['torch']} of {python} is built {built}, and the stand-in GPU poses as "
            f"CUDA {_CUDA_MAJOR}; {wanted}"
        )
    return InstalledTorch(
        python=python,
        version=found["torch"],
        cuda=found["cuda"],
        nvidia=tuple(map(Path, found["nvidia"])),
    )


def build(python: str) -> Path:
    """Return the folder of the libraries for that interpreter, built if the cache has none.

    Raises MembenchError naming what is missing: torch, a header's package, a compiler, nm.
    """
    torch = find_torch(python)
    headers = header_folders(torch)
    real = {name: _real_library(torch, name) for name in _SOURCES_OF}
    compiler = find_compiler()
    if shutil.which("nm") is None:
        raise MembenchError("nm lists what a library exports, and is not here; install binutils")
    folder = cache_folder() / f"stand-in-{_cache_key(torch, real, compiler)}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as unfinished:
        made = Path(unfinished) / "libraries"
        made.mkdir()
        _Builder(compiler, headers, made, Path(unfinished)).all(real)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def header_folders(torch: InstalledTorch) -> list[Path]:
    """Return the folders of NVIDIA's headers beside a torch.

    Raises MembenchError naming the pip package of the first header that is missing.
    """
    folders = [
        folder
        for root in torch.nvidia
        for include in sorted(root.glob("*/include"))
        for folder in (include, include / "cccl")
        if folder.is_dir()
    ]
    for header, package in _HEADERS.items():
        if not any((folder / header).is_file() for folder in folders):
            version = "" if package == "nvidia-cudnn-cu13" else f"=={torch.cuda}.*"
            raise MembenchError(
                f"the header {header} is missing beside torch {torch.version}: "
                f'{torch.python} -m pip install "{package}{version}"'
            )
    return folders


def _real_library(torch: InstalledTorch, name: str) -> Path:
    for root in torch.nvidia:
        for path in sorted(root.glob(f"*/lib/{name}.so.*")):
            return path
    raise MembenchError(
        f"{name} is missing beside torch {torch.version}: install torch with its dependencies, "
        f"{torch.python} -m pip install torch=={torch.version.split('+')[0]}"
    )


def _cache_key(torch: InstalledTorch, real: dict[str, Path], compiler: Sequence[str]) -> str:
    """Hash the sources, this file, the names that are exported, the headers and the compiler."""
    facts = [torch.version, torch.cuda, *compiler, Path(__file__).read_text()]
    facts += [path.read_text() for path in sorted(SOURCES.iterdir())]
    facts += [f"{path} {path.stat().st_size}" for path in real.values()]
    facts += [_run([*compiler, "--version"]).stdout.partition("\n")[0]]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Builder:
    compiler: Sequence[str]
    headers: Sequence[Path]
    made: Path  # where libraries go
    scratch: Path

    def all(self, real: dict[str, Path]) -> None:
        """Build every library; those that the others need come first."""
        self._link("libstandin_device.so", [self._object("device.cpp")])
        self._driver()
        for name, path in real.items():
            self._replacing(path, [self._object(source) for source in _SOURCES_OF[name]])
        shared = ["-lstandin_device"]
        self._link("libnvidia-ml.so.1", [self._object("nvml.cpp"), *shared])

    def _driver(self) -> None:
        """The driver's library comes with no pip package: the names are those of its header."""
        header = next(f / "cuda.h" for f in self.headers if (f / "cuda.h").is_file())
        names = set(re.findall(r"\bcu[A-Z]\w+", header.read_text(errors="replace")))
        code = self._object("driver.cpp")
        rest = self._rest("libcuda", names - self._defined(code))
        self._link("libcuda.so.1", [code, rest, "-lstandin_device"])
        (self.made / "libcuda.so").symlink_to("libcuda.so.1")  # what Triton links to

    def _replacing(self, real: Path, codes: Sequence[Path]) -> None:
        names = self._exported(real).difference(*map(self._defined, codes))
        rest = self._rest(real.name, names)
        versions = self.scratch / f"{real.name}.map"
        versions.write_text(f"{real.name} {{ global: *; }};\n")
        script = f"-Wl,--version-script={versions}"
        # The runtime asks the driver's library for attributes; it was built before.
        self._link(real.name, [*codes, rest, script, "-lstandin_device", "-l:libcuda.so.1"])

    def _object(self, source: str) -> Path:
        made = self.scratch / f"{source}.o"
        includes = [f"-I{folder}" for folder in self.headers]
        self._call(*self.compiler, *_FLAGS, *includes, "-c", SOURCES / source, "-o", made)
        return made

    def _rest(self, name: str, names: Iterable[str]) -> Path:
        """Compile what answers 0 to every name of ``names``."""
        source = self.scratch / f"{name}.rest.cpp"
        functions = "\n".join(f"int {one}() {{ return 0; }}" for one in sorted(names))
        source.write_text(f'extern "C" {{\n{functions}\n}}\n')
        made = source.with_suffix(".o")
        self._call(*self.compiler, "-w", "-fPIC", "-c", source, "-o", made)
        return made

    def _link(self, name: str, parts: Sequence[Path | str]) -> None:
        # Its own folder first: the stand-ins find each other wherever the cache is.
        found = ("-Wl,-rpath,$ORIGIN", f"-L{self.made}", f"-Wl,-soname,{name}")
        self._call(*self.compiler, "-shared", "-o", self.made / name, *found, *parts, "-ldl")

    def _exported(self, library: Path) -> set[str]:
        lines = self._call("nm", "-D", "--defined-only", library).splitlines()
        words = (line.split() for line in lines)
        found = {w[-1].partition("@")[0] for w in words if len(w) == 3 and w[1] in "TW"}
        return found - {"_init", "_fini"}

    def _defined(self, code: Path) -> set[str]:
        return {w.split()[-1] for w in self._call("nm", "--defined-only", code).splitlines() if w}

    def _call(self, *command: str | Path) -> str:
        done = _run(list(map(str, command)))
        if done.returncode != 0:
            error = next((x for x in done.stderr.splitlines() if "error" in x), "")
            raise MembenchError(
                f"{command[0]} failed at the stand-in GPU: {error or _last_line(done.stderr)}"
            )
        return done.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_COMPILE_LIMIT_S
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]
