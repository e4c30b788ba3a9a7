"""One volume through the pipeline, from file to file, with memory and time by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench import nvml
from bench.backends import use_cuda
from bench.errors import MembenchError
from bench.infer.memory import CudaMeter, StageMemory, predict_stages
from bench.infer.stages import (
    PAPER_CARD,
    PAPER_FLOPS,
    PAPER_FLOPS_NOTE,
    PAPER_MEMORY,
    PAPER_TIME,
    SEED,
    SEGMENTATION,
    STAGES,
)
from bench.predict.cards import Card, card_name_for_gpu, find_card
from bench.units import format_bytes
from bench.volumes import read_volume

if TYPE_CHECKING:
    from torch import nn

    from bench.cuda import TorchCuda
    from bench.infer.image import Image

__all__ = ["InferDevice", "Inference", "RanOn", "infer"]

InferDevice = Literal["auto", "cuda", "cpu", "predict"]
RanOn = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """All that ``membench infer`` says. What did not happen (``--device predict``) is None."""

    volume: str
    shape: tuple[int, int, int]  # x, y, slices
    spacing: tuple[float, float, float]  # mm
    output: str | None
    ran_on: RanOn | None
    weights: str
    card: str  # that the memory is for
    capped_to: str | None
    memory: tuple[StageMemory, ...]
    parameters: dict[str, int]  # by stage
    flops: int  # of stage two
    region_found: bool | None = None
    box: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    nonfinite_voxels: int | None = None
    organ_voxels: dict[str, int] | None = None
    times_s: dict[str, float] = field(default_factory=dict)

    @property
    def peak_process_bytes(self) -> int | None:
        """The larger stage's process memory; None unless both are known."""
        known = [m.process_bytes for m in self.memory if m.process_bytes is not None]
        return max(known) if len(known) == len(STAGES) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``--json``: all fields, the stages joined, the paper's."""
        data = asdict(self)
        memory, parameters = data.pop("memory"), data.pop("parameters")
        data["stages"] = [
            {
                **reading,
                "network": stage.network,
                "shape": stage.shape,
                "parameters": parameters[stage.name],
                "time_s": self.times_s.get(stage.name),
            }
            for stage, reading in zip(STAGES, memory, strict=True)
        ]
        data["peak_process_bytes"] = self.peak_process_bytes
        data["total_s"] = sum(self.times_s.values()) if self.times_s else None
        data["paper"] = {
            "memory": PAPER_MEMORY,
            "time": PAPER_TIME,
            "flops": PAPER_FLOPS,
            "flops_note": PAPER_FLOPS_NOTE,
        }
        return data


