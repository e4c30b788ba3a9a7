"""``membench infer``: one volume through FLARE21's two stages, with memory and time by stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, out, user_errors
from bench.infer.memory import OutOfMemoryError
from bench.infer.run import InferDevice
from bench.infer.run import infer as run_inference
from bench.infer.stages import PAPER_FLOPS, PAPER_FLOPS_NOTE, PAPER_MEMORY, PAPER_TIME, STAGES
from bench.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from bench.infer.run import Inference

__all__ = ["infer"]


def infer(
    volume: Annotated[Path, typer.Argument(help="A 3D NIfTI file, *.nii or *.nii.gz.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the labels, 0 to 4, to this file.")
    ] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            help="Weights of both networks; twice for a file each; without it they are random."
        ),
    ] = None,
    device: Annotated[
        InferDevice,
        typer.Option(help="Where to run; predict: only say what memory the stages would take."),
    ] = "auto",
    card: Annotated[
        str | None,
        typer.Option(help="Predict the memory for this card, or cap the GPU to it."),
    ] = None,
    keep_components: Annotated[
        int,
        typer.Option(min=1, help="Components kept of each organ; 2 keeps both kidneys."),
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = (
        False
    ),
) -> None:
    """Segment the abdominal organs of a volume as FLARE21's two-stage pipeline does.

    On a GPU memory is measured; without one the CPU segments and the memory is predicted.
    """
    with user_errors():
        try:
            result = run_inference(
                volume,
                output,
                weights=weights or None,
                device=device,
                card_name=card,
                force=force,
                components=keep_components,
                say=lambda step: print(step, file=sys.stderr),
            )
        except OutOfMemoryError as error:  # nothing was misused: the GPU is too small
            err().print(str(error), soft_wrap=True, markup=False)
            raise typer.Exit(1) from None
    if json:
        import json as json_module

        print(json_module.dumps(result.to_dict()))
    else:
        _print(result)
    failed = [reading for reading in result.memory if reading.status not in ("ok", "oom")]
    for reading in failed:
        err().print(
            f"stage {reading.stage}: {reading.status}: {reading.reason}",
            soft_wrap=True,
            markup=False,
        )
    if failed:
        raise typer.Exit(1)


def _print(result: Inference) -> None:
    for line in (*_what_was_found(result), *_what_it_took(result)):
        out().print(line, soft_wrap=True, markup=False)
    out().print(_stages(result))
    for note in _notes(result):
        out().print(note, soft_wrap=True, markup=False)
    if result.output is not None:
        out().print(f"labels: {result.output}", soft_wrap=True, markup=False)


def _what_was_found(result: Inference) -> list[str]:
    sides = "x".join(map(str, result.shape))
    spacing = "x".join(f"{side:.3g}" for side in result.spacing)
    lines = [f"volume: {result.volume}, {sides} voxels of {spacing} mm"]
    random = result.weights.startswith("random")
    lines.append(f"weights: {result.weights}{': the labels mean nothing' if random else ''}")
    if result.nonfinite_voxels:
        lines.append(f"voxels that are no numbers, taken for air: {result.nonfinite_voxels}")
    if result.box is not None:
        start, stop = result.box
        spans = ", ".join(f"{a}..{b}" for a, b in zip(start, stop, strict=True))
        found = "box" if result.region_found else "nothing found, so the whole volume"
        lines.append(f"region: {found} {spans}")
    if result.organ_voxels is not None:
        organs = ", ".join(f"{organ} {count}" for organ, count in result.organ_voxels.items())
        lines.append(f"voxels: {organs}")
    return lines


def _what_it_took(result: Inference) -> list[str]:
    peak = result.peak_process_bytes
    evidence = " and ".join(dict.fromkeys(reading.evidence for reading in result.memory))
    capped = f" capped to {result.capped_to}" if result.capped_to else ""
    size = "not known" if peak is None else format_bytes(peak)
    lines = [f"memory: {size} of {result.card}{capped}, {evidence}; the paper: {PAPER_MEMORY}"]
    names = {stage.name for stage in STAGES}
    if result.times_s:
        on = "this GPU" if result.ran_on == "cuda" else "this machine's CPU"
        others = ", ".join(f"{k} {v:.2f}" for k, v in result.times_s.items() if k not in names)
        total = sum(result.times_s.values())
        lines.append(f"time: {total:.1f} s on {on}, measured; the paper: {PAPER_TIME}")
        lines.append(f"steps besides the stages, in s: {others}")
    lines.append(
        f"FLOPs of stage {STAGES[-1].name}: {result.flops:,}; the paper prints {PAPER_FLOPS:,}: "
        f"{PAPER_FLOPS_NOTE}"
    )
    return lines


def _stages(result: Inference) -> Table:
    from rich.table import Table

    table = Table(title=f"memory on {result.card}, by stage", title_justify="left")
    for heading in ("stage", "network", "input"):
        table.add_column(heading)
    for heading in ("parameters", "time", "allocated", "reserved", "process"):
        table.add_column(heading, justify="right")
    table.add_column("evidence")
    for stage, reading in zip(STAGES, result.memory, strict=True):
        time_s = result.times_s.get(stage.name)
        table.add_row(
            stage.name,
            stage.network,
            "x".join(map(str, stage.shape)),
            f"{result.parameters[stage.name]:,}",
            "-" if time_s is None else f"{time_s:.2f} s",
            _size(reading.peak_allocated_bytes),
            _size(reading.peak_reserved_bytes),
            "out of memory" if reading.status == "oom" else _size(reading.process_bytes),
            reading.evidence + (f" ({reading.tracer})" if reading.tracer else ""),
        )
    return table


def _notes(result: Inference) -> list[str]:
    estimated = dict.fromkeys(part for reading in result.memory for part in reading.uncalibrated)
    notes = dict.fromkeys(note for reading in result.memory for note in reading.notes)
    if estimated:
        return [f"estimates, not measured on this card: {', '.join(estimated)}", *notes]
    return list(notes)


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes)
