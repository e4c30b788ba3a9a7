"""The plans that are kept: made, reported, and held against the README and the code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import plan_session
from bench.environment import read_environment
from bench.errors import MembenchError
from bench.plan.simulator import Simulator
from bench.plan.stored import StoredPlan, read_plan, read_plans, stored_plan, write_plan
from bench.plan_session import CARDS, main, search
from bench.predict.cards import find_card
from bench.predict.shim import choose_tracer
from bench.report.plans import SHOWN, plans_markdown, quickest, readme_rows
from bench.report.results import read_results
from bench.suite.load import load_suite
from bench.units import GIB

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "results" / "plans"
TABLE = "| card | the same network, exact | the same in fp32 | other architecture |"


def proposal(variant: str, slowdown: float | None = 1.0, **given: Any) -> dict[str, Any]:
    made = {
        "network": "fcn",
        "network_options": {},
        "variant": variant,
        "techniques": [],
        "precision": "fp32",
        "exact": True,
        "fits": True,
        "peak_reserved_bytes": 2 * GIB,
        "process_bytes": 3 * GIB,
        "needs_bytes": 2 * GIB,
        "headroom_bytes": GIB,
        "slowdown": slowdown,
        "slowdown_evidence": "predicted",
        "shape": [256, 256, 240],
        "requested_shape": [256, 256, 234],
    }
    return {**made, **given}


def plan_of(*proposals: dict[str, Any], card: str = "t4-16gb") -> StoredPlan:
    command, made = ["plan", "--card", card], read_environment()
    return stored_plan(command, find_card(card), "cuda-shim", made, proposals)


COMPACT = {"network_options": {"block": "ccblock"}}
SOME = (
    proposal("tiled+fp16", 1.5, precision="fp16"),
    proposal("checkpoint", 1.25),
    proposal("inplace_abn", 1.1, exact=False),
    proposal("ccblock", 1.2, **COMPACT),
    proposal("ccblock+int8", 1.05, exact=False, **COMPACT),
    proposal("plain", 1.0, fits=False),
)


def test_a_plan_is_read_as_it_was_written_a_proposal_a_line(tmp_path: Path) -> None:
    plan = plan_of(*SOME)

    path = write_plan(tmp_path, plan)

    assert path == tmp_path / "t4-16gb.json"
    assert read_plan(path) == plan
    assert sum('"variant"' in line for line in path.read_text().splitlines()) == len(SOME)
    assert plan.environment.card_hash == find_card("t4-16gb").digest()
    assert plan.environment.started_at is not None


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    path = write_plan(tmp_path, plan_of(*SOME))
    data = json.loads(path.read_text())
    del data["proposals"][0]["slowdown"]
    broken = {
        "without slowdown": json.dumps(data),
        "none at all": json.dumps({**data, "proposals": []}),
        "is no plan": "[]",
        "environment": json.dumps({k: v for k, v in data.items() if k != "environment"}),
    }

    for words, text in broken.items():
        path.write_text(text)
        with pytest.raises(MembenchError, match=rf"t4-16gb\.json .*{words}"):
            read_plan(path)
    with pytest.raises(MembenchError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(MembenchError, match="no plans in"):
        read_plans(tmp_path / "empty")


def test_the_quickest_of_each_kind_is_taken_among_those_that_fit() -> None:
    plan = plan_of(*SOME)

    found = {kind: quickest(plan, kind) for kind in ("exact", "exact fp32", "not exact")}

    assert {kind: one and one["variant"] for kind, one in found.items()} == {
        "exact": "checkpoint",
        "exact fp32": "checkpoint",
        "not exact": "inplace_abn",
    }
    other = quickest(plan, "other architecture")
    assert other is not None
    assert other["variant"] == "ccblock+int8"
    assert quickest(plan_of(SOME[-1]), "exact") is None


def test_rows_for_the_readme_name_card_technique_bytes_and_slowdown() -> None:
    (row,) = readme_rows([plan_of(SOME[0], SOME[3], SOME[5])])

    assert row == "| `t4-16gb` | `tiled+fp16`, 2.0 GiB, 1.50 x | - | `ccblock`, 2.0 GiB, 1.20 x |"


def test_the_report_lists_the_first_proposals_and_says_predicted() -> None:
    many = [proposal(f"number-{i}", 1 + i) for i in range(SHOWN + 2)]
    text = plans_markdown([plan_of(*many), plan_of(SOME[-1], card="a40-48gb")])

    assert text.startswith(
        "# What makes fcn at 256x256x234 (run as 256x256x240) fit a card, predict"
    )
    assert "All figures are predicted" in text
    assert f"`number-{SHOWN - 1}`" in text
    assert f"`number-{SHOWN}`" not in text
    assert f"{SHOWN + 2} of {SHOWN + 2} combinations fit, the first {SHOWN}:" in text
    assert "0 of 1 combinations fit, none is listed." in text
    assert "membench plan --card t4-16gb" in text


def test_a_measured_slowdown_is_marked_so() -> None:
    measured = proposal("plain", 1.5, slowdown_evidence="measured")

    assert "1.50 x measured" in readme_rows([plan_of(measured)])[0]


def test_a_session_searches_writes_and_prints_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real search, of a network that predicts in seconds."""
    asked = ("plan", "--network", "fcn", "--shape", "20x20x17", "--mode", "infer")
    monkeypatch.setattr(plan_session, "search", lambda card, to: search(card, to, asked))
    plans, reports = tmp_path / "plans", tmp_path / "reports"

    code = main(["t4-16gb", "--plans", str(plans), "-o", str(reports)])

    said = capsys.readouterr().out
    plan = read_plan(plans / "t4-16gb.json")
    assert code == 0
    assert said.splitlines()[-1:] == readme_rows([plan])
    assert plan.command == (*asked, "--card", "t4-16gb", "--json")
    assert plan.tracer == choose_tracer()[0]
    suite = load_suite(str(plans / "t4-16gb.yaml"))
    assert [c.variant for c in suite.own_cases] == [p["variant"] for p in plan.fitting[:SHOWN]]
    made = (reports / "plans.md").read_bytes()
    assert main(["--report-only", "--plans", str(plans), "-o", str(reports)]) == 0
    assert (reports / "plans.md").read_bytes() == made


