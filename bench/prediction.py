"""``bench.predict``: what a network of anyone's needs on a card, asked from Python.

The step is traced in a child process, which loads the library that lets fake tensors live on
``cuda:0`` before torch: the process that asks is left as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bench.backends import predicted_backend
from bench.case import Case, Mode, Precision, TechniqueUse
from bench.child import Child
from bench.environment import read_environment
from bench.errors import MembenchError
from bench.imported import Imported, check_reference, is_reference, label
from bench.input_specs import input_spec, input_specs
from bench.predict.cards import Card, find_card
from bench.record import Record
from bench.runner import make_record
from bench.timeline import Timeline

if TYPE_CHECKING:
    from bench.predict.step_trace import Trace

__all__ = [
    "DEFAULT_CARD",
    "Prediction",
    "TechniqueEntry",
    "predict",
    "predict_case",
    "technique_uses",
]

DEFAULT_CARD = "a100-80gb"
TechniqueEntry: TypeAlias = "str | tuple[str, Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]"
Techniques: TypeAlias = "str | Mapping[str, Mapping[str, Any]] | Sequence[TechniqueEntry]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What a step would need on a card: predicted, not measured. Bytes are whole numbers.

    ``record`` holds all of it, as ``membench run`` writes it.
    """

    record: Record
    card: Card
    trace_data: str = field(repr=False)  # for bench.predict.trace_data.decode_trace
    allocator_settings: str = ""

    @property
    def case(self) -> Case:
        """What was predicted, as plain data."""
        return Case.from_definition(self.record.definition)

    @property
    def status(self) -> Literal["ok", "oom"]:
        """Whether the step fits ``card``; ``reason`` says what it would need where not."""
        return "ok" if self.record.status == "ok" else "oom"

    @property
    def reason(self) -> str:
        """Why it does not fit; empty if it does."""
        return self.record.reason

    @property
    def tracer(self) -> str:
        """How the step was followed: ``cuda``, ``cuda-shim``, or ``cpu`` where neither can be."""
        return str(self.record.tracer)

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that tensors and workspaces held; after an out-of-memory, until then."""
        return _known(self.record.peak_allocated_bytes)

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that the caching allocator held; after an out-of-memory, until then."""
        return _known(self.record.peak_reserved_bytes)

    @property
    def process_bytes(self) -> int | None:
        """Reserved and the CUDA context, as nvidia-smi shows it; None where it does not fit."""
        return self.record.process_bytes

    @property
    def needs_bytes(self) -> int:
        """The smallest capacity of the caching allocator at which the steps complete."""
        return _known(self.record.needs_bytes)

    @property
    def parameters(self) -> int:
        """How many parameters are trained."""
        return _known(self.record.parameters)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how the figures came about."""
        return self.record.environment.notes

    def fits(self, card: str | Card | None = None) -> bool:
        """Whether the steps complete on ``card``, by name or itself; the one predicted for if None.

        Errors: MembenchError for a card that is not known.
        """
        from bench.predict.alloc_conf import parse_alloc_conf
        from bench.predict.allocator import simulate
        from bench.predict.workspaces import fill_workspaces

        asked = find_card(card) if isinstance(card, str) else card
        if asked is None or asked == self.card:
            return self.status == "ok"
        if asked.calibration is not None:  # its libraries may need more of the trace than is kept
            return predict_case(self.case, asked).status == "ok"
        events = fill_workspaces(self.trace(), asked, self.case.cudnn_benchmark).events
        settings = parse_alloc_conf(self.allocator_settings)
        return simulate(events, asked.capacity_bytes, settings).oom_at_event is None

    def trace(self) -> Trace:
        """Return every allocation and release, without what libraries take on some card."""
        from bench.predict.trace_data import decode_trace

        return decode_trace(self.trace_data)

    def timeline(self) -> Timeline:
        """Return memory over the steps by category; its highest points are exact."""
        assert self.record.timeline is not None  # a network has parameters, so bytes
        return self.record.timeline

    def explain(self, top: int = 10) -> str:
        """Return who holds the bytes at the peak, as lines: by category, module, operator, line."""
        from bench.prediction_text import explanation

        return explanation(self.record, top)

    def save_trace(self, path: str | Path) -> None:
        """Write every event: ``.pickle`` for PyTorch's memory page, ``.json`` for Perfetto.

        Errors: MembenchError for another ending, or where the file cannot be written.
        """
        from bench.export import write_trace

        write_trace(Path(path), self)


def _known(value: int | None) -> int:
    assert value is not None  # a prediction that has no figures was raised as an error
    return value


def predict(
    build: Any,
    inputs: Any,
    *,
    loss: str | Callable[..., Any] | None = None,
    optimizer: str | Callable[..., Any] = "adam",
    card: str | Card = DEFAULT_CARD,
    precision: Precision = "fp32",
    techniques: Techniques = (),
    mode: Mode = "train",
    steps: int = 2,
    target: Any = None,
    time_limit_s: float = 600.0,
) -> Prediction:
    """Predict the memory of training or running a network, on a card that need not be here.

    ::

        prediction = bench.predict("mypackage.net:Net", "1x1x128x128x128", loss="cross_entropy")
        print(prediction.peak_allocated_bytes, prediction.fits("rtx4090-24gb"))
        print(prediction.explain())

    Args:
        build: a function or class that can be imported and returns the network,
            ``functools.partial`` of one, or its name ``"package.module:factory"`` or
            ``"path/to/file.py:factory"``; its weights are never allocated. Or a module whose
            class can be imported, also on ``meta``; only the shapes of its weights are read.
        inputs: what the network is called with: ``"1x1x128x128x128"``, ``"1x77:int64"``, a tuple of
            sides, ``(sides, dtype)`` or a tensor, also on ``meta``; a list of these for several.
        loss: a name of ``bench.losses.LOSSES``; a callable that can be imported, or its name,
            called with (output, target), or with the output alone if it takes no more; None for the
            sum of all that the network returns.
        optimizer: a name of ``bench.workload.OPTIMIZERS``; a callable that can be imported, or its
            name, called with the list of parameters, as ``torch.optim.AdamW`` can be.
        card: for which; its name as in ``membench list cards``, or a Card.
        precision: ``"fp32"``, or ``"fp16"`` or ``"bf16"`` for autocast.
        techniques: names of ``memsave.TECHNIQUES``, with options as ``memsave.apply`` takes them.
        mode: ``"train"``, or ``"infer"`` for one forward without gradients.
        steps: how many; the first makes the optimizer's state, the second has it throughout.
        target: like an input; without it class indices, one for each voxel or, where the output
            is (batch, classes), one for each sample.
        time_limit_s: after which the child is stopped.

    Memory: the child holds torch (about 400 MiB) and no weights, unless the constructor reads
        values: then the network is built for real on the CPU, and ``notes`` say so.
    Errors: MembenchError for a lambda or anything else that cannot be imported, for what the names
        do not find, and where the network, its loss or its techniques fail or do what fake
        tensors cannot follow: one line, with the source line of the user's code.
    """
    given = {"build": build, "loss": loss, "optimizer": optimizer}
    names = {what: _named(what, value) for what, value in given.items()}
    specs = input_specs(inputs)
    image = specs[0]
    imported = Imported(
        reference=names["build"],
        inputs=tuple(str(spec) for spec in specs),
        target=None if target is None else str(input_spec(target)),
        pickled=_pickled(given),
    )
    return predict_case(
        Case(
            network=label(names["build"]),
            variant="+".join(use.name for use in technique_uses(techniques)) or "baseline",
            requested_shape=image.shape[2:],
            shape=image.shape[2:],
            batch_size=image.shape[0],
            mode=_one_of("mode", mode, ("train", "infer")),
            precision=_one_of("precision", precision, ("fp32", "fp16", "bf16")),
            techniques=technique_uses(techniques),
            loss=names["loss"],
            optimizer=names["optimizer"],
            steps=_positive("steps", steps),
            time_limit_s=time_limit_s,
            imported=imported,
        ),
        card,
    )


def predict_case(case: Case, card: str | Card) -> Prediction:
    """Predict a case in a child process of its own.

    Errors: MembenchError where the case fails, with the child's line; running out of memory is a
    result.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name == "bench.predict.worker":
        raise MembenchError(
            "a prediction was asked for while the network's file was imported to be predicted: "
            "put the call under if __name__ == '__main__':"
        )
    chosen = find_card(card) if isinstance(card, str) else card
    backend, _ = predicted_backend(chosen)
    child = Child(backend.module, backend.child_environment)
    try:
        reply = child.ask(
            {
                "case": case.to_definition(),
                "search_path": [os.path.abspath(p) for p in sys.path],
                "with_trace": True,
                **backend.request,
            },
            case.time_limit_s,
        )
    finally:
        child.close()
    if reply["status"] not in ("ok", "oom"):
        raise MembenchError(f"{case.network} cannot be predicted: {reply['reason']}")
    trace = reply.pop("trace")
    environment = dataclasses.replace(read_environment(), card_hash=chosen.digest())
    return Prediction(
        record=make_record(backend, case, reply, environment),
        card=chosen,
        trace_data=trace,
        allocator_settings=backend.request["allocator_settings"],
    )


