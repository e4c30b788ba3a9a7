"""Which norms of a model a technique replaces, and why it leaves the others.

A plan is made for the whole model first; nothing changes until it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from memsave.errors import OptionError, RefusedError
from memsave.recomputed_norm_act import RecomputedNormAct, attach_recompute
from memsave.surgery.dataflow import Dataflow, is_memsave_class
from memsave.surgery.decisions import (
    LOSSLESS,
    NORM_TECHNIQUES,
    ReluChoice,
    Replacement,
    activation_layer,
    decide,
    takes,
)
from memsave.surgery.find_dataflows import find_dataflows
from memsave.surgery.pairs import Pair, Refusal, describe_norms
from memsave.surgery.regions import check_regions
from memsave.surgery.report import Change, Kept
from memsave.surgery.stand_ins import (
    IN_PLACE_CLASSES,
    make_in_place,
    mark_results,
    rest_always,
    rest_functions,
    rest_when_marked,
)

__all__ = ["Replacements"]


@dataclass
class Replacements:
    """The norms of a model: what is planned for each, and what is not."""

    model: nn.Module
    example_inputs: Any
    kept: list[Kept] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    planned: dict[str, Replacement] = field(default_factory=dict)
    _flows: list[Dataflow] | None = None

    def plan(
        self, techniques: Sequence[str], *, relu: ReluChoice, reorder: bool, strict: bool
    ) -> None:
        """Decide for every norm. ``strict``: raise for a technique that must refuse all."""
        if not techniques:
            return
        norms = _norms(self.model)
        refusals: dict[str, dict[str, Refusal]] = {name: {} for name in norms}
        for technique in techniques:
            self._plan_one(technique, norms, refusals, relu, reorder)
            self._drop_impossible(refusals)
        if strict:
            for technique in techniques:
                self._require_some(technique, norms, refusals)
        for name, by_technique in refusals.items():
            if name not in self.planned:
                self.kept.append(self._kept(name, by_technique))

    def carry_out(self) -> list[Change]:
        """Change the model as planned; return what was changed."""
        changes = [_change(r, self.model) for r in self.planned.values()]
        norms = {name: self.model.get_submodule(name) for name in self.planned}
        layers = {
            r.pair.activation.module: self.model.get_submodule(r.pair.activation.module)
            for r in self.planned.values()
            if r.pair.activation is not None and r.pair.activation.module is not None
        }
        fused = {name: self._fuse(norms[name], self.planned[name]) for name in self.planned}
        for name, replacement in self.planned.items():
            self._rest(fused[name], replacement, layers)
        if any(r.technique == LOSSLESS for r in self.planned.values()):
            attach_recompute(self.model)
        return changes

    def check_regions(self, model: nn.Module) -> None:
        """Raise RefusedError if a checkpointed region starts by overwriting its own input."""
        check_regions(model, self._all_flows, {n: r.pair for n, r in self.planned.items()})

    def _all_flows(self) -> list[Dataflow]:
        if self._flows is None:
            self._flows, self.notes = find_dataflows(
                self.model, self.example_inputs, tuple(_norms(self.model))
            )
        return self._flows

    def _plan_one(
        self,
        technique: str,
        norms: Mapping[str, nn.Module],
        refusals: dict[str, dict[str, Refusal]],
        relu: ReluChoice,
        reorder: bool,
    ) -> None:
        for name, norm in norms.items():
            if name in self.planned:
                continue
            found = decide(technique, name, norm, self._all_flows(), self.model, relu, reorder)
            if isinstance(found, Refusal):
                refusals[name][technique] = found
            else:
                self.planned[name] = found

    def _drop_impossible(self, refusals: dict[str, dict[str, Refusal]]) -> None:
        """Take back what cannot be carried out, until the rest of the plan stands."""
        while True:
            dropped = {name: self._impossible(r.pair) for name, r in self.planned.items()}
            reasons = {name: reason for name, reason in dropped.items() if reason is not None}
            for name, reason in reasons.items():
                refusals[name][self.planned.pop(name).technique] = reason
            if not reasons:
                return

    def _impossible(self, pair: Pair) -> Refusal | None:
        if pair.activation is None:
            return None
        place = pair.activation.place
        if pair.order == "activation_norm" and not self._precedes_planned_only(pair):
            return Refusal(f"{place} before it also serves elsewhere: they cannot be swapped", True)
        if pair.order == "norm_activation" and not pair.direct and not self._rests(pair):
            return Refusal(f"{place} also serves elsewhere, and a layer stands before it")
        return None

    def _precedes_planned_only(self, pair: Pair) -> bool:
        if pair.activation is None or pair.activation.module is None:
            return False
        for flow in self._all_flows():
            for call in flow.of_module(pair.activation.module):
                if call.result is None or call.result.is_result or not call.result.readers:
                    return False
                for reader in call.result.readers:
                    planned = self.planned.get(reader.module or "")
                    if planned is None or planned.pair.order != "activation_norm":
                        return False
        return True

    def _kept(self, name: str, refusals: Mapping[str, Refusal]) -> Kept:
        reasons = [f"{technique}: {refusal.reason}" for technique, refusal in refusals.items()]
        if len(refusals) == 1:
            reasons = [refusal.reason for refusal in refusals.values()]
        wrong = any(refusal.wrong for refusal in refusals.values())
        if wrong and LOSSLESS not in refusals and self._twin_takes(name):
            reasons.append(f"{LOSSLESS} takes it without changing the network")
        return Kept((name,), "; ".join(reasons), wrong)

    def _twin_takes(self, name: str) -> bool:
        norm = self.model.get_submodule(name)
        found = decide(LOSSLESS, name, norm, self._all_flows(), self.model, "keep", False)
        return isinstance(found, Replacement)

    def _rests(self, pair: Pair) -> bool:
        """Whether the activation is a layer that has nothing left to do."""
        if pair.activation is None or pair.activation.module is None:
            return False
        for flow in self._all_flows():
            for call in flow.of_module(pair.activation.module):
                producer = call.argument.producer if call.argument is not None else None
                planned = self.planned.get(producer.module or "") if producer is not None else None
                if planned is None or planned.pair.order != "norm_activation":
                    return False
        return True

    def _require_some(
        self,
        technique: str,
        norms: Mapping[str, nn.Module],
        refusals: Mapping[str, Mapping[str, Refusal]],
    ) -> None:
        if any(r.technique == technique for r in self.planned.values()):
            return
        if not any(takes(technique, norm) for norm in norms.values()):
            kinds = Counter(type(norm).__name__ for norm in norms.values())
            has = (
                ", ".join(f"{count} {kind}" for kind, count in kinds.items())
                or "none left to replace"
            )
            raise OptionError(
                f"technique {technique!r} finds no norm of its kind in "
                f"{type(self.model).__name__} ({has}): {_fitting(kinds)}"
            )
        # What another technique of the list takes is nobody's loss.
        left = {name: found for name, found in refusals.items() if name not in self.planned}
        mine = {name: found[technique] for name, found in left.items() if technique in found}
        if any(refusal.wrong for refusal in mine.values()):
            message = _refused_all(technique, type(self.model).__name__, mine)
            if technique != LOSSLESS and any(self._twin_takes(name) for name in mine):
                message += f". {LOSSLESS} saves as much and changes nothing"
            raise RefusedError(message)

    def _fuse(self, norm: nn.Module, replacement: Replacement) -> nn.Module:
        if replacement.technique != LOSSLESS:
            make_in_place(norm, replacement.activation, replacement.parameter)
            return norm
        fused = RecomputedNormAct(norm, activation_layer(replacement.pair.activation, self.model))
        fused.training = norm.training
        activation = replacement.pair.activation
        fused.activation_named_elsewhere = activation is not None and activation.module is not None
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if child is norm and parent is not fused:
                    parent._modules[name] = fused
        return fused

    def _rest(
        self, fused: nn.Module, replacement: Replacement, layers: Mapping[str, nn.Module]
    ) -> None:
        """Keep the activation, applied by ``fused`` now, from being applied again."""
        activation = replacement.pair.activation
        if activation is None:
            return
        if activation.module is None:
            mark_results(fused)
            rest_functions(self.model.get_submodule(activation.owner))
        elif replacement.pair.order == "activation_norm" or self._rests(replacement.pair):
            rest_always(layers[activation.module])
        else:
            mark_results(fused)
            rest_when_marked(layers[activation.module])


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return torch's norms of ``model``, without those that a technique has replaced before."""
    inside = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, RecomputedNormAct)
    )
    return {
        name: norm
        for name, norm in describe_norms(model).items()
        if not is_memsave_class(type(norm)) and not name.startswith(inside)
    }


