"""Techniques on any user's network: ``apply`` finds where they fit, changes it, and reports.

How norms and activations are found: ``memsave/surgery/pairs.py``. What decides about each:
``memsave/surgery/replacements.py``. What takes their place: ``memsave/surgery/stand_ins.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from memsave.checkpoint import checkpoint_block
from memsave.checkpoint_selective import checkpoint_selective
from memsave.errors import OptionError, UnknownNameError
from memsave.surgery.decisions import NORM_TECHNIQUES, ReluChoice
from memsave.surgery.replacements import Replacements
from memsave.surgery.report import Change, Kept, report
from memsave.surgery.stand_ins import Snapshot
from memsave.technique_pairs import check_pairs
from memsave.techniques import NamesBlocks, Technique, find_technique, parse_options

__all__ = ["Applied", "TechniqueEntry", "apply"]

# "checkpoint", ("checkpoint", {"every": 2}) or {"checkpoint": {"every": 2}}
TechniqueEntry: TypeAlias = "str | tuple[str, Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]"

# what these techniques do to one block, which in a network of the user's own the user names
_BY_BLOCK: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": checkpoint_block,
    "checkpoint_selective": checkpoint_selective,
}


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """What ``apply`` did to a model, and what a training step needs besides. Prints as a report."""

    model: nn.Module  # the model given, changed in place
    replaced: tuple[Change, ...]
    kept: tuple[Kept, ...]  # norms left as they were, with the reason
    notes: tuple[str, ...]  # how the norms were found
    dry_run: bool
    techniques: tuple[tuple[Technique, Any], ...]

    @property
    def saved_bytes(self) -> int | None:
        """Bytes of activations no longer kept by replaced norms; None without example inputs."""
        known = [change.saved_bytes for change in self.replaced if change.saved_bytes is not None]
        return sum(known) if known else None

    def step(self) -> AbstractContextManager[None]:
        """Return what belongs around forward and backward of one step; often nothing."""
        scopes = ExitStack()
        used = {change.technique for change in self.replaced}
        try:
            for technique, options in sorted(self.techniques, key=lambda t: t[0].step_order):
                if technique.name in NORM_TECHNIQUES and technique.name not in used:
                    continue  # it found no place, so there is nothing to enter
                scopes.enter_context(technique.step(self.model, options))
        except BaseException:
            scopes.close()
            raise
        return scopes  # type: ignore[return-value]

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to use: the one given, unless a technique acts on it."""
        for technique, options in self.techniques:
            optimizer = technique.optimizer(optimizer, self.model, options)
        return optimizer

    def __str__(self) -> str:
        name = type(self.model).__name__
        return report(name, self.replaced, self.kept, self.notes, self.dry_run, self.saved_bytes)


def apply(
    model: nn.Module,
    techniques: str | Sequence[TechniqueEntry] | Mapping[str, Mapping[str, Any]],
    *,
    example_inputs: Any = None,
    relu: ReluChoice = "keep",
    reorder: bool = False,
    dry_run: bool = False,
) -> Applied:
    """Apply techniques to ``model`` in place; say what was changed, what was not, and why.

    A norm and the activation that alone reads its result become one layer::

        applied = memsave.apply(model, ["inplace_abn"], example_inputs=image)
        print(applied)

    Pairs are found in a run of ``model`` on ``example_inputs`` without memory or arithmetic (fake
    tensors), in training and in evaluation; without example inputs by ``torch.fx``, then by a run
    on inputs made up for its first convolution. What a forward that depends on its input's values
    hides is looked for in its parts. Where nothing proves a pair, it is left, and reported.

    Several norm techniques share the norms: the first named takes what it can, the next the rest,
    so ``["inplace_abn", "recomputed_norm_act"]`` leaves to the second what the first must refuse.

    Memory: a pair no longer keeps its norm's input beside its result (``recomputed_norm_act``:
        the result beside the input); ``saved_bytes`` counts them from the shapes.
    Exact: as the techniques named. Parameters and buffers are the same objects, so an optimizer
        made before stays right, and state-dict keys stay. The in-place norms use
        ``|weight| + eps`` as scale.
    Errors: UnknownNameError for a technique or option; OptionError for options, for techniques
        that do not go together (``memsave/PAIRS.md``), for a technique without any place in this
        model, and where all places would be wrong ones: then the message says why and what to use
        instead. The model is untouched after any error.

    Args:
        model: changed in place; the same object is ``Applied.model``.
        techniques: names of ``memsave.TECHNIQUES``, with options as ``("checkpoint", {"every":
            2})`` or ``{"checkpoint": {"every": 2}}``; or one mapping of names to options.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments of the
            forward. Only shapes and types matter; tensors of device "meta" will do.
        relu: what in-place norms do about ReLU, which cannot be inverted: ``"keep"`` leaves the
            pair, ``"leaky"`` makes it leaky ReLU 0.01, which changes what the network computes.
        reorder: let in-place norms take activation -> norm as norm -> activation, which changes
            what the network computes.
        dry_run: report, and leave the model as it is.
    """
    entries = _entries(techniques)
    if relu not in ("keep", "leaky"):
        raise OptionError(f"relu must be 'keep' or 'leaky', got {relu!r}")
    snapshot = Snapshot(model)
    try:
        applied = _apply(model, entries, example_inputs, relu, reorder, dry_run)
    except BaseException:
        snapshot.restore()
        raise
    if dry_run:
        snapshot.restore()
    return applied