# -- what is given, as plain data ---------------------------------------------------------------


def _named(what: str, value: Any) -> str:
    """Return the name or reference that was given, or one to show for an object."""
    if value is None and what == "loss":
        return "sum"
    if isinstance(value, str):
        if what == "build" or is_reference(value):
            check_reference(value, "network" if what == "build" else what)
        return value
    if not callable(value):
        raise MembenchError(
            f"{what} is {value!r:.60}: give something that can be called, or its name as "
            "'package.module:name'"
        )
    while isinstance(value, functools.partial):
        value = value.func
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _pickled(given: Mapping[str, Any]) -> dict[str, str]:
    objects = {what: v for what, v in given.items() if v is not None and not isinstance(v, str)}
    if not objects:
        return {}
    from bench.portable import pack

    return {what: pack(what, value) for what, value in objects.items()}


def technique_uses(techniques: Techniques) -> tuple[TechniqueUse, ...]:
    """Return techniques as a case holds them.

    Errors: MembenchError for a name or an option that does not exist.
    """
    from memsave.errors import MemsaveError
    from memsave.techniques import find_technique, parse_options

    uses: list[TechniqueUse] = []
    entries: Any = [techniques] if isinstance(techniques, str | Mapping) else techniques
    for entry in entries:
        if isinstance(entry, Mapping):
            uses += [TechniqueUse(name=n, options=dict(o or {})) for n, o in entry.items()]
        elif isinstance(entry, str):
            uses.append(TechniqueUse(name=entry))
        elif isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
            uses.append(TechniqueUse(name=entry[0], options=dict(entry[1])))
        else:
            raise MembenchError(
                f"a technique is its name, (name, options) or {{name: options}}, got {entry!r:.60}"
            )
    try:
        for use in uses:
            parse_options(find_technique(use.name), use.options)
    except MemsaveError as error:
        raise MembenchError(str(error)) from None
    return tuple(uses)


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise MembenchError(f"{what} is {value!r}, not one of {', '.join(known)}")
    return value


def _positive(what: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise MembenchError(f"{what} is {value!r}: give a whole number of 1 or more")
    return value