def _change(replacement: Replacement, model: nn.Module) -> Change:
    """Describe a replacement, before it is made."""
    pair = replacement.pair
    norm = model.get_submodule(pair.norm)
    places, kinds = [pair.norm], [type(norm).__name__]
    if pair.activation is not None:
        places.append(pair.activation.place)
        kinds.append(pair.activation.kind)
    if pair.order == "activation_norm":
        places.reverse()
        kinds.reverse()
    by = "RecomputedNormAct"
    if replacement.technique != LOSSLESS:
        by = IN_PLACE_CLASSES[type(norm)].__name__
    remark = f"; {replacement.remark}" if replacement.remark else ""
    reason = f"{' + '.join(kinds)} by {by}{remark}"
    return Change(tuple(places), reason, replacement.technique, pair.saved_bytes)


def _fitting(kinds: Counter[str]) -> str:
    for technique, classes in NORM_TECHNIQUES.items():
        if any(kind.__name__ in kinds for kind in classes or ()):
            return f"use {technique}"
    return "leave this technique out"


def _refused_all(technique: str, model: str, refusals: Mapping[str, Refusal]) -> str:
    """One line: how many norms for each reason, with the first one's name."""
    by_reason: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        by_reason.setdefault(refusal.reason, []).append(name)
    wrong = {refusals[names[0]].reason for names in by_reason.values() if refusals[names[0]].wrong}
    reasons = sorted(by_reason.items(), key=lambda item: (item[0] not in wrong, -len(item[1])))
    told = "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons[:3]
    )
    more = (
        f"; {len(reasons) - 3} other reasons (dry_run=True lists all)" if len(reasons) > 3 else ""
    )
    return f"{technique} can replace nothing in {model}: {told}{more}"
