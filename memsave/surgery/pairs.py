"""Norms with their activations in a network, and what stands against overwriting their input.

A pair is a norm whose result one activation reads and nothing else. What is concluded holds for
every call of the norm, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from memsave.surgery.dataflow import Call, Dataflow, Value

__all__ = ["ACTIVATIONS", "Activation", "Order", "Pair", "Refusal", "describe_norms", "find_pair"]

Order = Literal["norm_activation", "activation_norm", "norm"]

# layer -> the function of the same name; what an activation of either kind is called in a Dataflow
ACTIVATIONS: dict[str, str] = {
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "PReLU": "prelu",
    "SiLU": "silu",
    "GELU": "gelu",
    "CELU": "celu",
    "SELU": "selu",
    "ReLU6": "relu6",
    "Hardswish": "hardswish",
    "Hardtanh": "hardtanh",
    "Mish": "mish",
    "Softplus": "softplus",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}
_FUNCTIONS = {function: layer for layer, function in ACTIVATIONS.items()}
_DEFAULT_PARAMETER = {"LeakyReLU": 0.01, "ELU": 1.0}
_KEEPS_ARGUMENT = {"LeakyReLU", "ELU", "PReLU", "SiLU", "GELU", "CELU", "Mish", "Softplus"}

# Of those, in place or not, the ones that keep their own result for backward.
_KEEPS_RESULT = {"ReLU", "ELU", "SELU", "Sigmoid", "Tanh"}
# Operations that keep nothing of their argument for backward.
_KEEPS_NOTHING = {
    "add", "iadd", "sub", "isub", "cat", "concat", "interpolate", "pad", "constant_pad_nd", "mean",
    "sum", "Upsample", "AvgPool2d", "AvgPool3d", "avg_pool2d", "avg_pool3d", "Dropout",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_trilinear3d",
}  # fmt: skip

# Operations that keep their argument for backward and do not need their own result.
_CONVOLUTIONS = {
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "Linear", "Bilinear", "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "linear", "addmm", "mm", "bmm", "matmul",
}  # fmt: skip
_POOLINGS = {
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch",
}  # fmt: skip
# Operations whose backward does not need their own result, which may therefore be overwritten.
_RESULT_FREE = _CONVOLUTIONS | _POOLINGS | {
    "add", "iadd", "sub", "isub", "mul", "cat", "concat", "interpolate", "pad", "constant_pad_nd",
    "Upsample", "AvgPool1d", "AvgPool2d", "AvgPool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d",
    "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation: a layer, or a function in some module's forward."""

    kind: str  # the layer's class name, for a function too
    parameter: float  # slope of leaky ReLU, alpha of ELU, 0 for others
    module: str | None  # the layer's name, None for a function
    owner: str  # the module in whose forward the function stands
    in_place: bool

    @property
    def place(self) -> str:
        """What people look for in the model."""
        if self.module is not None:
            return self.module
        return f"{ACTIVATIONS[self.kind]}() in {self.owner or 'the forward'}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a norm stays as it is. ``wrong``: replacing it would change what the network computes."""

    reason: str
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A norm, its activation if there is one, and what may be done to them."""

    norm: str
    order: Order
    activation: Activation | None
    not_over_input: Refusal | None  # why the norm's input must not be overwritten
    result_overwritten: Refusal | None  # by a later operation in place
    result_leaves: bool  # it is one of the model's own results
    direct: bool  # no layer that does nothing stands between the norm and its activation
    before: Activation | None  # an activation that makes the norm's input, left in its place
    producers: tuple[Call | None, ...]  # of the input, one for each call
    saved_bytes: int | None  # by not keeping both; None where shapes are not known


def describe_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the names and modules of all norms of torch's, subclasses included."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def find_pair(
    name: str, flows: Sequence[Dataflow], model: nn.Module, *, reorder: bool = False
) -> Pair | Refusal:
    """Return what the norm called ``name`` is part of, in all of its calls, or why in nothing.

    With ``reorder``, an activation before the norm makes a pair with it.
    """
    calls = [(flow, call) for flow in flows for call in flow.of_module(name)]
    if not calls:
        return Refusal("it is not called in the forward that was seen")
    found = {_kind_of_pair(call, model, reorder) for _, call in calls}
    if len(found) > 1:
        places = " and ".join(sorted({_place(kind) for kind in found}))
        return Refusal(f"it is called more than once, with different things after it: {places}")
    kind = found.pop()
    if isinstance(kind, Refusal):
        return kind
    order, activation = kind
    return Pair(
        norm=name,
        order=order,
        activation=activation,
        not_over_input=_first(_not_over_input(flow, call, order) for flow, call in calls),
        result_overwritten=_first(_overwritten(call, order) for _, call in calls),
        result_leaves=any(_leaves(flow, call, order) for flow, call in calls),
        direct=not any(call.result is not None and call.result.handed_on for _, call in calls),
        before=_before(calls[0][1], order, model),
        producers=tuple(_source(call, order).producer for _, call in calls),
        saved_bytes=_saved_bytes(calls, activation),
    )


def activation_of(call: Call, model: nn.Module) -> Activation | None:
    """Return the activation that ``call`` is, or None."""
    kind = call.operation if call.module is not None else _FUNCTIONS.get(call.operation, "")
    if kind not in ACTIVATIONS:
        return None
    in_place = call.overwrites is not None
    if call.module is None:
        numbers = [p for p in call.parameters if isinstance(p, int | float)]
        parameter = float(numbers[0]) if numbers else _DEFAULT_PARAMETER.get(kind, 0.0)
        return Activation(kind, parameter, None, call.owner, in_place)
    module = model.get_submodule(call.module)
    parameter = float(getattr(module, "negative_slope", getattr(module, "alpha", 0.0)))
    return Activation(kind, parameter, call.module, "", in_place)


def _kind_of_pair(
    call: Call, model: nn.Module, reorder: bool
) -> tuple[Order, Activation | None] | Refusal:
    result = call.result
    if result is None or call.argument is None:
        return Refusal("its result could not be followed")
    after = activation_of(result.readers[0], model) if len(result.readers) == 1 else None
    if after is not None and not result.is_result:
        return "norm_activation", after
    producer = call.argument.producer
    before = activation_of(producer, model) if producer is not None else None
    if before is not None and reorder:
        return "activation_norm", before
    if result.is_result:
        return Refusal("its result leaves what could be traced, or is the model's, as it is")
    if any(reader.operation in _CONVOLUTIONS | _POOLINGS for reader in result.readers):
        return "norm", None
    readers = " and ".join(sorted({reader.place for reader in result.readers})) or "nothing"
    return Refusal(f"its result is read by {readers}, not by an activation alone")


def _before(call: Call, order: Order, model: nn.Module) -> Activation | None:
    producer = _source(call, order).producer
    return activation_of(producer, model) if producer is not None else None


def _place(kind: tuple[Order, Activation | None] | Refusal) -> str:
    if isinstance(kind, Refusal):
        return kind.reason
    return kind[1].place if kind[1] is not None else "a convolution"


def _source(call: Call, order: Order) -> Value:
    """Return what a fused layer in this order would read: the first of the two's argument."""
    argument = call.argument or Value()
    if order == "activation_norm" and argument.producer is not None:
        return argument.producer.argument or Value()
    return argument