def infer(
    volume: Path,
    output: Path | None,
    *,
    weights: Path | Sequence[Path] | None = None,
    device: InferDevice = "auto",
    card_name: str | None = None,
    force: bool = False,
    components: int = 1,
    say: Callable[[str], None] = lambda _step: None,
) -> Inference:
    """Segment ``volume`` into ``output``; with ``device="predict"`` only say what it would take.

    What can be wrong with what was given is found before any work, except the voxels themselves.
    ``components`` of each organ stay, the largest. ``say`` is told what happens next.
    Errors: MembenchError for input that cannot be used; OutOfMemoryError on a GPU too small.
    """
    if components < 1:
        raise MembenchError(f"at least one component of an organ is kept, got {components}")
    place = _place(device)
    card = find_card(card_name) if card_name else None
    _check_files(volume, output, place, force)
    used_before = _used_before() if place == "cuda" else {}
    say("reading")
    from bench.infer.flops import count_flops  # torch, now that something will be done with it
    from bench.infer.image import read_image
    from bench.infer.weights import build_networks

    networks = build_networks(weights)
    begun = time.perf_counter()
    image = read_image(volume)
    job = _Job(image, networks, {"read": time.perf_counter() - begun}, output, components, say)
    if place == "cuda":
        done = _on_gpu(job, card, used_before)
    else:
        done = _off_gpu(job, card or find_card(PAPER_CARD), place)
    return Inference(
        volume=str(volume),
        shape=image.voxels.shape,
        spacing=image.spacing,
        weights=_named(weights),
        parameters={s.name: _parameters(networks[s.network]) for s in STAGES},
        flops=count_flops(SEGMENTATION.network, SEGMENTATION.shape),
        **done,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    image: Image
    networks: dict[str, nn.Module]
    times_s: dict[str, float]
    output: Path | None
    components: int
    say: Callable[[str], None]


def _place(device: InferDevice) -> Literal["cuda", "cpu", "predict"]:
    if device == "cpu" or device == "predict":
        return device
    return "cuda" if use_cuda(device) else "cpu"


def _check_files(volume: Path, output: Path | None, place: str, force: bool) -> None:
    if place == "predict":
        if output is not None:
            raise MembenchError(
                f"--device predict computes no labels to write to {output}; leave -o out, or use "
                "--device cpu"
            )
    elif output is None:
        raise MembenchError("no output named: say where the labels go with -o OUT.nii.gz")
    read_volume(volume, volume.name)
    if output is not None:
        from bench.infer.image import check_output

        check_output(output, volume, force)


def _off_gpu(job: _Job, card: Card, place: str) -> dict[str, Any]:
    """Predict both stages for ``card``, and run them on the CPU unless that is all."""
    job.say(f"predicting for {card.name}")
    memory = predict_stages(card)
    done: dict[str, Any] = {"ran_on": None, "output": None}
    if place == "cpu":
        done = _segment(job, "cpu")
    return {**done, "card": card.name, "capped_to": None, "memory": memory}


def _on_gpu(job: _Job, cap: Card | None, used_before: dict[str, int | None]) -> dict[str, Any]:
    """Measure both stages as they run, in no more memory than ``cap`` has."""
    from bench.cuda import TorchCuda

    cuda = TorchCuda()
    if cap is not None:
        _cap(cuda, cap)
    meter = CudaMeter(cuda, used_before.get(cuda.uuid.lower()))
    done = _segment(job, "cuda", meter)
    return {
        **done,
        "card": card_name_for_gpu(cuda.name, cuda.total_bytes),
        "capped_to": cap.name if cap else None,
        "memory": meter.readings,
    }


def _segment(job: _Job, ran_on: RanOn, meter: CudaMeter | None = None) -> dict[str, Any]:
    from bench.infer.image import write_labels
    from bench.infer.pipeline import Pipeline

    assert job.output is not None  # _check_files
    job.say(f"segmenting on the {'GPU' if meter else 'CPU'}")
    device = "cuda:0" if meter else "cpu"
    around = meter.stage if meter else None
    pipeline = Pipeline(job.networks, device, around, job.components)
    found = pipeline.segment(job.image.voxels)
    begun = time.perf_counter()
    write_labels(job.output, found.labels, job.image)
    return {
        "ran_on": ran_on,
        "output": str(job.output),
        "region_found": found.region_found,
        "box": (found.box.start, found.box.stop),
        "nonfinite_voxels": found.nonfinite_voxels,
        "organ_voxels": found.organ_voxels(),
        "times_s": {**job.times_s, **found.times_s, "write": time.perf_counter() - begun},
    }


def _used_before() -> dict[str, int | None]:
    """Return the memory in use by GPU, before this process has a context of its own there."""
    return {device.uuid.lower(): nvml.device_used_bytes(device.uuid) for device in nvml.devices()}


def _cap(cuda: TorchCuda, card: Card) -> None:
    from bench.measure import memory_fraction

    free_bytes, total_bytes = cuda.mem_get_info()
    if card.capacity_bytes > free_bytes:
        raise MembenchError(
            f"cannot cap the allocator at {card.name}'s {format_bytes(card.capacity_bytes)}: this "
            f"GPU has {format_bytes(free_bytes)} free; choose a smaller card"
        )
    cuda.set_memory_fraction(memory_fraction(card.capacity_bytes, total_bytes))


def _named(weights: Path | Sequence[Path] | None) -> str:
    if not weights:
        return f"random, seed {SEED}"
    return str(weights) if isinstance(weights, Path) else ", ".join(map(str, weights))


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
