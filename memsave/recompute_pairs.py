"""Puts ``RecomputedNormAct`` where a model has a norm and an activation, names unchanged."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from memsave.errors import OptionError
from memsave.recomputed_norm_act import Order, RecomputedNormAct, check_recomputable

__all__ = ["recompute_pair", "recompute_pairs"]

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip


def recompute_pair(
    parent: nn.Module, norm_name: str, activation_name: str, *, order: Order = "norm_act"
) -> RecomputedNormAct:
    """Replace two children of ``parent`` that run one right after the other; return the new one.

    It stands in the norm's place. In the activation's stays a module that does nothing, under
    which the activation's own weights (PReLU) keep their names. So the state dict of the whole
    model keeps its keys, and a plain model's loads (but not with ``assign=True``, which would
    part the two holders of a PReLU's weight).

    Errors: OptionError where ``RecomputedNormAct`` cannot take the pair, or where the activation
        has more than weights of its own.
    """
    norm, activation = parent.get_submodule(norm_name), parent.get_submodule(activation_name)
    check_recomputable(norm, activation)
    if any(True for _ in activation.children()) or any(True for _ in activation.buffers()):
        raise OptionError(
            f"activation {activation_name!r} ({type(activation).__name__}) has modules or buffers "
            "of its own, whose names would change: give it to RecomputedNormAct by hand"
        )
    pair = RecomputedNormAct(norm, activation, order=order)
    pair.train(norm.training)
    pair.activation_named_elsewhere = True
    setattr(parent, norm_name, pair)
    setattr(parent, activation_name, _Elsewhere(activation))
    return pair


def recompute_pairs(model: nn.Module) -> int:
    """Replace every norm and activation that are neighbours in an ``nn.Sequential``; count them.

    Both orders are found. From the left, so of activation, norm, activation the first two are a
    pair. What ``RecomputedNormAct`` refuses is left as it is.
    """
    sequences = [m for m in model.modules() if type(m).forward is nn.Sequential.forward]
    return sum(_replace_in(sequence) for sequence in sequences)


def _replace_in(sequence: nn.Module) -> int:
    replaced, used = 0, ""
    for (name, module), (next_name, following) in pairwise(list(sequence.named_children())):
        if name == used:
            continue
        if isinstance(module, _NORMS) and isinstance(following, _ACTIVATIONS):
            norm_name, activation_name, order = name, next_name, "norm_act"
        elif isinstance(module, _ACTIVATIONS) and isinstance(following, _NORMS):
            norm_name, activation_name, order = next_name, name, "act_norm"
        else:
            continue
        try:
            recompute_pair(sequence, norm_name, activation_name, order=order)  # type: ignore[arg-type]
        except OptionError:
            continue
        replaced, used = replaced + 1, next_name
    return replaced


class _Elsewhere(nn.Module):
    """Stands where an activation stood that runs with its norm, and keeps its weights' names."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.runs_as = type(activation).__name__
        for name, parameter in activation.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``: the activation has been applied, or will be."""
        return x

    def extra_repr(self) -> str:
        """Return what runs with the norm."""
        return f"{self.runs_as} runs with its norm"
