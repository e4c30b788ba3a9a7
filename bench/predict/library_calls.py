"""Calls into libraries and kernels that take memory beside their results, as plain data.

Two calls that are equal here take the same memory on one card, with one version of the libraries:
so a calibration measures each once, and a prediction looks it up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

__all__ = ["ConvolutionCall", "Direction", "OperatorCall"]

Direction = Literal["forward", "input_gradient", "weight_gradient"]

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_SHAPES = ("input", "weight", "output", "stride", "padding", "dilation", "output_padding")


class ConvolutionCall(NamedTuple):
    """One call of cuDNN: a convolution, or one of the two gradients that its backward computes.

    ``input``, ``weight`` and ``output`` are the shapes of the forward pass, whatever the
    direction: (batch, channels, *sides) and (channels, channels / groups, *kernel).
    """

    direction: Direction
    dtype: str  # "float32"
    channels_last: bool
    transposed: bool
    groups: int
    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return _ITEM_BYTES[self.dtype]

    @property
    def operand_bytes(self) -> int:
        """Bytes of the activation operands: the input and the output, or their gradients."""
        return (math.prod(self.input) + math.prod(self.output)) * self.item_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of everything that must be there to make the call, its result included."""
        return self.operand_bytes + math.prod(self.weight) * self.item_bytes

    @property
    def depthwise(self) -> bool:
        """Whether each channel of the input is convolved by itself."""
        return self.groups > 1 and self.groups == self.input[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the call as JSON-ready data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._asdict().items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConvolutionCall:
        """Make the call that ``to_dict`` gave; keys that it does not know are ignored.

        Raises ValueError or TypeError saying what is missing or wrong.
        """
        missing = [name for name in cls._fields if name not in data]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        values = {name: data[name] for name in cls._fields}
        values |= {name: _whole_numbers(name, values[name]) for name in _SHAPES}
        call = cls(**values)
        if call.direction not in get_args(Direction) or call.dtype not in _ITEM_BYTES:
            raise ValueError(f"direction {call.direction!r} or dtype {call.dtype!r} is not known")
        if min(map(len, (call.input, call.weight, call.output))) < 3 or call.groups < 1:
            raise ValueError(
                f"input {list(call.input)} or groups {call.groups} is no convolution's"
            )
        return call


def _whole_numbers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise ValueError(f"{name} is {values!r}, not a list of whole numbers")
    return tuple(values)


class OperatorCall(NamedTuple):
    """One call of an operator of torch's.

    ``arguments`` is JSON, the list of positional arguments and the object of named ones: a tensor
    is ``{"tensor": shape, "dtype": "float32"}``, with its ``"stride"`` where it is not dense, and
    on the CPU with ``"cpu": true``; types, devices and formats are objects of one key too.
    """

    operator: str  # "aten.native_batch_norm.default"
    arguments: str

    @property
    def tensors(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and type of every tensor among the arguments, in order."""
        found: list[tuple[tuple[int, ...], str]] = []
        _gather(json.loads(self.arguments), found)
        return tuple(found)

    @property
    def operand_bytes(self) -> int:
        """Bytes of all tensors among the arguments."""
        return sum(math.prod(shape) * dtype_bytes(dtype) for shape, dtype in self.tensors)


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one number of a type by torch's name, 8 for what is not known here."""
    if dtype in ("bool", "uint8", "int8"):
        return 1
    return _ITEM_BYTES.get(dtype, {"int64": 8, "int32": 4, "int16": 2}.get(dtype, 8))


def _gather(value: Any, found: list[tuple[tuple[int, ...], str]]) -> None:
    if isinstance(value, dict):
        if "tensor" in value:
            found.append((tuple(value["tensor"]), value["dtype"]))
        else:
            for part in value.values():
                _gather(part, found)
    elif isinstance(value, list):
        for part in value:
            _gather(part, found)
