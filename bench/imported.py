"""Networks, losses and optimizers of a user's own, named by where they can be imported from.

``package.module:name`` is found as ``python -m`` would find it, so in the current directory too;
``path/to/file.py:name`` is run as a file, whose folder can be imported from. Nothing here imports
torch, and nothing of the user's is imported before ``resolve`` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.errors import MembenchError, nearest

__all__ = [
    "DTYPES",
    "Imported",
    "InputSpec",
    "check_reference",
    "is_reference",
    "label",
    "parse_input",
    "resolve",
]

DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64"),
)
_INPUT = re.compile(r"([0-9]+(?:x[0-9]+)*)(?:[:,/]([a-z0-9]+))?")
_MAX_ELEMENTS = 2**40  # 4 TiB of float32: above any card, below what overflows a size
_FORM = "package.module:factory or path/to/file.py:factory"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}:{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A network that is not memsave's: where its factory is, and what its inputs are like.

    Without ``inputs`` it takes one image of shape (batch, ``in_channels``, *sides of the case).
    ``classes``: channels that its output must have, where that is to be checked. ``target``: like
    an input; without it the loss decides. ``pickled``: what was given as objects, by what it is.
    """

    reference: str  # package.module:factory, path/to/file.py:factory; a name if it is pickled
    arguments: dict[str, Any] = field(default_factory=dict)
    in_channels: int = 1
    classes: int | None = None
    inputs: tuple[str, ...] = ()  # "1x1x64x64x64:float32"
    target: str | None = None
    pickled: dict[str, str] = field(default_factory=dict)  # "build", "loss", "optimizer"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Imported:
        """Make it from its JSON object; fields of later versions are ignored."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, "inputs": tuple(known.get("inputs", ()))})


def parse_input(text: str) -> InputSpec:
    """Return what ``1x1x128x128x128`` or ``1x77:int64`` says; float32 where no type is named.

    Errors: MembenchError for anything else.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise MembenchError(
            f"input {text!r} is no shape: write batch, channels and sides as 1x1x128x128x128, "
            "and the type where it is not float32, as 1x77:int64"
        )
    shape = tuple(int(side[:20]) for side in match[1].split("x"))
    dtype = match[2] or "float32"
    if dtype not in DTYPES:
        raise MembenchError(f"input {text!r} has no type {dtype!r}{nearest(dtype, DTYPES)}")
    elements = 1
    for side in shape:
        elements *= side
    if not 0 < elements <= _MAX_ELEMENTS:
        why = "no elements" if not elements else f"more than {_MAX_ELEMENTS} elements"
        raise MembenchError(f"input {text!r} has {why}: give the shape of one batch")
    return InputSpec(shape, dtype)


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form of a reference, rather than that of a name in a table."""
    return ":" in text


def check_reference(reference: str, what: str = "network") -> None:
    """Raise MembenchError if ``reference`` cannot be found; nothing of the user's is run.

    Only the file, or the package at the beginning of the module's name, is looked for.
    """
    module, _, name = reference.rpartition(":")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise MembenchError(f"{what} {reference!r} cannot be imported: write {_FORM}")
    if module.endswith(".py"):
        if not Path(module).expanduser().is_file():
            raise MembenchError(f"{what} {reference!r}: there is no file {module}")
    elif not all(part.isidentifier() for part in module.split(".")):
        raise MembenchError(f"{what} {reference!r} cannot be imported: write {_FORM}")
    elif not _can_be_found(module.partition(".")[0]):
        raise _not_there(reference, module, what)


def _can_be_found(top: str) -> bool:
    if top in sys.modules:
        return True
    here = Path.cwd()
    return (
        importlib.util.find_spec(top) is not None
        or (here / f"{top}.py").is_file()
        or (here / top).is_dir()
    )


def _not_there(reference: str, module: str, what: str) -> MembenchError:
    top = module.partition(".")[0]
    return MembenchError(
        f"{what} {reference!r}: there is no module {top!r}, here or installed; install it, or run "
        "membench in the directory it lies in"
    )


def label(reference: str) -> str:
    """Return the reference as it stands in names of cases: a file without its folders."""
    module, _, name = reference.rpartition(":")
    return f"{os.path.basename(module)}:{name}" if module.endswith(".py") else reference


def resolve(reference: str, what: str = "network") -> Any:
    """Import what ``reference`` names.

    Errors: MembenchError where the file, the module or the name is not there. What the user's
    module itself raises while it is imported is raised.
    """
    check_reference(reference, what)
    module_name, _, name = reference.rpartition(":")
    if module_name.endswith(".py"):
        found: Any = _run_file(Path(module_name).expanduser().resolve())
    else:
        found = _import(reference, module_name, what)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            known = _own_names(found)
            raise MembenchError(
                f"{what} {reference!r}: {module_name} has no {part!r}"
                f"{nearest(part, known) if len(known) < 2000 else ''}"
            ) from None
    return found


def _own_names(found: Any) -> list[str]:
    """Return the public names of a module, or of a class: what it imported is another's."""
    names = [name for name in dir(found) if not name.startswith("_")]
    if not isinstance(found, ModuleType):
        return names
    listed = set(getattr(found, "__all__", ()))
    home = found.__name__
    return [n for n in names if n in listed or getattr(vars(found)[n], "__module__", "") == home]


def _import(reference: str, module: str, what: str) -> ModuleType:
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            if "." not in error.name:
                raise _not_there(reference, module, what) from None
            raise MembenchError(f"{what} {reference!r}: there is no module {error.name}") from None
        raise MembenchError(
            f"{what} {reference!r}: importing {module} needs {error.name!r}, which is not there; "
            "install it"
        ) from error


def _run_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once; what lies beside it can be imported too."""
    name = f"membench_file_{abs(hash(str(path))):x}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MembenchError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as dataclasses and pickles in it expect
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
