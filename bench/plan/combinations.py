"""Which combinations of techniques, precisions and, if allowed, architectures a plan tries.

What a network has no place for is found by trying each technique alone; combinations are then made
of those that worked. Pairs that do the same thing twice are left out.

Every technique of memsave's table is tried, with these options: ``checkpoint`` on every block;
``checkpoint_budget`` at the least peak, and where a card asks for less at the budget that it
leaves (``bench.plan.placed``); ``checkpoint_steps`` every 8 steps, and nested; ``tiled_levels`` on
one level and on two; ``compress_activations`` in all its formats, on any card: fp8 is a format to
keep values in, converted by ordinary kernels, and asks for no compute capability. Blocks (among
them the reversible one) and widths make another network, and are tried only where that is allowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.case import Case, Precision, TechniqueUse

__all__ = ["architectures", "combined", "single", "variant_name"]

Uses = tuple[TechniqueUse, ...]

# A norm option of memsave's networks -> the technique that keeps less for the same layer.
_TWINS = {
    "batch_norm": "inplace_abn",
    "batch_norm_leaky_relu": "inplace_abn",
    "group_norm_leaky_relu": "inplace_group_norm",
    "instance_norm_leaky_relu": "inplace_instance_norm",
}
_RECOMPUTED = TechniqueUse(name="recomputed_norm_act")
_CHECKPOINT = TechniqueUse(name="checkpoint")
_PLACED = TechniqueUse(name="checkpoint_budget")  # with no budget: the placement of least peak
_SELECTIVE = TechniqueUse(name="checkpoint_selective")
_STEPS = (
    TechniqueUse(name="checkpoint_steps", options={"every": 8}),
    TechniqueUse(name="checkpoint_steps", options={"nested": True}),
)
_TILES = TechniqueUse(name="tiled_levels")
_TWO_TILED = TechniqueUse(name="tiled_levels", options={"levels": 2})
_OFFLOAD = TechniqueUse(name="offload")
_INT8 = TechniqueUse(name="compress_activations", options={"format": "int8"})
_FP8 = TechniqueUse(name="compress_activations", options={"format": "fp8"})
_BF16 = TechniqueUse(name="compress_activations", options={"format": "bf16"})
_IN_BACKWARD = TechniqueUse(name="optimizer_in_backward")
_HELD = (None, _CHECKPOINT, _PLACED, _SELECTIVE, *_STEPS, _TILES, _TWO_TILED)
_MOVED = (None, _OFFLOAD, _INT8, _FP8, _BF16)


def single(case: Case) -> list[Case]:
    """Return the case itself, and with each technique that its network may take, alone."""
    uses: list[TechniqueUse] = [*_norms(case)]
    if case.mode == "train":
        uses += [use for use in (*_HELD, *_MOVED) if use is not None]
        uses.append(_IN_BACKWARD)
    else:
        uses = [use for use in uses if use != _RECOMPUTED]
    return [_with(case, ()), *(_with(case, (use,)) for use in uses if _at(use, case.precision))]


def combined(
    case: Case,
    working: Collection[TechniqueUse],
    precisions: Sequence[Precision],
    allow_architecture: bool,
) -> list[Case]:
    """Return every combination of techniques in ``working`` at every precision, each once."""
    found: dict[str, Case] = {}
    for precision in precisions:
        base = replace(case, precision=precision)
        for uses in _sets([use for use in _norms(case) if use in working], case.mode):
            if all(use in working and _at(use, precision) for use in uses):
                made = _with(base, uses)
                found[made.digest()] = made
        for options in architectures(case) if allow_architecture else ():
            other = replace(base, network_options={**case.network_options, **options})
            for uses in _small_sets(_norms(other), working, case.mode, len(options)):
                made = _with(other, uses)
                found[made.digest()] = made
    return list(found.values())


def architectures(case: Case) -> list[dict[str, Any]]:
    """Return options that make one of memsave's networks a smaller one: compact, pocket widths.

    Only options that the user left open are touched.
    """
    if case.imported is not None:
        return []
    from memsave.blocks import BLOCKS

    options = _open_options(case)
    blocks = [name for name in BLOCKS if name != "double_conv"]
    found: list[dict[str, Any]] = []
    if options.get("block") == "double_conv":
        found += [{"block": name} for name in blocks]
    if options.get("widths") == "doubling":
        found += [{"widths": "pocket"}, *({**block, "widths": "pocket"} for block in found[-1:])]
    return found


def variant_name(case: Case, uses: Uses) -> str:
    """Return what a combination is called, as suites allow: ``ccblock+checkpoint+fp16``."""
    before = {} if case.imported is not None else case.network_options
    parts = [str(v) for k, v in before.items() if k in ("block", "widths") and isinstance(v, str)]
    parts += [_use_name(use) for use in uses]
    if case.precision != "fp32":
        parts.append(case.precision)
    return "+".join(parts) or "plain"


def _use_name(use: TechniqueUse) -> str:
    budget = use.options.get("budget")
    if isinstance(budget, int):
        return f"{use.name}-{budget / 2**30:.2f}GiB"
    return "-".join((use.name, *(f"{key}-{value}" for key, value in use.options.items())))


def _with(case: Case, uses: Uses) -> Case:
    return replace(case, techniques=uses, variant=variant_name(case, uses))


def _at(use: TechniqueUse, precision: Precision) -> bool:
    from memsave.techniques import find_technique

    if use == _BF16 and precision != "fp32":
        return False  # most of what is kept has two bytes already
    return precision in find_technique(use.name).precisions


def _open_options(case: Case) -> dict[str, Any]:
    """Return the options of one of memsave's networks that the user left open, with defaults."""
    from memsave.networks import find_network

    parameters = inspect.signature(find_network(case.network).factory).parameters
    return {k: p.default for k, p in parameters.items() if k not in case.network_options}


