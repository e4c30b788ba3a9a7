"""A suite's row whose techniques do not go together is refused where the second one stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.build_workload import build_workload
from bench.case import TechniqueUse
from bench.errors import MembenchError
from tests.bench.suite_files import load, refusal, with_row

ROW = "line 6: matrix.networks[1].techniques"


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        (
            "[inplace_abn, inplace_group_norm]",
            (
                "[1]: techniques 'inplace_abn' and 'inplace_group_norm' cannot be used together: "
                "both choose the norm that the network is built with, so the one named last would "
                "take the other's place: name one of them"
            ),
        ),
        (
            "[checkpoint_selective, offload, {name: checkpoint, every: 2}]",
            (
                "[2].name: techniques 'checkpoint_selective' and 'checkpoint' cannot be used "
                "together: one block is recomputed whole or in part: name one of them, or give "
                "each its own blocks"
            ),
        ),
        (
            "[{name: checkpoint, every: 2}, {name: checkpoint, every: 1}]",
            "[1].name: technique 'checkpoint' is named twice: name it once",
        ),
    ],
)
def test_a_pair_is_refused_with_its_reason(tmp_path: Path, techniques: str, message: str) -> None:
    assert refusal(tmp_path, with_row(f"techniques: {techniques}")) == ROW + message


def test_a_network_of_the_user_s_own_may_share_its_norms_but_not_its_blocks(tmp_path: Path) -> None:
    suite = """\
title: Mine
include:
  - network: {import: "torch.nn:Sequential"}
    variant: v
    shape: 8x8x8
    techniques: [inplace_abn, inplace_group_norm, %s]
"""
    load(tmp_path, suite % "offload")
    told = refusal(tmp_path, suite % "checkpoint, checkpoint_budget")
    assert "include[0].techniques[3]: techniques 'checkpoint' and 'checkpoint_budget'" in told


def test_a_case_that_names_such_a_pair_is_not_built(tmp_path: Path) -> None:
    case = load(tmp_path, with_row("levels: 2")).own_cases[-1]
    uses = (TechniqueUse(name="tiled_levels"), TechniqueUse(name="checkpoint_budget"))
    with pytest.raises(MembenchError, match="'tiled_levels' and 'checkpoint_budget' cannot be"):
        build_workload(dataclasses.replace(case, techniques=uses), lambda _phase: None, "meta")
