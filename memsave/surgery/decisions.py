"""What a norm technique does about one norm: replace it, or leave it and say why.

The norm, its activation and what else reads its input come from ``memsave/surgery/pairs.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memsave.errors import OptionError
from memsave.recomputed_norm_act import check_recomputable
from memsave.surgery.dataflow import Dataflow
from memsave.surgery.pairs import Activation, Pair, Refusal, find_pair

__all__ = [
    "LOSSLESS",
    "NORM_TECHNIQUES",
    "ReluChoice",
    "Replacement",
    "activation_layer",
    "decide",
    "takes",
]

ReluChoice = Literal["keep", "leaky"]

# technique -> the norms it takes; None: all that it can rebuild
NORM_TECHNIQUES: dict[str, tuple[type[nn.Module], ...] | None] = {
    "inplace_abn": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "inplace_group_norm": (nn.GroupNorm,),
    "inplace_instance_norm": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "recomputed_norm_act": None,
}
LOSSLESS = "recomputed_norm_act"
_LEAKY_SLOPE = 0.01
_INVERTIBLE: dict[str, Literal["leaky_relu", "elu"]] = {"LeakyReLU": "leaky_relu", "ELU": "elu"}
# Functions whose only option is the one that an Activation holds
_AS_LAYER: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "ELU": nn.ELU, "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replacement:
    """A norm, and its activation if it has one, to be replaced by one layer."""

    technique: str
    pair: Pair
    activation: Literal["leaky_relu", "elu", "identity"] = "identity"  # of an in-place norm
    parameter: float = _LEAKY_SLOPE
    remark: str = ""  # what the user must know: that the network changes


def takes(technique: str, norm: nn.Module) -> bool:
    """Whether ``norm`` is of the kind that ``technique`` is about."""
    kinds = NORM_TECHNIQUES[technique]
    return kinds is None or type(norm) in kinds


def decide(
    technique: str,
    name: str,
    norm: nn.Module,
    flows: Sequence[Dataflow],
    model: nn.Module,
    relu: ReluChoice,
    reorder: bool,
) -> Replacement | Refusal:
    """Return how ``technique`` replaces the norm called ``name``, or why it leaves it."""
    if not takes(technique, norm):
        kinds = " and ".join(kind.__name__ for kind in NORM_TECHNIQUES[technique] or ())
        return Refusal(f"it is {type(norm).__name__}, and {technique} takes {kinds}")
    in_place = technique != LOSSLESS
    pair = find_pair(name, flows, model, reorder=reorder and in_place)
    if isinstance(pair, Refusal):
        return pair
    if hooked := _hooked(norm, pair.activation, model):
        return hooked
    if in_place:
        return _decide_in_place(technique, norm, pair, relu)
    return _decide_recomputed(norm, pair, model)


def _decide_in_place(
    technique: str, norm: nn.Module, pair: Pair, relu: ReluChoice
) -> Replacement | Refusal:
    fused = _invertible(pair, technique, relu)
    refusals = [
        fused if isinstance(fused, Refusal) else None,
        _bad_norm(norm),
        None if _asks_to_reorder(pair) else pair.not_over_input,
        pair.result_overwritten,
    ]
    against = [refusal for refusal in refusals if refusal is not None]
    if isinstance(fused, Refusal) or against:
        reasons = "; ".join(refusal.reason for refusal in against)
        return Refusal(reasons, any(refusal.wrong for refusal in against))
    remarks = [fused.remark]
    if pair.order == "activation_norm":
        remarks.append("the norm comes first now, which changes what the network computes")
    if pair.result_leaves:
        remarks.append("its result is the model's own: backward overwrites it, so read it before")
    return replace(fused, remark="; ".join(filter(None, remarks)))


def _asks_to_reorder(pair: Pair) -> bool:
    """Whether an activation before the norm is all that the norm has: its input, and no other."""
    return pair.activation is None and pair.before is not None


def _invertible(pair: Pair, technique: str, relu: ReluChoice) -> Replacement | Refusal:
    activation = pair.activation
    if activation is None:
        if pair.before is not None:
            return Refusal(
                f"{pair.before.kind} comes before it: reorder=True swaps the two, which changes "
                "what the network computes",
                wrong=True,
            )
        return Replacement(technique, pair)
    if activation.kind == "ReLU":
        if relu == "leaky":
            remark = "ReLU became leaky ReLU 0.01, which changes what the network computes"
            return Replacement(technique, pair, "leaky_relu", _LEAKY_SLOPE, remark)
        return Refusal(
            f"ReLU cannot be inverted: relu='leaky' makes it leaky ReLU {_LEAKY_SLOPE}, which "
            "changes what the network computes",
            wrong=True,
        )
    if activation.kind not in _INVERTIBLE:
        return Refusal(
            f"{activation.kind} cannot be inverted: leaky ReLU, ELU and no activation can"
        )
    if not activation.parameter > 0:
        return Refusal(
            f"{activation.kind} has {activation.parameter:g} for its slope, and only one of more "
            "than 0 can be inverted",
            wrong=True,
        )
    return Replacement(technique, pair, _INVERTIBLE[activation.kind], activation.parameter)


def _bad_norm(norm: nn.Module) -> Refusal | None:
    if getattr(norm, "running_mean", None) is not None and isinstance(
        norm, nn.modules.instancenorm._InstanceNorm
    ):
        return Refusal("it has running statistics, which in-place instance norm does not keep")
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, FakeTensor) or weight.is_meta:
        return None
    negative = int((weight < 0).sum())
    if negative:
        return Refusal(
            f"{negative} of its {weight.numel()} scales are negative, and in-place norms use "
            "their absolute values",
            wrong=True,
        )
    return None


def _decide_recomputed(norm: nn.Module, pair: Pair, model: nn.Module) -> Replacement | Refusal:
    if pair.result_overwritten is not None:
        return pair.result_overwritten
    activation = pair.activation
    if activation is not None and activation.module is None and activation.kind not in _AS_LAYER:
        return Refusal(f"{activation.place} is a function with options: make it a layer")
    try:
        check_recomputable(norm, activation_layer(activation, model))
    except OptionError as error:
        return Refusal(str(error))
    return Replacement(LOSSLESS, pair)


def activation_layer(activation: Activation | None, model: nn.Module) -> nn.Module | None:
    """Return the activation as a layer of its own, its parameters those of the model's."""
    if activation is None:
        return None
    if activation.module is not None:
        return copy.copy(model.get_submodule(activation.module))
    kind = _AS_LAYER[activation.kind]
    return kind(activation.parameter) if kind in (nn.LeakyReLU, nn.ELU) else kind()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(norm: nn.Module, activation: Activation | None, model: nn.Module) -> Refusal | None:
    modules = [norm]
    if activation is not None and activation.module is not None:
        modules.append(model.get_submodule(activation.module))
    if any(getattr(module, hooks) for module in modules for hooks in _HOOKS):
        return Refusal("it or its activation has hooks, which would see other tensors")
    return None
