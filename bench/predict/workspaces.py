"""What libraries take through the allocator besides tensors, filled into a trace for one card.

cuBLAS keeps one workspace per handle and stream, of a size known exactly. cuDNN takes a workspace
for the length of a convolution; its size is not public. On a card with a calibration it is what was
measured for that very call, or for those most like it; on another it is the estimate in the card's
file. Kernels with temporaries of their own are known from a calibration alone. The record names
what rests on anything but a measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.predict.calibration import Basis, Calibration, CallMemory, read_calibration
from bench.predict.cards import Card
from bench.predict.library_calls import ConvolutionCall
from bench.predict.step_trace import Event, Site, Trace

__all__ = ["Filled", "Workspaces", "fill_workspaces", "uncalibrated_parts"]

_CALIBRATED: dict[Basis, str] = {
    "interpolated": "convolution workspace (interpolated)",
    "extrapolated": "convolution workspace (extrapolated)",
}


@dataclass(slots=True)
class Workspaces:
    """A card's answers, for one setting of ``cudnn.benchmark``.

    ``trials``: whether the first call of each kind is charged what trying algorithms out takes, the
    largest workspace that fits. Without, the figure is what the step cannot do without. Either way
    torch empties its cache after each trial, which lets go of what had been cached so far.
    """

    card: Card
    benchmark: bool = False
    trials: bool = True
    calibration: Calibration | None = None
    _known: dict[ConvolutionCall, CallMemory] = field(default_factory=dict)
    _tried: set[object] = field(default_factory=set)

    @classmethod
    def of(cls, card: Card, benchmark: bool = False, *, trials: bool = True) -> Workspaces:
        """Read the card's calibration; raises MembenchError where it cannot be read."""
        return cls(card, benchmark, trials, read_calibration(card.calibration, card.name))

    def convolution(self, event: Event) -> int:
        """Return the workspace of a convolution's event."""
        _, operand_bytes, kind, *call, _ = event
        estimate = self.card.convolution_workspace_bytes(kind, operand_bytes)
        if self.calibration is None or not call:
            return estimate
        return self.memory(call[0], estimate).workspace_bytes

    def trial(self, event: Event, live_bytes: int, phase: str) -> int | None:
        """Return what trying algorithms out takes while ``live_bytes`` are held, or None.

        ``cudnn.benchmark`` tries at the first call of each kind, in each of a step's two threads:
        what is recomputed in backward is tried again there.
        """
        call = event[3] if len(event) > 4 else event[1:3]
        key = (call, phase == "backward")
        if not self.benchmark or key in self._tried:
            return None
        self._tried.add(key)
        workspace = self.convolution(event)
        if not self.trials or self.calibration is None or len(event) <= 4:
            return workspace
        room = self.card.capacity_bytes - live_bytes
        return max(workspace, min(self.memory(event[3], 0).first_bytes, room))

    def memory(self, call: ConvolutionCall, estimate_bytes: int) -> CallMemory:
        """Return what a call takes, the card's estimate where nothing like it was measured."""
        if call not in self._known:
            assert self.calibration is not None
            self._known[call] = self.calibration.convolution(call, self.benchmark) or CallMemory(
                estimate_bytes, estimate_bytes, "estimated"
            )
        return self._known[call]


@dataclass(slots=True)
class Filled:
    """A trace being filled in, and how many bytes are alive in it."""

    trace: Trace
    live_bytes: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take an event over as it stands."""
        self.trace.events.append(event)
        if event[0] == "alloc":
            self._sizes[event[1]] = event[2]
            self.live_bytes += event[2]
        elif event[0] == "free":
            self.live_bytes -= self._sizes.pop(event[1], 0)

    def allocate(self, size: int, site: Site) -> int:
        """Add an allocation of a library's."""
        identity = len(self.trace.sites)
        self.trace.sites.append(site)
        self.trace.categories.append("workspace")
        self.add(("alloc", identity, size, 0))
        return identity


def fill_workspaces(
    trace: Trace, card: Card, cudnn_benchmark: bool = False, *, trials: bool = True
) -> Trace:
    """Return the trace with every library event replaced by allocations of ``card``'s sizes.

    ``trials``: with those of cuDNN trying its algorithms out, see ``Workspaces``.
    """
    workspaces = Workspaces.of(card, cudnn_benchmark, trials=trials)
    filled = Filled(Trace(sites=list(trace.sites), categories=list(trace.categories)))
    phase = ""
    for event in trace.events:
        if event[0] == "convolution":
            tried = workspaces.trial(event, filled.live_bytes, phase)
            if tried is not None:
                filled.add(("free", filled.allocate(tried, event[-1])))
                filled.add(("empty_cache",))  # torch gives the cache back once it has tried
            filled.add(("free", filled.allocate(workspaces.convolution(event), event[-1])))
        elif event[0] == "cublas":
            filled.allocate(card.cublas_workspace_bytes, event[2])
        elif event[0] == "operator":
            size = workspaces.calibration.operator(event[1])[0] if workspaces.calibration else 0
            if size:
                filled.add(("free", filled.allocate(size, event[2])))
        elif event[0] != "host":  # which is no memory of the card's
            phase = event[1] if event[0] == "phase" else phase
            filled.add(event)
    return filled.trace


def uncalibrated_parts(
    events: Iterable[Event], cudnn_benchmark: bool, card: Card | None = None
) -> tuple[str, ...]:
    """Name the parts of a prediction that rest on an estimate, not on a measurement."""
    workspaces = None if card is None else Workspaces.of(card, cudnn_benchmark)
    convolutions = [event for event in events if event[0] == "convolution"]
    if workspaces is None or workspaces.calibration is None:
        return ("context", *_estimated(cudnn_benchmark, bool(convolutions)))
    bases = Counter(_basis(workspaces, event) for event in convolutions)
    named = [name for basis, name in _CALIBRATED.items() if bases[basis]]
    return (*_estimated(cudnn_benchmark, bool(bases["estimated"])), *named)


def _basis(workspaces: Workspaces, event: Event) -> Basis:
    return workspaces.memory(event[3], 0).basis if len(event) > 4 else "estimated"


def _estimated(cudnn_benchmark: bool, some: bool) -> tuple[str, ...]:
    part = "convolution workspace" + " (cudnn.benchmark on)" * cudnn_benchmark
    return (part,) if some else ()