def _norms(case: Case) -> list[TechniqueUse]:
    if case.imported is not None:
        names: Sequence[str] = tuple(dict.fromkeys(_TWINS.values()))
    else:
        norm = case.network_options.get("norm", _open_options(case).get("norm"))
        names = [_TWINS[norm]] if isinstance(norm, str) and norm in _TWINS else []
    return [*(TechniqueUse(name=name) for name in names), _RECOMPUTED]


def _sets(norms: Sequence[TechniqueUse], mode: str) -> Iterator[Uses]:
    if mode == "infer":
        yield ()
        yield from ((norm,) for norm in norms if norm != _RECOMPUTED)
        return
    for norm in (None, *norms):
        for held in _HELD:
            for moved in _MOVED:
                if _sensible(norm, held, moved):
                    yield tuple(use for use in (norm, held, moved) if use is not None)
    for others in ((), (_CHECKPOINT,), (_OFFLOAD,), (_CHECKPOINT, _OFFLOAD), (_TILES,)):
        yield (*others, _IN_BACKWARD)


def _sensible(
    norm: TechniqueUse | None, held: TechniqueUse | None, moved: TechniqueUse | None
) -> bool:
    """Leave out what does one thing twice, or keeps both of two that free the same bytes."""
    if held in (_SELECTIVE, _PLACED) and (norm == _RECOMPUTED or moved is not None):
        return False
    if held in (*_STEPS, _TWO_TILED):
        return moved is None
    if moved == _FP8:  # as many bytes as int8, so what goes with it is tried with that alone
        return norm is None and held is None
    if moved in (_INT8, _BF16):
        return held is None or (held == _CHECKPOINT and norm is None and moved == _INT8)
    return True


def _small_sets(
    norms: Sequence[TechniqueUse], working: Collection[TechniqueUse], mode: str, changed: int
) -> Iterator[Uses]:
    """Yield what is combined with another architecture: norms, and one way to keep less."""
    norms = [norm for norm in norms if norm in working and (mode == "train" or norm != _RECOMPUTED)]
    for norm in ((), *((norm,) for norm in norms)):
        yield norm
        if mode == "train" and changed == 1:
            for held in (_CHECKPOINT, _OFFLOAD):
                if held in working:
                    yield (*norm, held)
