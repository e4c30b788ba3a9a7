"""The curves of ``membench parity`` as one picture: Dice and loss by step, and who strays how far.

As ``bench.report.plots``, without matplotlib's global state: equal runs give an equal picture.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from bench.parity import Comparison, Run, Training
from bench.report.style import LINE_COLOURS, RC, TEXT_COLOUR
from bench.suite.parity import Figure, Pair, ParityPlan

__all__ = ["label", "mean_dice", "plot_curves"]

_WIDTH_IN = 9.0
_ROW_IN = 3.0
_DPI = 130
_METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def plot_curves(
    plan: ParityPlan,
    runs: Mapping[str, Run],
    comparisons: Sequence[Comparison],
    training: Training,
    kind: Literal["png", "svg"],
) -> bytes:
    """Return the picture as the bytes of a file: a row for each figure, and one for the pairs."""
    with matplotlib.rc_context(RC):
        canvas = _draw(plan, runs, comparisons, training)
        file = io.BytesIO()
        canvas.savefig(file, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return file.getvalue()


def _draw(
    plan: ParityPlan,
    runs: Mapping[str, Run],
    comparisons: Sequence[Comparison],
    training: Training,
) -> Canvas:
    rows = len(plan.figures) + bool(plan.pairs)
    canvas = Canvas(figsize=(_WIDTH_IN, _ROW_IN * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, 2, squeeze=False)
    length = training.settings.steps_per_epoch
    for figure, (left, right) in zip(plan.figures, axes, strict=False):
        _draw_figure(left, right, figure, runs, length)
    if plan.pairs:
        left, right = axes[-1]
        _draw_pairs(left, right, plan.pairs, runs, comparisons, length)
    for panel in axes.flat:
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#E5E5E5", linewidth=0.6)
        panel.set_axisbelow(True)
    return canvas


def _draw_figure(
    left: Axes, right: Axes, figure: Figure, runs: Mapping[str, Run], length: int
) -> None:
    colours = itertools.cycle(LINE_COLOURS)
    for case, colour in zip(figure.cases, colours, strict=False):
        run = runs[case.name]
        points = [(step, sum(dice) / len(dice)) for step, dice in run.dice]
        left.plot(*_columns(points), ".-", color=colour, linewidth=1.3, label=label(run))
        right.plot(*_epochs(run, length), color=colour, linewidth=1.3)
    left.set_title(figure.title, loc="left", weight="bold", fontsize=9)
    left.set_ylabel("Dice, mean of the classes")
    left.set_ylim(0, 1)
    left.legend(frameon=False, fontsize=7, loc="lower right")
    right.set_ylabel(f"loss, mean of {length} steps")


def _draw_pairs(
    left: Axes,
    right: Axes,
    pairs: Sequence[Pair],
    runs: Mapping[str, Run],
    comparisons: Sequence[Comparison],
    length: int,
) -> None:
    held = {(c.plain, c.technique): c for c in comparisons}
    for pair, colour in zip(pairs, itertools.cycle(LINE_COLOURS), strict=False):
        plain, technique = runs[pair.plain.name], runs[pair.technique.name]
        comparison = held[pair.plain.name, pair.technique.name]
        left.plot(*_epochs(plain, length), color="#BBBBBB", linewidth=3)
        left.plot(*_epochs(technique, length), color=colour, linewidth=1.2)
        _draw_difference(right, plain, technique, comparison, length, colour)
    left.plot([], [], color="#BBBBBB", linewidth=3, label="the plain network")
    left.legend(frameon=False, fontsize=7)
    title = "Each technique and the plain network, one seed"
    left.set_title(title, loc="left", weight="bold", fontsize=9)
    left.set_ylabel(f"loss, mean of {length} steps")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the usual one writes formulas
    right.set_ylabel("difference from the plain loss")
    right.set_title("dotted: its band", loc="right", fontsize=8, color=TEXT_COLOUR)
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.17))


def _draw_difference(
    axes: Axes, plain: Run, technique: Run, comparison: Comparison, length: int, colour: str
) -> None:
    """Draw how far each epoch's loss is from the plain one's; no line where it is nowhere."""
    steps, losses = _epochs(technique, length)
    points = [
        (step, abs(a - b))
        for step, a, b in zip(steps, plain.epoch_losses(length), losses, strict=False)
        if a != b  # a logarithm shows no 0
    ]
    name = label(technique) + (": equal at every step" if comparison.step_difference == 0 else "")
    axes.plot(*_columns(points), ".-", color=colour, linewidth=1.2, markersize=3, label=name)
    if not comparison.exact:
        axes.axhline(comparison.band, color=colour, linestyle=":", linewidth=1)


def _epochs(run: Run, length: int) -> tuple[list[float], list[float]]:
    """Return the last step of each epoch and its mean loss."""
    losses = run.epoch_losses(length)
    steps = [min((i + 1) * length, len(run.readings)) for i in range(len(losses))]
    return [float(step) for step in steps], losses


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def label(run: Run) -> str:
    """Return what a run is called in a legend: variant, and what it has beside the usual."""
    sides = "x".join(map(str, run.case.shape))
    parts = [run.case.variant, sides]
    if run.case.batch_size > 1:
        parts.append(f"batch {run.case.batch_size}")
    if run.case.precision != "fp32":
        parts.append(run.case.precision)
    return ", ".join(parts)


def mean_dice(run: Run) -> float | None:
    """Return the last Dice, the mean of the classes; None where a run did not come so far."""
    if not run.dice:
        return None
    _, scores = run.dice[-1]
    return sum(scores) / len(scores)
