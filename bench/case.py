"""A case: one cell of a table, as plain data that can be run again without its suite."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from bench.errors import MembenchError
from bench.imported import Imported

__all__ = [
    "Case",
    "Mode",
    "PaperFigure",
    "PaperTime",
    "Precision",
    "TechniqueUse",
    "definition_digest",
    "known_fields",
]

Precision = Literal["fp32", "fp16", "bf16"]
Mode = Literal["train", "infer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueUse:
    """A technique by its name in ``memsave.techniques`` and the options it is given."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperFigure:
    """A figure as a paper prints it: ``text`` for people, the rest for ratios.

    ``relation`` is ``"="`` (printed as a value), ``"~"`` (about) or ``">"`` (more than).
    ``bytes`` is the printed figure in the unit that the suite states (GB = 10^9, GiB = 2^30).
    """

    text: str
    relation: Literal["=", "~", ">"]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperTime:
    """The time of a case as a paper prints it; ``relation`` may also be ``"<"`` (under)."""

    text: str
    relation: Literal["=", "~", ">", "<"]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training step or one prediction of one network at one shape.

    Shapes are (x, y, slices): ``requested_shape`` as the suite or the volume gives it, ``shape``
    as the network sees it, cropped and padded. ``batch_size`` is in samples.
    """

    network: str
    variant: str
    requested_shape: tuple[int, ...]
    shape: tuple[int, ...]
    mode: Mode = "train"
    batch_size: int = 1
    precision: Precision = "fp32"
    network_options: dict[str, Any] = field(default_factory=dict)
    techniques: tuple[TechniqueUse, ...] = ()
    loss: str = "cross_entropy+dice"
    optimizer: str = "adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None  # in bench.schedules; a step counts as an epoch
    schedule_options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2  # steps of the memory pass; the second one has the optimizer's state
    timed_steps: int = 5  # steps of the time pass, on a GPU only, after one warm-up step
    seed: int = 0
    cudnn_benchmark: bool = False
    time_limit_s: float = 600.0
    volumes: tuple[str, ...] = ()  # names of the files this shape came from
    paper: PaperFigure | None = None
    paper_time: PaperTime | None = None
    paper_flops: int | None = None
    baseline: str | None = None  # the variant to which its suite takes ratios
    position: int = 0  # place in its suite: records lie in the order in which cases finished
    card: str | None = None  # predicted for it, instead of the suite's
    imported: Imported | None = None  # a network of the user's own; None: one of memsave's table

    @property
    def name(self) -> str:
        """``network/variant/AxBxC/mode``, with the shape that was asked for."""
        return self._named(self.requested_shape)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names that ``--case`` globs are matched against."""
        return tuple(dict.fromkeys((self.name, self._named(self.shape))))

    def _named(self, shape: tuple[int, ...]) -> str:
        return f"{self.network}/{self.variant}/{'x'.join(map(str, shape))}/{self.mode}"

    def to_definition(self) -> dict[str, Any]:
        """Return the case as JSON-ready data, from which ``from_definition`` makes it again."""
        data = {**dataclasses.asdict(self), "case": self.name}
        for name in ("imported", "card"):  # of few cases, and later than most records
            if data[name] is None:
                del data[name]
        # Lists for tuples, as a reader of the JSON gets them: a record equals its read copy.
        return dict(json.loads(json.dumps(data)))

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> Case:
        """Make the case that ``to_definition`` wrote; keys it does not know are ignored.

        Raises MembenchError for data that are no case's.
        """
        try:
            return cls._from_definition(definition)
        except (TypeError, ValueError, AttributeError) as error:
            raise MembenchError(f"not the definition of a case: {error}") from None

    @classmethod
    def _from_definition(cls, definition: dict[str, Any]) -> Case:
        values = known_fields(cls, definition)
        for key in ("requested_shape", "shape", "volumes"):
            values[key] = tuple(values.get(key, ()))
        values["techniques"] = tuple(
            TechniqueUse(**known_fields(TechniqueUse, t)) for t in values.get("techniques", ())
        )
        if values.get("paper") is not None:
            values["paper"] = PaperFigure(**known_fields(PaperFigure, values["paper"]))
        if values.get("paper_time") is not None:
            values["paper_time"] = PaperTime(**known_fields(PaperTime, values["paper_time"]))
        if values.get("imported") is not None:
            values["imported"] = Imported.from_dict(values["imported"])
        return cls(**values)

    def digest(self) -> str:
        """Return a short hash of all that shapes the figures, so not of the paper's figure.

        A schedule sets numbers, it takes neither memory nor time on the GPU.
        """
        aside = (
            "paper",
            "paper_time",
            "paper_flops",
            "volumes",
            "baseline",
            "position",
            "schedule",
            "schedule_options",
            "card",  # the record's own card and its hash say which
        )
        data = {k: v for k, v in self.to_definition().items() if k not in aside}
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def known_fields(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return what ``cls``, a dataclass, has a field for; the rest is of a later version."""
    names = _field_names(cls)
    return {k: v for k, v in data.items() if k in names}


@cache
def _field_names(cls: type) -> frozenset[str]:  # asked a hundred times for every record read
    return frozenset(f.name for f in dataclasses.fields(cls))


def definition_digest(definition: dict[str, Any]) -> str | None:
    """Return the digest of the case that is defined so, None for data that are no case's."""
    try:
        return Case.from_definition(definition).digest()
    except MembenchError:  # from elsewhere, or of another time
        return None