def _reader(call: Call, order: Order) -> Call:
    if order == "activation_norm" and call.argument is not None and call.argument.producer:
        return call.argument.producer
    return call


def _not_over_input(flow: Dataflow, call: Call, order: Order) -> Refusal | None:
    value = _source(call, order)
    others = [reader for reader in value.readers if reader is not _reader(call, order)]
    if order == "activation_norm" and call.argument is not None:
        others += [reader for reader in call.argument.readers if reader is not call]
    if others:
        return Refusal(f"its input is also read by {_places(others)}", wrong=True)
    if value.is_result:
        return Refusal("its input is also a result of the model", wrong=True)
    if value.is_input:
        whose = "the model" if flow.part is None else f"{flow.part}, whose caller is not known"
        return Refusal(f"its input is the input of {whose}", wrong=True)
    producer = value.producer
    if producer is None:
        return Refusal("what makes its input could not be seen", wrong=True)
    return _needs_result(producer)


def _needs_result(producer: Call) -> Refusal | None:
    if producer.operation not in _RESULT_FREE:
        known = "needs" if _is_activation(producer) else "may need"
        return Refusal(
            f"its input is made by {producer.place} ({producer.operation}), "
            f"which {known} it unchanged in backward",
            wrong=True,
        )
    before = producer.overwrites
    if before is not None and [r for r in before.readers if r is not producer]:
        return Refusal(
            f"its input was made in place by {producer.place}, and what was there before is also "
            f"read by {_places([r for r in before.readers if r is not producer])}",
            wrong=True,
        )
    return None


def _is_activation(call: Call) -> bool:
    return call.operation in ACTIVATIONS or call.operation in _FUNCTIONS


def _final_result(call: Call, order: Order) -> Value | None:
    if order == "norm_activation" and call.result is not None:
        return call.result.readers[0].result
    return call.result


def _overwritten(call: Call, order: Order) -> Refusal | None:
    result = _final_result(call, order)
    writers = [r for r in result.readers if r.overwrites is result] if result is not None else []
    if writers:
        return Refusal(f"its result is overwritten by {_places(writers)}", wrong=True)
    return None


def _leaves(flow: Dataflow, call: Call, order: Order) -> bool:
    result = _final_result(call, order)
    return result is not None and result.is_result and flow.part is None


def _saved_bytes(
    calls: Iterable[tuple[Dataflow, Call]], activation: Activation | None
) -> int | None:
    total = 0
    flows = {id(flow): flow for flow, _ in calls}
    first = next(iter(flows))  # the training forward: one of each way of tracing comes first
    for flow, call in calls:
        if id(flow) != first:
            continue
        nbytes = call.argument.nbytes if call.argument is not None else None
        if nbytes is None:
            return None
        total += nbytes * _copies_kept(call, activation)
    return total


def _copies_kept(call: Call, activation: Activation | None) -> int:
    """Return how many tensors of the norm's size the plain pair keeps beside the norm's input.

    The norm's result, where the activation needs it and has not overwritten it; the activation's
    own, where it or a reader needs that.
    """
    result = call.result
    if activation is None or result is None:
        return 1
    kind, in_place = activation.kind, activation.in_place
    argument = not in_place and kind in _KEEPS_ARGUMENT
    final = result.readers[0].result
    own = in_place or kind in _KEEPS_RESULT - _KEEPS_ARGUMENT
    read = final is not None and any(r.operation not in _KEEPS_NOTHING for r in final.readers)
    return argument + (own or read)


def _places(calls: Iterable[Call]) -> str:
    return " and ".join(sorted({call.place for call in calls}))


def _first(refusals: Iterable[Refusal | None]) -> Refusal | None:
    return next((refusal for refusal in refusals if refusal is not None), None)
