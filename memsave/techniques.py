"""The literal table of techniques: the name in a suite file -> what it does, and where.

A technique acts at up to four places: on the options that a network is built with, on the module,
around the step, on the optimizer. Whatever it leaves out does nothing. Adding one is a module, its
test and one entry here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import nn

from memsave.checkpoint import checkpoint_block
from memsave.checkpoint_budget import checkpoint_budget, is_budgeted
from memsave.checkpoint_options import (
    CheckpointBudgetOptions,
    CheckpointOptions,
    CheckpointStepsOptions,
)
from memsave.checkpoint_selective import checkpoint_selective
from memsave.compression import CompressionOptions, check_compressible, compress_activations
from memsave.errors import OptionError, RefusedError, UnknownNameError
from memsave.mixed_precision import Precision
from memsave.offload import OffloadOptions, offload
from memsave.optimizer_in_backward import optimizer_in_backward
from memsave.recompute_pairs import recompute_pairs
from memsave.recomputed_norm_act import recompute
from memsave.tiled import TiledLevelsOptions, tile_levels

__all__ = [
    "TECHNIQUES",
    "CheckpointBudgetOptions",
    "CheckpointOptions",
    "CheckpointStepsOptions",
    "NamesBlocks",
    "NoOptions",
    "TakesSteps",
    "Technique",
    "check_precision",
    "find_technique",
    "parse_options",
]


def _same_network_options(network_options: Mapping[str, Any], _options: Any) -> dict[str, Any]:
    return dict(network_options)


def _same_module(model: nn.Module, _options: Any) -> nn.Module:
    return model


def _plain_step(_model: nn.Module, _options: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _same_optimizer(
    optimizer: torch.optim.Optimizer, _model: nn.Module, _options: Any
) -> torch.optim.Optimizer:
    return optimizer


@runtime_checkable
class NamesBlocks(Protocol):
    """A network that says which of its modules may be recomputed, in the order they run."""

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Return the modules' dotted names."""
        ...


@runtime_checkable
class TakesSteps(Protocol):
    """A recurrent network, which keeps a state for every so many of its steps."""

    def checkpoint_every(
        self, steps: int | None, nested: bool = False, segment: int | None = None
    ) -> None:
        """Recompute all between the states kept; None keeps everything.

        ``nested``: in two levels, the outer of which keeps a state for every ``segment`` steps.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoOptions:
    """For a technique that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """One way to spend less memory, as a suite file names it. ``options`` is a frozen dataclass."""

    name: str  # the key in a suite
    summary: str
    # True: gradients equal those of the same network without it, bit for bit; where ``rounding``
    # says so, but for the order in which floats are summed. Nothing is approximated.
    exact: bool
    source: str
    formula: str = ""  # what is kept for backward, in bytes
    within: str = ""  # where not exact: what the error is bounded by
    rounding: str = ""  # where exact, but not bit for bit: which sums are taken in another order
    options: type = NoOptions
    precisions: tuple[Precision, ...] = get_args(Precision)  # those that it can be used at
    build: Callable[[Mapping[str, Any], Any], dict[str, Any]] = _same_network_options
    module: Callable[[nn.Module, Any], nn.Module] = _same_module
    step: Callable[[nn.Module, Any], AbstractContextManager[None]] = _plain_step
    step_order: int = 2  # scopes around the step are entered in this order, then as named
    optimizer: Callable[[torch.optim.Optimizer, nn.Module, Any], torch.optim.Optimizer] = (
        _same_optimizer
    )


def _use_norm(norm: str) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    return lambda network_options, _options: {**network_options, "norm": norm}


def _each_block(
    change: Callable[[nn.Module], nn.Module],
) -> Callable[[nn.Module, CheckpointOptions], nn.Module]:
    def change_blocks(model: nn.Module, options: CheckpointOptions) -> nn.Module:
        if is_budgeted(model):
            raise RefusedError(
                "checkpoint_budget decides by itself which blocks are recomputed: name no other "
                "technique of checkpoints beside it"
            )
        names = _checkpointable(model)
        for name in options.blocks:
            if name not in names:
                raise UnknownNameError("checkpointable block", name, names)
        for name in options.blocks or names[:: options.every]:
            change(model.get_submodule(name))
        return model

    return change_blocks


def _checkpoint_steps(model: nn.Module, options: CheckpointStepsOptions) -> nn.Module:
    if not isinstance(model, TakesSteps):
        raise OptionError(
            f"{type(model).__name__} takes no steps to checkpoint: use this technique on a "
            "recurrent network such as conv_lstm, or the technique checkpoint on this one"
        )
    if options.nested:
        model.checkpoint_every(options.every, nested=True, segment=options.segment)
    else:
        model.checkpoint_every(options.every)
    return model


