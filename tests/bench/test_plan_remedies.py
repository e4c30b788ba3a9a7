"""What a plan says where nothing fits: a smaller shape, also of a network of the user's own."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from bench.cli.plan import plan
from bench.named_case import named_case
from bench.plan.remedies import smaller_shapes
from bench.plan.search import budget_card
from bench.units import MIB

CONTEXT = budget_card(2**40).context_bytes

app = typer.Typer()
app.command()(plan)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_of_a_network_of_ones_own_a_smaller_shape_of_the_same_proportions_is_named(
    tmp_path: Path,
) -> None:
    """Flexible predicts with its 4 channels: 112 MiB for 96x128x192, and in proportion."""
    given = ("--network", "tests.bench.any_networks:Flexible", "--input", "1x1x96x128x192")
    limits = ("--mode", "infer", "--precision", "fp32", "--results", str(tmp_path))
    result = invoke(*given, *limits, "--budget", str(CONTEXT + 60 * MIB))

    assert result.exit_code == 1
    (line,) = [one for one in result.stdout.splitlines() if "a smaller shape" in one]
    named = re.search(r"(\d+)x(\d+)x(\d+) fits with the same techniques", line)
    assert named is not None
    sides = [int(side) for side in named.groups()]
    assert all(side % 32 == 0 for side in sides)
    x, y, z = sides  # rounded up to 32: a step at most from half and two thirds of the longest
    assert 0 <= x - z / 2 < 32
    assert 0 <= y - z * 2 / 3 < 32
    assert z < 192
    again = invoke(
        *given[:3], f"1x1x{'x'.join(map(str, sides))}", *limits, "--budget", str(CONTEXT + 60 * MIB)
    )
    assert again.exit_code == 0


def test_of_a_network_with_several_inputs_no_shape_is_named() -> None:
    case = named_case("tests.bench.any_networks:TwoInputs", inputs=["1x8:int64", "1x8x5"])

    assert smaller_shapes(case) is None
