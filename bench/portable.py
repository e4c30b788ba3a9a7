"""Python objects sent to a prediction's child process: code by name, tensors without their data.

A function or class travels as the name it can be imported by, so lambdas and what is defined
inside of a function cannot. A tensor travels as shape, strides and type: the other side makes it
anew, so weights are neither copied nor allocated. What is defined in the script that runs
(``__main__``) travels as its file, which the other side runs under another name.
"""

from __future__ import annotations

import base64
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bench.errors import MembenchError
from bench.imported import resolve

__all__ = ["MakeTensor", "pack", "unpack"]

MakeTensor: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a shape, strides and type."""

_HOW_TO = (
    "give a function or class that can be imported, functools.partial of one, "
    "'package.module:factory', or a module whose class can be imported"
)


def pack(what: str, value: Any) -> str:
    """Return ``value`` as text for ``unpack``.

    Errors: MembenchError, naming ``what``, for what cannot be imported on the other side.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise MembenchError(
            f"{what} cannot be sent to the process that traces: {_why(error)}; {_HOW_TO}"
        ) from None
    return base64.b64encode(file.getvalue()).decode("ascii")


def _why(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "<lambda>" in text:
        return "it is or holds a lambda, which has no name to import it by"
    if "<locals>" in text or "local object" in text:
        return f"it is or holds something defined inside of a function ({text})"
    return text


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self._seen: dict[int, tuple[int, Tensor]] = {}  # tensors are kept: their ids stay theirs

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        if obj.layout is not torch.strided:
            raise pickle.PicklingError(f"a tensor of layout {obj.layout} has no plain shape")
        number, _ = self._seen.setdefault(id(obj), (len(self._seen), obj))
        dtype = str(obj.dtype).removeprefix("torch.")
        parameter = isinstance(obj, nn.Parameter)
        return number, tuple(obj.shape), tuple(obj.stride()), dtype, parameter, obj.requires_grad

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.FunctionType | type) and obj.__module__ == "__main__":
            return resolve, (_reference_in_main(obj),)
        return NotImplemented


def _reference_in_main(obj: Any) -> str:
    """Return ``/path/to/script.py:name`` of what is defined in the script that runs."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or not Path(path).is_file():
        raise pickle.PicklingError(
            f"{obj.__qualname__} is defined in an interactive session; put it into a file"
        )
    if "<" in obj.__qualname__:
        raise pickle.PicklingError(f"{obj.__qualname__} in {path}")
    return f"{Path(path).resolve()}:{obj.__qualname__}"


def unpack(text: str, make_tensor: MakeTensor) -> Any:
    """Return the object that ``pack`` was given, each of its tensors made by ``make_tensor``.

    The text is trusted: it comes from the process that started this one.
    """
    return _Unpickler(io.BytesIO(base64.b64decode(text)), make_tensor).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, make_tensor: MakeTensor) -> None:
        super().__init__(file)
        self._make_tensor = make_tensor
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        number, shape, stride, dtype, is_parameter, requires_grad = pid
        if number not in self._made:
            tensor = self._make_tensor(shape, stride, getattr(torch, dtype))
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[number] = tensor
        return self._made[number]
