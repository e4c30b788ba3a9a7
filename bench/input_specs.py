"""Inputs as Python has them (shapes, typed shapes, tensors), read as shapes and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.errors import MembenchError
from bench.imported import InputSpec, parse_input

__all__ = ["input_spec", "input_specs"]


def input_specs(inputs: Any) -> tuple[InputSpec, ...]:
    """Return what a network is called with: one shape, text or tensor, or a list of them.

    Errors: MembenchError for anything else.
    """
    if isinstance(inputs, Mapping):
        raise MembenchError("inputs is a mapping: give them in the order of forward's arguments")
    several = isinstance(inputs, list) or (
        isinstance(inputs, tuple) and not _is_shape(inputs) and not _is_typed_shape(inputs)
    )
    if several and not inputs:
        raise MembenchError("inputs is empty: give at least one shape, as '1x1x128x128x128'")
    if isinstance(inputs, list) and _is_shape(inputs):  # one shape, written as a list
        return (input_spec(tuple(inputs)),)
    return tuple(input_spec(value) for value in inputs) if several else (input_spec(inputs),)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(s) is int for s in value)


def _is_typed_shape(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and _is_shape(value[0])
        and not isinstance(value[1], list | tuple)
        and (str(value[1]).startswith("torch.") or isinstance(value[1], str))
        and not hasattr(value[1], "shape")
    )


def input_spec(value: Any) -> InputSpec:
    """Return one input as shape and type, checked as the text of it would be.

    Errors: MembenchError for what is no shape.
    """
    if isinstance(value, str):
        return parse_input(value)
    if _is_typed_shape(value):
        shape, dtype = value
    elif _is_shape(value):
        shape, dtype = value, "float32"
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        shape, dtype = tuple(value.shape), value.dtype
    else:
        raise MembenchError(
            f"input {value!r:.60} is no shape: give '1x1x128x128x128', a tuple of sides, "
            "(sides, dtype) or a tensor"
        )
    return parse_input(f"{'x'.join(map(str, shape))}:{str(dtype).removeprefix('torch.')}")
