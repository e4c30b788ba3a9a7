"""The names and options in a suite, checked against what memsave, the workload and the cards have.

The one place of a suite that imports torch: networks are built on the meta device, which holds no
data, so that an option is checked by the code that will use it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import MembenchError, nearest
from bench.imported import Imported, check_reference, is_reference, label
from bench.shapes import Shape
from bench.suite.document import Mistake, Place
from bench.suite.entries import SomeNetwork
from bench.suite.schema import AnyEntry, ScheduleEntry, SuiteFile, Training

if TYPE_CHECKING:
    from memsave.networks import NetworkSpec
    from memsave.techniques import Technique

__all__ = ["Row", "find_rows", "name_mistakes"]


@dataclass(frozen=True, slots=True)
class Row:
    """An entry of ``matrix.networks`` or ``include``, and what its network asks of a shape."""

    place: Place
    network: str
    entry: AnyEntry
    spatial_dims: int
    divisor: Shape
    loss: str
    imported: Imported | None = None  # then spatial_dims is 0: its images may have any number


class _Wrong(Exception):
    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.text)
        self.mistake = mistake


def name_mistakes(suite: SuiteFile) -> list[Mistake]:
    """Return what is wrong with the suite's own card and training."""
    from bench.predict.cards import find_card

    mistakes = []
    try:
        if suite.card is not None:
            with _pointing(("card",), {}):
                find_card(suite.card)
    except _Wrong as wrong:
        mistakes.append(wrong.mistake)
    try:
        _check_training(suite.training, ("training",))
    except _Wrong as wrong:
        mistakes.append(wrong.mistake)
    return mistakes


def find_rows(suite: SuiteFile) -> tuple[list[Row], list[Mistake]]:
    """Return the suite's rows, those of the matrix first, and the first mistake of each other."""
    rows: list[Row] = []
    mistakes: list[Mistake] = []
    for place, some, entry in _entries(suite):
        try:
            rows.append(_row(place, some, entry, suite.training))
        except _Wrong as wrong:
            mistakes.append(wrong.mistake)
    return rows, mistakes


def _entries(suite: SuiteFile) -> Iterator[tuple[Place, SomeNetwork, AnyEntry]]:
    for i, entry in enumerate(suite.matrix.networks if suite.matrix else ()):
        network = entry.network or SomeNetwork(name=entry.name)
        if entry.name and entry.network is not None:
            network = network.model_copy(update={"name": entry.name})
        yield ("matrix", "networks", i), network, entry
    for i, included in enumerate(suite.include):
        yield ("include", i), included.network, included


def _row(place: Place, some: SomeNetwork, entry: AnyEntry, shared: Training) -> Row:
    from bench.predict.cards import find_card
    from memsave.networks import NETWORKS

    if entry.card is not None:
        with _pointing((*place, "card"), {}):
            find_card(entry.card)
    if some.imported is not None:
        return _imported_row(place, some, some.imported, entry, shared)
    network = some.name or ""
    key = "network" if place[0] == "include" else "name"
    _check_known((*place, key), "unknown network", network, NETWORKS)
    spec = NETWORKS[network]
    options = inspect.signature(spec.factory).parameters
    _check_keys(place, entry.options, f"no option of {network}", options, type(entry).model_fields)
    if entry.training is not None:
        _check_training(entry.training, (*place, "training"))
    loss = _loss(*_training(place, entry, shared), spec)
    built_with = _build(place, network, entry)
    return Row(place, network, entry, spec.spatial_dims, spec.divisor(built_with), loss)


def _imported_row(
    place: Place, some: SomeNetwork, imported: Imported, entry: AnyEntry, shared: Training
) -> Row:
    """Check all that can be known of a user's own network without running any of its code."""
    with _pointing((*place, "network", "import"), {}):
        check_reference(imported.reference)
    problem = "the arguments of a network of your own stand under network: {arguments: ...}"
    _check_keys(place, entry.options, problem, type(entry).model_fields)
    _chosen_techniques(place, entry, in_apply=True)
    if entry.training is not None:
        _check_training(entry.training, (*place, "training"))
    _, training = _training(place, entry, shared)
    return Row(
        place=place,
        network=some.name or label(imported.reference),
        entry=entry,
        spatial_dims=0,
        divisor=(some.divisor,) * 3,
        loss=training.loss or "sum",
        imported=imported,
    )


def _training(place: Place, entry: AnyEntry, shared: Training) -> tuple[Place, Training]:
    """Return the training of a row and where it stands: the row's own, else the suite's."""
    if entry.training is None:
        return ("training",), shared
    return (*place, "training"), entry.training


def _chosen_techniques(
    place: Place, entry: AnyEntry, *, in_apply: bool = False
) -> list[tuple[Technique, Any]]:
    """Return the techniques of a row with their options, which go together and with its precision.

    ``in_apply``: they change a network that is there, rather than one that is built with them.
    """
    from memsave.technique_pairs import check_pairs
    from memsave.techniques import check_precision, find_technique, parse_options

    chosen: list[tuple[Technique, Any]] = []
    for i, use in enumerate(entry.techniques):
        with _pointing((*place, "techniques", i), {**use.options, "name": use.name}):
            technique = find_technique(use.name)
            if entry.precision is not None:
                check_precision(technique, entry.precision)
            chosen.append((technique, parse_options(technique, use.options)))
            check_pairs(chosen, in_apply=in_apply)
    return chosen