def test_what_goes_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--plans", str(tmp_path / "p"), "-o", str(tmp_path / "r")]
    assert main(["rtx4060", *folders]) == 2
    assert main(["--report-only", *folders]) == 2
    (tmp_path / "file").touch()
    assert main(["t4-16gb", "--plans", str(tmp_path / "file" / "x")]) == 2
    for code in (1, 2):  # crashed, refused
        failed = subprocess.CompletedProcess([], code, stdout="")
        monkeypatch.setattr(subprocess, "run", lambda *_a, done=failed, **_k: done)
        assert main(["t4-16gb", *folders]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)


# -- what is committed ------------------------------------------------------------------------


def test_the_five_cards_are_there_and_of_the_torch_that_is_pinned() -> None:
    plans = read_plans(PLANS)
    pinned = (ROOT / "constraints.txt").read_text().partition("\ntorch==")[2].split()[0]

    assert [plan.card for plan in plans] == list(CARDS)
    for plan in plans:
        assert (plan.environment.torch or "").partition("+")[0] == pinned
        assert (plan.evidence, plan.tracer) == ("predicted", "cuda-shim")
        assert plan.environment.card_hash == find_card(plan.card).digest()
        assert all(p["process_bytes"] <= plan.memory_bytes for p in plan.fitting)


def test_the_papers_own_answer_for_24_gb_is_among_the_proposals() -> None:
    plan = read_plan(PLANS / "rtx4090-24gb.json")
    paper = {**COMPACT, "techniques": ["inplace_abn"], "precision": "fp16", "fits": True}

    assert any({**one, **paper} == one for one in plan.proposals)


def test_the_report_is_made_of_the_plans() -> None:
    assert (ROOT / "reports" / "plans.md").read_text() == plans_markdown(read_plans(PLANS))


def test_the_readmes_table_holds_the_rows_of_the_plans() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first = lines.index(TABLE) + 2
    rows = lines[first : lines.index("", first)]

    assert rows == readme_rows(read_plans(PLANS)), "nox -s plans prints the rows to be put there"


def test_reports_of_results_pass_the_plans_over() -> None:
    with pytest.raises(MembenchError, match="no records"):
        read_results([PLANS])


def skip_unless_made_alike(plan: StoredPlan) -> None:
    """Skip, visibly, where torch or the tracer is not the one that the plan was made with."""
    ours = (read_environment().torch, choose_tracer()[0])
    if ours != (plan.environment.torch, plan.tracer):
        pytest.skip(f"the plan is of torch {plan.environment.torch}, {plan.tracer}; here: {ours}")


@pytest.mark.parametrize(
    "card", [pytest.param(c, marks=() if c == CARDS[-1] else pytest.mark.slow) for c in CARDS]
)
def test_the_suite_beside_a_plan_gives_the_same_bytes_again(card: str) -> None:
    """The fast one is of the largest card, where the first proposals have no tiles to trace."""
    plan = read_plan(PLANS / f"{card}.json")
    skip_unless_made_alike(plan)
    cases = load_suite(str(PLANS / f"{card}.yaml")).own_cases
    count = 2 if card == CARDS[-1] else SHOWN

    with Simulator(find_card(card)) as simulator:
        records = simulator.records(cases[:count])

    names = ("peak_reserved_bytes", "process_bytes", "needs_bytes")
    assert len(cases) == min(SHOWN, len(plan.fitting))
    for case, record, one in zip(cases[:count], records, plan.fitting[:count], strict=True):
        assert case.variant == one["variant"]
        assert record.status == "ok"
        assert {n: dataclasses.asdict(record)[n] for n in names} == {n: one[n] for n in names}