def _apply(
    model: nn.Module,
    entries: tuple[tuple[Technique, Any], ...],
    example_inputs: Any,
    relu: ReluChoice,
    reorder: bool,
    dry_run: bool,
) -> Applied:
    norms = [technique.name for technique, _ in entries if technique.name in NORM_TECHNIQUES]
    replacements = Replacements(model, example_inputs)
    replacements.plan(norms, relu=relu, reorder=reorder, strict=not dry_run)
    changes = replacements.carry_out()
    changed = model
    for technique, options in entries:
        if technique.name not in NORM_TECHNIQUES:
            changed, more = _act_on_module(changed, technique, options)
            changes += more
    replacements.check_regions(changed)
    return Applied(
        changed, tuple(changes), tuple(replacements.kept), replacements.notes, dry_run, entries
    )


def _entries(techniques: Any) -> tuple[tuple[Technique, Any], ...]:
    """Read the techniques and their options, each once."""
    if not isinstance(techniques, str | Mapping | Sequence):
        raise OptionError(f"techniques are a list of names, as ['inplace_abn'], got {techniques!r}")
    given = [techniques] if isinstance(techniques, str | Mapping) else list(techniques)
    entries: list[tuple[Technique, Any]] = []
    for entry in given:
        for name, options in _named_options(entry):
            technique = find_technique(name)
            if any(technique is other for other, _ in entries):
                raise OptionError(f"technique {name!r} is named twice: name it once")
            entries.append((technique, parse_options(technique, options or {})))
    check_pairs(entries, in_apply=True)
    return tuple(entries)


def _named_options(entry: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(entry, str):
        return [(entry, {})]
    if isinstance(entry, Mapping):
        return list(entry.items())
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
        return [(entry[0], entry[1])]
    raise OptionError(
        f"a technique is its name, (name, options) or {{name: options}}, got {entry!r}"
    )


def _act_on_module(
    model: nn.Module, technique: Technique, options: Any
) -> tuple[nn.Module, list[Change]]:
    """Let a technique that is not about norms act; report the modules whose class it changed."""
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    if technique.name in _BY_BLOCK and not isinstance(model, NamesBlocks):
        changed = _checkpoint_named_blocks(model, options, technique.name)
    elif _acts(technique):
        changed = technique.module(model, options)
    else:
        raise OptionError(
            f"technique {technique.name!r} acts when a network is built: give it to the network's "
            "options, apply() cannot"
        )
    changes = [
        Change((name,), f"{kind.__name__} by {type(module).__name__}", technique.name)
        for name, module in changed.named_modules()
        for identity, kind in [before.get(name, (id(module), type(module)))]
        if (identity, kind) != (id(module), type(module))
    ]
    return changed, changes


def _acts(technique: Technique) -> bool:
    places: tuple[Literal["module", "step", "optimizer"], ...] = ("module", "step", "optimizer")
    defaults = Technique.__dataclass_fields__
    return any(getattr(technique, place) is not defaults[place].default for place in places)


def _checkpoint_named_blocks(model: nn.Module, options: Any, technique: str) -> nn.Module:
    """Checkpoint the blocks that the user names, in a network that does not name them itself."""
    modules = {name: module for name, module in model.named_modules() if name}
    if not options.blocks:
        raise OptionError(
            f"{type(model).__name__} does not say what may be checkpointed: name its blocks, as in "
            f'("{technique}", {{"blocks": {_candidates(model)}}})'
        )
    for name in options.blocks:
        if name not in modules:
            raise UnknownNameError("block", name, modules)
    for name in options.blocks:
        _BY_BLOCK[technique](modules[name])
    return model


def _candidates(model: nn.Module, most: int = 12) -> list[str]:
    """Return the names of the outermost modules that have parts and are called themselves."""
    found: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += [f"{name}.{inner}" for inner, part in child.named_children() if _parts(part)]
        elif _parts(child):
            found.append(name)
    return found[:most]


def _parts(module: nn.Module) -> int:
    return sum(1 for _ in module.children())
