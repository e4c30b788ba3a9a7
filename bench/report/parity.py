"""The report of ``membench parity``: what the curves show, in tables and words made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.parity import Comparison, Run, Training
from bench.report.curves import label, mean_dice, plot_curves
from bench.report.grids import escaped
from bench.suite.parity import Figure, ParityPlan

__all__ = [
    "PLOT_NAME",
    "comparison_rows",
    "comparison_text",
    "findings",
    "parity_files",
    "run_rows",
    "trained_on",
]

PLOT_NAME = "parity"
RUN_HEADINGS = ("run", "loss, last epoch", "Dice", "mean Dice", "time", "ended")
_HOW_HELD = (
    "All measured. An exact technique must repeat the loss of every step to the bit (on a GPU "
    "within what sums in no fixed order leave open); of another the mean loss of every {} steps "
    "must stay within its band."
)
PAIR_HEADINGS = ("technique", "plain", "largest difference", "at step", "band", "verdict")


def parity_files(
    title: str,
    command: str,
    plan: ParityPlan,
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    training: Training,
) -> dict[str, bytes]:
    """Return file name -> contents: ``parity.md`` and its plot as PNG and SVG."""
    by_name = {run.case.name: run for run in runs}
    text = [
        f"# Parity: {escaped(title)}",
        "*Made by `membench parity`. Do not edit: make it again.*",
        escaped(trained_on(training)),
        "```sh\n" + command + "\n```",
        "\n".join(f"- {escaped(line)}" for line in findings(plan, by_name, comparisons)),
        f"![Dice and loss of all runs]({PLOT_NAME}.png)",
        f"The same plot as [SVG]({PLOT_NAME}.svg).",
        "## Runs",
        _markdown(RUN_HEADINGS, run_rows(runs, training)),
    ]
    if comparisons:
        text += [
            "## Techniques and their plain networks",
            _HOW_HELD.format(training.settings.steps_per_epoch),
            _markdown(PAIR_HEADINGS, comparison_rows(comparisons)),
        ]
    files = {
        f"{PLOT_NAME}.{kind}": plot_curves(plan, by_name, comparisons, training, kind)
        for kind in ("png", "svg")
    }
    return {**files, "parity.md": ("\n\n".join(text) + "\n").encode()}


def trained_on(training: Training) -> str:
    """Return one sentence on what all runs share."""
    settings, sides = training.settings, "x".join(map(str, training.volume.shape))
    where = "the CPU" if training.device == "cpu" else "the GPU"
    return (
        f"Trained on {where}: {training.steps} steps from seed {training.seed}, random crops of "
        f"{training.volume.name} ({sides} voxels of {settings.spacing_mm:g} mm; classes "
        f"{', '.join(training.volume.class_names)}). Dice is measured on that same volume: it "
        "compares ways of training, and says nothing of volumes that were not seen."
    )


def findings(
    plan: ParityPlan, runs: Mapping[str, Run], comparisons: Sequence[Comparison]
) -> list[str]:
    """Return what the runs show, a line for each figure and one for the pairs."""
    lines = [_figure_finding(figure, runs) for figure in plan.figures]
    if comparisons:
        lines.append(_pairs_finding(comparisons))
    return lines


def _figure_finding(figure: Figure, runs: Mapping[str, Run]) -> str:
    ended = {label(runs[c.name]): mean_dice(runs[c.name]) for c in figure.cases}
    known = {name: dice for name, dice in ended.items() if dice is not None}
    ranked = sorted(known.items(), key=lambda item: -item[1])
    text = "; ".join(f"{name}: {dice:.3f}" for name, dice in ranked)
    line = f"{figure.title}. Mean Dice at the end: {text or 'of none'}"
    if len(ranked) > 1:
        line += f"; from first to last {ranked[0][1] - ranked[-1][1]:.3f}"
    diverged = [label(runs[c.name]) for c in figure.cases if runs[c.name].status != "ok"]
    if diverged:
        line += f"; diverged: {', '.join(diverged)}"
    return line + (f". To compare: {figure.note}." if figure.note else ".")


def _pairs_finding(comparisons: Sequence[Comparison]) -> str:
    exact = [c for c in comparisons if c.exact]
    banded = [c for c in comparisons if not c.exact]
    parts = []
    if exact:
        equal = sum(c.step_difference == 0 for c in exact)
        largest = max(c.difference for c in exact)
        parts.append(
            f"{equal} of {len(exact)} exact techniques repeat the plain run's loss to the bit at "
            f"every step (largest difference {_number(largest)})"
        )
    if banded:
        inside = sum(c.inside for c in banded)
        nearest_edge = max(banded, key=lambda c: c.difference / c.band)
        parts.append(
            f"{inside} of {len(banded)} others stay within their bands, nearest to its edge "
            f"{_variant(nearest_edge.technique)} with {_number(nearest_edge.difference)} of "
            f"{nearest_edge.band:g}"
        )
    return "Techniques beside their plain networks: " + "; ".join(parts) + "."


def run_rows(runs: Sequence[Run], training: Training) -> list[tuple[str, ...]]:
    """Return a row of text for each run, in the order of ``RUN_HEADINGS``."""
    names = training.volume.class_names[1:]
    rows: list[tuple[str, ...]] = []
    for run in runs:
        epochs = run.epoch_losses(training.settings.steps_per_epoch)
        by_class, mean = "-", mean_dice(run)
        if run.dice:
            pairs = zip(names, run.dice[-1][1], strict=True)
            by_class = ", ".join(f"{name} {dice:.3f}" for name, dice in pairs)
        rows.append(
            (
                label(run),
                f"{epochs[-1]:.4f}" if epochs else "-",
                by_class,
                "-" if mean is None else f"{mean:.3f}",
                f"{run.time_s:.0f} s",
                run.reason or "whole",
            )
        )
    return rows


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return a row of text for each comparison, in the order of ``PAIR_HEADINGS``."""
    return [
        (
            _variant(c.technique),
            _variant(c.plain),
            _number(c.difference),
            str(c.step) if c.difference else "-",
            f"{c.band:g}" if c.band else "0: to the bit",
            "inside" if c.inside else "LEFT ITS BAND",
        )
        for c in comparisons
    ]


def comparison_text(comparison: Comparison) -> str:
    """Return one line on a technique that left its band."""
    return (
        f"{comparison.technique} left its band: its loss differs from that of {comparison.plain} "
        f"by {_number(comparison.difference)} at step {comparison.step}, band {comparison.band:g}"
    )


def _number(difference: float) -> str:
    if math.isinf(difference):
        return "diverged"
    return f"{difference:.2g}" if difference else "0"


def _variant(case: str) -> str:
    return case.split("/")[1]


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([escaped(cell) for cell in r] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
