"""The suites that ``plan --write-suite`` writes, run: every proposal gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench.cli.plan import plan
from bench.cli.run import run
from bench.plan import combinations
from bench.plan.search import budget_card
from bench.units import MIB

CONTEXT = budget_card(2**40).context_bytes
FEW = {  # few techniques, for speed
    "_HELD": (None, combinations._CHECKPOINT, combinations._PLACED),
    "_MOVED": (None,),
}

planning, running = typer.Typer(), typer.Typer()
planning.command()(plan)
running.command()(run)


def both(arguments: list[str], folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the proposals that fit, and the records of the suite that was written of them."""
    suite = str(folder / "best.yaml")
    found = CliRunner().invoke(
        planning, [*arguments, "--json", "--write-suite", suite, "--best", "1000"]
    )
    assert found.exit_code == 0, found.stderr
    ran = CliRunner().invoke(
        running, [suite, "--device", "predict", "--json", "--results", str(folder)]
    )
    assert ran.exit_code == 0, ran.stderr
    fitting = [proposal for proposal in json.loads(found.stdout) if proposal["fits"]]
    return fitting, [json.loads(line) for line in ran.stdout.splitlines()]


def assert_the_same(proposals: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    names = ("needs_bytes", "peak_reserved_bytes", "process_bytes", "exact")
    told = {p["variant"]: (p["precision"], *(p[name] for name in names)) for p in proposals}
    ran = {r["variant"]: (r["precision"], *(r[name] for name in names)) for r in records}
    assert told == ran
    assert len(told) == len(proposals) == len(records)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, uses in FEW.items():
        monkeypatch.setattr(combinations, name, uses)


@pytest.mark.usefixtures("_few")
def test_a_budget_and_bf16_and_placed_checkpoints_run_as_they_were_planned(
    tmp_path: Path,
) -> None:
    # The plain network needs 102 MiB and the least peak 98; a size that only bytes can say.
    budget = CONTEXT + 99 * MIB + 7
    shape = ["--network", "fcn", "--shape", "64x64x60", "--arguments", '{"widths": [8, 16, 16]}']

    proposals, records = both([*shape, "--budget", str(budget), "--precision", "bf16"], tmp_path)

    assert_the_same(proposals, records)
    assert {r["card"] for r in records} == {f"budget-{budget}b-1gb"}
    assert {r["capacity_bytes"] for r in records} == {99 * MIB + 7}
    assert {p["precision"] for p in proposals} == {"bf16"}
    budgets = [p["technique_options"].get("checkpoint_budget", {}) for p in proposals]
    assert any("budget" in options for options in budgets)


@pytest.mark.slow
@pytest.mark.usefixtures("_few")
def test_other_architectures_on_a_named_card_run_as_they_were_planned(tmp_path: Path) -> None:
    shape = ["--network", "fcn", "--shape", "160x160x150", "--card", "rtx4060-8gb"]

    proposals, records = both([*shape, "--allow-architecture"], tmp_path)

    assert_the_same(proposals, records)
    assert {r["card"] for r in records} == {"rtx4060-8gb"}
    paper = {"network_options": {"block": "ccblock"}, "techniques": ["inplace_abn"]}
    assert any({**p, **paper} == p and p["precision"] == "fp16" for p in proposals)


@pytest.mark.parametrize("network", ["tests.bench.any_networks:Flexible", "pocketnet_2d"])
def test_networks_of_ones_own_and_flat_ones_run_as_they_were_planned(
    network: str, tmp_path: Path
) -> None:
    own = ":" in network  # trained with every technique that it takes; the other predicts
    image = ["--input", "2x1x20x24x28"] if own else ["--shape", "64x48", "--mode", "infer"]

    proposals, records = both(["--network", network, *image, "--card", "t4-16gb"], tmp_path)

    assert_the_same(proposals, records)
    assert len(proposals) > 1
    assert {tuple(p["shape"]) for p in proposals} == {(20, 24, 28) if own else (64, 48)}
    assert {p["batch_size"] for p in proposals} == {2 if own else 1}