def _checkpoint_budget(model: nn.Module, options: CheckpointBudgetOptions) -> nn.Module:
    return checkpoint_budget(model, options.budget, options.share)


def _optimizer_in_backward(
    optimizer: torch.optim.Optimizer, _model: nn.Module, _options: Any
) -> torch.optim.Optimizer:
    return optimizer_in_backward(optimizer)


def _recompute_pairs(model: nn.Module, _options: Any) -> nn.Module:
    if not recompute_pairs(model):
        raise OptionError(
            f"{type(model).__name__} has no pair of norm and activation that can be recomputed, "
            "with the options given: take a network and a norm that has them, such as batch_norm"
        )
    return model


def _recompute_step(model: nn.Module, _options: Any) -> AbstractContextManager[None]:
    return recompute(model)


def _offload_step(model: nn.Module, options: OffloadOptions) -> AbstractContextManager[None]:
    return offload(
        model, minimum_bytes=options.minimum_bytes, in_flight_bytes=options.in_flight_bytes
    )


def _compress_step(model: nn.Module, options: CompressionOptions) -> AbstractContextManager[None]:
    return compress_activations(
        model,
        format=options.format,
        scale=options.scale,
        minimum_bytes=options.minimum_bytes,
        seed=options.seed,
    )


def _checkpointable(model: nn.Module) -> tuple[str, ...]:
    if not isinstance(model, NamesBlocks):
        raise OptionError(
            f"{type(model).__name__} names no checkpointable blocks: give its class a method "
            "checkpointable_blocks(), or call memsave.checkpoint_block on its modules"
        )
    return model.checkpointable_blocks()


def _table(*techniques: Technique) -> dict[str, Technique]:
    table = {technique.name: technique for technique in techniques}
    if len(table) != len(techniques):
        raise ValueError(f"two techniques of one name: {[t.name for t in techniques]}")
    return table