def _build(place: Place, network: str, entry: AnyEntry) -> dict[str, Any]:
    """Build the network as the workload will; return its options after the techniques' say."""
    import torch

    from memsave.networks import build

    chosen = _chosen_techniques(place, entry)
    network_options = entry.options
    for i, (technique, options) in enumerate(chosen):
        use = entry.techniques[i]
        with _pointing((*place, "techniques", i), {**use.options, "name": use.name}):
            network_options = technique.build(network_options, options)
    with torch.device("meta"):
        with _pointing(place, entry.options):
            model = build(network, network_options)
        for i, (technique, options) in enumerate(chosen):
            with _pointing((*place, "techniques", i), entry.techniques[i].options):
                model = technique.module(model, options)
    return network_options


def _check_training(training: Training, place: Place) -> None:
    from bench.losses import LOSSES
    from bench.workload import OPTIMIZERS

    if training.loss is not None and is_reference(training.loss):
        with _pointing((*place, "loss"), {}):
            check_reference(training.loss, "loss")
    elif training.loss is not None:
        _check_known((*place, "loss"), "unknown loss", training.loss, (*LOSSES, "sum"))
    if training.schedule is not None:
        _check_schedule(training.schedule, (*place, "schedule"))
    optimizer, place = training.optimizer, (*place, "optimizer")
    if is_reference(optimizer.name):
        with _pointing((*place, "name"), {}):
            check_reference(optimizer.name, "optimizer")
        return
    _check_known((*place, "name"), "unknown optimizer", optimizer.name, OPTIMIZERS)
    known = inspect.signature(OPTIMIZERS[optimizer.name][0]).parameters
    names = [name for name in known if name != "params"]
    _check_keys(place, optimizer.options, f"no option of {optimizer.name}", names)
    for key, value in optimizer.options.items():
        if not _fits(value, known[key].default):
            text = f"{value!r} will not do; the usual value is {known[key].default!r}"
            raise _Wrong(Mistake((*place, key), text))


def _check_schedule(entry: ScheduleEntry, place: Place) -> None:
    from bench.schedules import SCHEDULES, check_schedule

    _check_known((*place, "name"), "unknown schedule", entry.name, SCHEDULES)
    if SCHEDULES[entry.name].needs_loss:
        usable = [name for name, schedule in SCHEDULES.items() if not schedule.needs_loss]
        text = (
            f"schedule {entry.name!r} follows the loss, which a benchmark's step does not read "
            f"back from the GPU: use {' or '.join(usable)}"
        )
        raise _Wrong(Mistake((*place, "name"), text))
    for key, value in entry.options.items():
        with _pointing(place, {key: value}):
            check_schedule(entry.name, {key: value})


def _loss(place: Place, training: Training, spec: NetworkSpec) -> str:
    """Return the loss a row trains with, checked against what its network is trained towards."""
    from bench.losses import LOSSES, check_loss

    if training.loss is None:
        return spec.loss
    if training.loss == "sum" or is_reference(training.loss):
        text = f"loss {training.loss!r} is for networks of your own: give {spec.name} one by name"
        raise _Wrong(Mistake((*place, "loss"), text))
    if training.loss not in LOSSES:  # said once, where the name stands
        return training.loss
    with _pointing((*place, "loss"), {}):
        check_loss(training.loss, spec.target)
    return training.loss


def _fits(value: Any, usual: Any) -> bool:
    """Whether an optimizer can take ``value`` where torch's default is ``usual``.

    By type and sign only: making an optimizer would be the better check, but its first one takes
    torch longer than all else that a suite needs.
    """
    if isinstance(usual, bool) or usual is None:
        return isinstance(value, bool)
    if isinstance(usual, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(usual)
            and all(_fits(v, u) for v, u in zip(value, usual, strict=True))
        )
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _check_known(place: Place, problem: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise _Wrong(Mistake(place, f"{problem} {name!r}{nearest(name, known)}"))


def _check_keys(place: Place, keys: Iterable[str], problem: str, *known: Iterable[str]) -> None:
    names = [name for group in known for name in group]
    for key in keys:
        if key not in names:
            raise _Wrong(Mistake((*place, key), f"unknown key, {problem}{nearest(key, names)}"))


@contextmanager
def _pointing(place: Place, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error into a mistake at the one of ``options`` that it speaks of, else at ``place``.

    memsave and torch refuse with ValueErrors, torch also with TypeError and RuntimeError where an
    option's value is of no use to it.
    """
    try:
        yield
    except (MembenchError, ValueError, TypeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, TypeError | RuntimeError):  # torch's words do not say what it is about
            text = f"cannot be built so: {text}"
        key = _spoken_of(options, text, getattr(error, "name", None))
        raise _Wrong(Mistake(place if key is None else (*place, key), text)) from None


def _spoken_of(options: Mapping[str, Any], text: str, name: object) -> str | None:
    """``name`` is the unknown name of an UnknownNameError: an option, its value or part of it."""
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        if name is None and re.search(rf"\b{re.escape(key)}\b", text):
            return key
        if name is not None and name in (key, *values):
            return key
    return None
