"""Plans: which combinations are tried, how they are put in order, and what is written of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bench.case import Case, TechniqueUse
from bench.cli.plan import plan
from bench.errors import MembenchError
from bench.named_case import named_case
from bench.plan.code_text import code_text
from bench.plan.combinations import architectures, combined, single
from bench.plan.search import Plan, budget_card, make_plan
from bench.plan.simulator import Simulator
from bench.plan.slowdown import (
    DEVICE_BYTES_PER_S,
    FLOPS_PER_S,
    HOST_BYTES_PER_S,
    measured_times,
    predicted_slowdown,
)
from bench.plan.suite_text import suite_text
from bench.record import append_record
from bench.suite.load import load_suite
from bench.units import MIB
from memsave.techniques import TECHNIQUES
from tests.bench.records import make_record

CONTEXT = budget_card(2**40).context_bytes
SMALL = {"widths": [8, 16]}  # 2 levels, so sides are multiples of 2
FIELDS = {
    "network",
    "techniques",
    "precision",
    "exact",
    "fits",
    "peak_reserved_bytes",
    "process_bytes",
    "slowdown",
}

app = typer.Typer()
app.command()(plan)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def small_case(**given: object) -> Case:
    return named_case("fcn", shape="64x64x63", arguments=SMALL, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    # 110 MiB for the allocator: the plain network needs 138, with checkpoints 96.
    with Simulator(budget_card(CONTEXT + 110 * MIB)) as running:
        yield running


@pytest.fixture(scope="module")
def trained(simulator: Simulator) -> Plan:
    return make_plan(small_case(), simulator, precisions=("fp32",))


def test_proposals_that_fit_stand_first_exact_before_inexact_then_by_slowdown(
    trained: Plan,
) -> None:
    order = [
        (not p.fits, p.fits and not p.exact, p.slowdown if p.fits else p.needs_bytes)
        for p in trained.proposals
    ]

    assert 2 < len(trained.fitting) < len(trained.proposals) - 2
    assert {p.exact for p in trained.fitting} == {True, False}
    assert order == sorted(order)


def test_the_plain_network_does_not_fit_and_says_what_it_would_need(trained: Plan) -> None:
    (plain,) = [p for p in trained.proposals if not p.case.techniques]

    assert not plain.fits
    assert plain.headroom_bytes == 110 * MIB - plain.needs_bytes < 0
    assert plain.slowdown == pytest.approx(1.0)
    assert plain.case.shape == (64, 64, 64)  # padded from 63, nothing cropped


def test_what_fits_is_within_the_budget_with_its_context(trained: Plan) -> None:
    for proposal in trained.fitting:
        assert proposal.process_bytes == proposal.peak_reserved_bytes + CONTEXT
        assert proposal.process_bytes + proposal.headroom_bytes == CONTEXT + 110 * MIB
        assert proposal.headroom_bytes >= 0


def test_a_proposal_is_exact_only_if_all_its_techniques_are(trained: Plan) -> None:
    for proposal in trained.proposals:
        names = [use.name for use in proposal.case.techniques]
        assert proposal.exact == all(TECHNIQUES[name].exact for name in names)


def test_every_proposal_of_the_written_suite_gives_the_same_bytes_again(
    trained: Plan, simulator: Simulator, tmp_path: Path
) -> None:
    chosen = [*trained.fitting[:3], *trained.fitting[-2:]]
    path = tmp_path / "best.yaml"
    path.write_text(suite_text(chosen, None, "Best"))

    cases = load_suite(str(path)).own_cases
    records = simulator.records(cases)

    assert [c.variant for c in cases] == [p.case.variant for p in chosen]
    assert [r.peak_reserved_bytes for r in records] == [p.peak_reserved_bytes for p in chosen]
    assert [c.digest() for c in cases] == [p.case.digest() for p in chosen]


@pytest.mark.parametrize(
    "uses",
    [
        [],
        [TechniqueUse(name="inplace_abn"), TechniqueUse(name="checkpoint")],
        [TechniqueUse(name="recomputed_norm_act"), TechniqueUse(name="offload")],
        [TechniqueUse(name="tiled_levels")],
        [TechniqueUse(name="checkpoint_budget", options={"budget": 2**20})],
        [
            TechniqueUse(name="checkpoint", options={"every": 2}),
            TechniqueUse(name="optimizer_in_backward"),
        ],
    ],
)
def test_the_lines_to_paste_train(uses: list[TechniqueUse]) -> None:
    case = small_case(techniques=uses)
    names: dict[str, object] = {
        "image": torch.randn(1, 1, 16, 16, 16),
        "target": torch.randint(3, (1, 16, 16, 16)),
    }

    exec(code_text(case), names)

    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    for use in uses:
        assert use.name in code_text(case)
    optimizer = names["optimizer"]
    assert optimizer.state  # type: ignore[attr-defined]  # it made its update


def test_the_lines_of_a_prediction_run_without_gradients() -> None:
    names: dict[str, object] = {"image": torch.randn(1, 1, 16, 16, 16)}

    exec(code_text(small_case(mode="infer")), names)

    output = names["output"]
    assert isinstance(output, torch.Tensor)
    assert output.shape == (1, 3, 16, 16, 16)
    assert not output.requires_grad


def test_the_lines_of_a_network_of_ones_own_import_it() -> None:
    case = named_case(
        "tests.bench.any_networks:Flexible",
        inputs=["1x1x8x8x8"],
        arguments={"width": 2},
        loss="cross_entropy",
        techniques=[TechniqueUse(name="offload")],
    )
    names: dict[str, object] = {
        "image": torch.randn(1, 1, 8, 8, 8),
        "target": torch.randint(3, (1, 8, 8, 8)),
    }

    exec(code_text(case), names)

    assert type(names["model"]).__name__ == "Flexible"


# -- which combinations -----------------------------------------------------------------------


def everything(case: Case) -> list[TechniqueUse]:
    return [use for one in single(case) for use in one.techniques]


def test_no_combination_is_tried_twice_and_every_technique_stands_alone_too() -> None:
    case = small_case()

    cases = combined(case, everything(case), ("fp32", "fp16"), allow_architecture=False)

    assert len({c.digest() for c in cases}) == len({(c.variant) for c in cases}) == len(cases)
    alone = {c.techniques[0].name for c in cases if len(c.techniques) == 1}
    assert alone >= {
        "inplace_abn",
        "recomputed_norm_act",
        "checkpoint",
        "checkpoint_budget",
        "offload",
        "tiled_levels",
        "compress_activations",
        "optimizer_in_backward",
    }


def test_a_technique_is_not_tried_at_a_precision_that_it_refuses() -> None:
    case = small_case()

    cases = combined(case, everything(case), ("fp32", "fp16"), allow_architecture=False)

    at = {c.precision for c in cases for u in c.techniques if u.name == "optimizer_in_backward"}
    assert at == {"fp32"}


def test_architectures_change_only_where_allowed_and_only_what_was_left_open() -> None:
    case = named_case("fcn", shape="64x64x64")
    working = everything(case)

    closed = combined(case, working, ("fp16",), allow_architecture=False)
    opened = combined(case, working, ("fp16",), allow_architecture=True)

    assert {c.network_options.get("block") for c in closed} == {None}
    assert any(
        c.network_options == {"block": "ccblock"}
        and [u.name for u in c.techniques] == ["inplace_abn"]
        and c.precision == "fp16"
        for c in opened
    )
    assert {"widths": "pocket"} in architectures(case)
    fixed = named_case("fcn", shape="64x64x64", arguments={"block": "sepconv", "widths": [8, 16]})
    assert architectures(fixed) == []


# -- slowdown ---------------------------------------------------------------------------------


def test_slowdown_is_that_of_the_flops_where_nothing_is_moved() -> None:
    plain = make_record(forward_flops=100, step_flops=300, needs_bytes=0, techniques=())
    again = replace(plain, step_flops=400)

    assert predicted_slowdown(again, plain) == pytest.approx(4 / 3)
    assert predicted_slowdown(plain, replace(plain, step_flops=0)) is None


def test_bytes_moved_to_the_host_count_only_beyond_the_computation() -> None:
    second = int(FLOPS_PER_S["fp32"])
    plain = make_record(
        forward_flops=second, step_flops=3 * second, needs_bytes=0, techniques=(), precision="fp32"
    )
    hidden = replace(plain, peak_host_bytes=int(HOST_BYTES_PER_S))
    seen = replace(plain, peak_host_bytes=int(1.5 * HOST_BYTES_PER_S))

    assert predicted_slowdown(hidden, plain) == pytest.approx(1.0)
    assert predicted_slowdown(seen, plain) == pytest.approx(3.5 / 3)


def test_a_norm_made_again_costs_a_pass_over_the_activations() -> None:
    second = int(FLOPS_PER_S["fp32"])
    plain = make_record(
        forward_flops=second,
        step_flops=3 * second,
        needs_bytes=int(DEVICE_BYTES_PER_S),
        parameters=0,
        techniques=(),
        precision="fp32",
    )
    again = replace(plain, techniques=("recomputed_norm_act",))

    assert predicted_slowdown(again, plain) == pytest.approx((3 + 5 + 1) / (3 + 5))


def test_measured_times_are_the_median_of_the_card_asked_for(tmp_path: Path) -> None:
    case = small_case()
    for card, times in (("rtx4090-24gb", (3.0, 1.0, 2.0)), ("h200-141gb", (9.0,))):
        made = make_record(evidence="measured", card=card, step_times_s=times)
        record = replace(made, definition=case.to_definition())
        append_record(tmp_path / f"{card}.measured.jsonl", record)

    assert measured_times(tmp_path, "rtx4090-24gb") == {case.digest(): 2.0}


def test_a_measured_slowdown_goes_before_an_estimate(simulator: Simulator) -> None:
    case = small_case(mode="infer")
    plain, inplace = single(case)
    times = {plain.digest(): 2.0, inplace.digest(): 5.0}

    found = make_plan(case, simulator, precisions=("fp32",), times=times)

    (proposal,) = [p for p in found.proposals if p.case.techniques]
    assert (proposal.slowdown, proposal.slowdown_evidence) == (2.5, "measured")


# -- the command ------------------------------------------------------------------------------


SHAPE = ("--network", "fcn", "--shape", "20x20x17", "--mode", "infer", "--precision", "fp32")


def test_json_is_a_list_of_proposals_with_the_fields_promised(tmp_path: Path) -> None:
    result = invoke(*SHAPE, "--card", "rtx4090-24gb", "--json", "--results", str(tmp_path))

    proposals = json.loads(result.stdout)
    assert result.exit_code == 0
    assert all(set(p) >= FIELDS for p in proposals)
    assert [p["techniques"] for p in proposals] == [[], ["inplace_abn"]]
    assert [p["exact"] for p in proposals] == [True, False]
    assert all(p["fits"] and p["shape"] == [24, 24, 24] for p in proposals)


def test_nothing_that_fits_is_exit_code_1_with_what_would_do(tmp_path: Path) -> None:
    result = invoke(
        "--network",
        "fcn",
        "--shape",
        "64x64x640",
        "--mode",
        "infer",
        "--precision",
        "fp32",
        "--budget",
        str(CONTEXT + 2110 * MIB),
        "--write-suite",
        str(tmp_path / "no.yaml"),
    )

    assert result.exit_code == 1
    assert "bytes) are missing" in result.stdout
    assert "the smallest card that has so much: " in result.stdout
    assert "or a smaller shape: 64x64x" in result.stdout
    assert not (tmp_path / "no.yaml").exists()


def test_a_budget_below_the_context_fits_nothing() -> None:
    result = invoke(*SHAPE, "--budget", "1MiB", "--json")

    assert result.exit_code == 1
    assert [p["fits"] for p in json.loads(result.stdout)] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--network", "fcn", "--shape", "16x16x16"), "--card"),
        (("--network", "fcn", "--card", "rtx4090-24gb", "--budget", "1GiB"), "one of the two"),
        ((*SHAPE, "--card", "rtx4090"), "rtx4090-24gb"),
        ((*SHAPE, "--budget", "20MB"), "MB means"),
        ((*SHAPE[:-1], "fp8", "--card", "rtx4090-24gb"), "fp8"),
        ((*SHAPE, "--card", "rtx4090-24gb", "--json", "--code"), "--code"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "words"),
    [("none/x.yaml", "is no folder"), (".", "it is a folder"), ("f/x", "no folder")],
)
def test_a_suite_that_cannot_be_written_is_refused_before_the_search(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").touch()
    monkeypatch.setattr("bench.plan.simulator.Simulator.__init__", None)  # no search may begin

    result = invoke(*SHAPE, "--card", "t4-16gb", "--write-suite", str(tmp_path / path))

    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_least_budget_that_is_named_does_and_a_byte_less_does_not() -> None:
    """96 MiB are needed by the allocator; 64 MiB are less than the context alone."""
    result = invoke(*SHAPE, "--budget", "64MiB")
    (line,) = [one for one in result.stdout.splitlines() if "least budget" in one]
    found = re.search(r"would do: (\d+) bytes", line)
    assert found is not None
    least = int(found[1])

    assert result.exit_code == 1
    assert f"the CUDA context takes {CONTEXT // MIB} MiB" in line
    assert least > CONTEXT
    assert invoke(*SHAPE, "--budget", str(least), "--json").exit_code == 0
    assert invoke(*SHAPE, "--budget", str(least - 1), "--json").exit_code == 1


def test_a_network_that_cannot_be_simulated_is_named(simulator: Simulator) -> None:
    case = named_case("tests.bench.any_networks:failing", inputs=["1x1x8x8x8"])

    with pytest.raises(MembenchError, match=r"cannot be planned for.*the width must be even"):
        make_plan(case, simulator, precisions=("fp32",))


def test_the_command_imports_no_torch_for_its_help() -> None:
    code = "import bench.cli.plan, bench.cli.max_shape, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