TECHNIQUES: dict[str, Technique] = _table(
    Technique(
        name="inplace_abn",
        summary="BatchNorm and leaky ReLU over their input; backward inverts the result",
        exact=False,  # gradients come from the inverted result: within rounding, see the module
        source="Rota Bulo et al., CVPR 2018, arXiv:1712.02616",
        formula="z.nbytes + 4 C: the norm's input, z.nbytes, is not kept",
        within="2u (|xhat| + |bias|/scale) of xhat in backward, u the type's rounding",
        build=_use_norm("inplace_abn"),
    ),
    Technique(
        name="inplace_group_norm",
        summary="group norm (up to 8 groups) and leaky ReLU over their input, as inplace_abn",
        exact=False,
        source="Wu and He, ECCV 2018, arXiv:1803.08494, by the maths of arXiv:1712.02616",
        formula="z.nbytes + 4 N groups: the norm's input, z.nbytes, is not kept",
        within="2u (|xhat| + |bias|/scale) of xhat in backward, u the type's rounding",
        build=_use_norm("inplace_group_norm"),
    ),
    Technique(
        name="inplace_instance_norm",
        summary="instance norm and leaky ReLU over their input, as inplace_abn",
        exact=False,
        source="Ulyanov et al., arXiv:1607.08022, by the maths of arXiv:1712.02616",
        formula="z.nbytes + 4 N C: the norm's input, z.nbytes, is not kept",
        within="2u (|xhat| + |bias|/scale) of xhat in backward, u the type's rounding",
        build=_use_norm("inplace_instance_norm"),
    ),
    Technique(
        name="recomputed_norm_act",
        summary="keep what norm and activation read, and make their result again in backward",
        exact=True,
        source="Chen et al., arXiv:1604.06174, section 3; torch.autograd.graph.saved_tensors_hooks",
        formula="x.nbytes + 8 C (batch norm): the result, z.nbytes, is not kept",
        module=_recompute_pairs,
        step=_recompute_step,
    ),
    Technique(
        name="checkpoint",
        summary="keep a block's input alone and run its forward again in backward",
        exact=True,
        source="Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174",
        formula="the inputs of each block: one block's insides live at a time",
        options=CheckpointOptions,
        module=_each_block(checkpoint_block),
    ),
    Technique(
        name="checkpoint_selective",
        summary="keep a block's convolution results and run its norms and activations again",
        exact=True,
        source="Korthikanti et al., arXiv:2205.05198; torch's selective checkpoint contexts",
        formula="each block's input and its convolutions' results: one block's rest at a time",
        options=CheckpointOptions,
        module=_each_block(checkpoint_selective),
    ),
    Technique(
        name="checkpoint_steps",
        summary="keep every k-th state of a recurrent network and run its steps again in backward",
        exact=True,
        source="Gruslys et al., Memory-Efficient Backpropagation Through Time, arXiv:1606.03401",
        formula="the state of every k-th step, nested 2 sqrt(steps / k) states; k steps' insides",
        options=CheckpointStepsOptions,
        module=_checkpoint_steps,
    ),
    Technique(
        name="offload",
        summary="keep saved activations in pinned host memory, copied beside the computation",
        exact=True,
        source="Rhu et al., vDNN, MICRO 2016, arXiv:1602.08124",
        formula="in_flight_bytes on the device; every block of minimum_bytes or more on the host",
        options=OffloadOptions,
        step=_offload_step,
        step_order=0,  # around every other: it moves what they keep
    ),
    Technique(
        name="compress_activations",
        summary="keep saved activations in bf16, fp8 or int8 with stochastic rounding",
        exact=False,
        source="Chakrabarti and Moseley, arXiv:1901.07988; Chen et al., ActNN, arXiv:2104.14129",
        formula="n values, C channels: bf16 2 n bytes; fp8 and int8 n + 4 C",
        within="bf16 2^-8 |x|, fp8 2^-4 |x|, int8 max|x| / 127 of each saved value x",
        options=CompressionOptions,
        module=check_compressible,
        step=_compress_step,
        step_order=1,
    ),
    Technique(
        name="checkpoint_budget",
        summary="recompute the blocks whose placement costs least within a budget of bytes",
        exact=True,
        source="Chen et al., arXiv:1604.06174; the placement by dynamic programming",
        formula="at most the budget: what the forward keeps and backward makes again",
        options=CheckpointBudgetOptions,
        module=_checkpoint_budget,
    ),
    Technique(
        name="optimizer_in_backward",
        summary="update each parameter as soon as its gradient is there, and free the gradient",
        exact=True,
        source="Lv et al., arXiv:2306.09782; Tensor.register_post_accumulate_grad_hook",
        formula="gradients: one parameter's at a time, of all of them at once",
        precisions=("fp32", "bf16"),  # a loss scale must see all gradients before any update
        optimizer=_optimizer_in_backward,
    ),
    Technique(
        name="tiled_levels",
        summary="run the finest levels of a U-Net slab by slab, forward and backward, and the loss",
        exact=True,
        rounding="sums over voxels: norm statistics, weight gradients and the loss, slab by slab",
        source="halos and two-pass norm statistics; variances merged after Chan et al. 1983",
        formula="of a level: what keep names, one slab's insides, the features at half its sides",
        options=TiledLevelsOptions,
        module=tile_levels,
    ),
)


def find_technique(name: str) -> Technique:
    """Return the technique called ``name``, or raise UnknownNameError with near names."""
    if name not in TECHNIQUES:
        raise UnknownNameError("technique", name, TECHNIQUES)
    return TECHNIQUES[name]


def check_precision(technique: Technique, precision: str) -> None:
    """Raise OptionError if ``technique`` cannot be used at ``precision``."""
    if precision not in technique.precisions:
        raise OptionError(
            f"technique {technique.name!r} cannot be used at precision {precision}: "
            f"take {' or '.join(technique.precisions)}, or leave it out"
        )


def parse_options(technique: Technique, mapping: Mapping[str, Any]) -> Any:
    """Make the options of ``technique`` from what a suite file holds.

    Raises UnknownNameError for an option that it does not have, OptionError for a value of the
    wrong type or out of range.
    """
    hints = typing.get_type_hints(technique.options)
    known = {field.name: hints[field.name] for field in dataclasses.fields(technique.options)}
    values = {}
    for name, value in mapping.items():
        if name not in known:
            raise UnknownNameError(f"option of technique {technique.name!r}", name, known)
        values[name] = _as(known[name], value, f"option {name!r} of technique {technique.name!r}")
    return technique.options(**values)


def _as(kind: Any, value: Any, what: str) -> Any:
    """Return ``value`` as ``kind``: a plain type, Literal, tuple[x, ...] or x | str | None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        first, *others = (a for a in arguments if a is not type(None))
        if isinstance(value, str) and str in others:  # int | str
            return value
        return _as(first, value, what)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise OptionError(f"{what} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise OptionError(f"{what} must be a list, got {value!r}")
        return tuple(_as(arguments[0], element, what) for element in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return value
