"""The report of predictions against torch's host code, from recorded pairs of records."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.fidelity import Compared, Fidelity
from bench.record import Record, append_record
from bench.runner import Progress
from bench.units import GIB, MIB
from tests.bench.records import make_record
from tests.stand_in import host_code
from tests.stand_in.host_code import compare_suites, host_code_markdown, main, stand_in_records
from tests.stand_in.pose import NAME

CAPACITY = 16 * GIB


def of_torch(**changes: Any) -> Record:
    """A record as a run on the stand-in leaves it; all of its memory is the allocator's."""
    fields: dict[str, Any] = {
        "evidence": "measured",
        "tracer": None,
        "card": "standin-16gb",
        "capacity_bytes": CAPACITY,
        **changes,
    }
    record = make_record(**fields)
    return dataclasses.replace(
        record, environment=dataclasses.replace(record.environment, gpu=NAME, driver="stand-in")
    )


def pair(case: str, **differences: int) -> Compared:
    """A case predicted as torch did it, but for so many bytes of a counter."""
    torch = of_torch()
    changed = {
        f"peak_{name}_bytes": getattr(torch, f"peak_{name}_bytes") + size
        for name, size in differences.items()
    }
    predicted: Record = dataclasses.replace(make_record(**changed), case=case)
    return Compared(
        measured=dataclasses.replace(torch, case=case), predicted=predicted, heldout=False
    )


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_suites_table_counts_equal_cases_and_gives_the_spread() -> None:
    pairs = [pair("a"), pair("b", allocated=-3 * MIB), pair("c", allocated=1 * MIB)]

    found = rows(host_code_markdown({"table1": Fidelity(compared=tuple(pairs))}))

    by_name = {row[0]: row[1:] for row in found}
    torch = pairs[0].measured.peak_allocated_bytes
    assert torch is not None
    assert by_name["requested"] == ["3", "3", "0 B", "0 B", "0 B", "0.0000 %"]
    # The sizes are 0, 1 and 3 MiB, whose median is 1.
    assert by_name["allocated"][:5] == ["3", "1", "1 MiB", "-3 MiB", "+1 MiB"]
    assert by_name["allocated"][5] == f"{3 * MIB / torch:.4%}".replace("%", " %")


def test_cases_that_differ_are_listed_worst_first_and_the_others_are_not() -> None:
    pairs = [pair("alike"), pair("little", requested=8), pair("much", reserved=-2 * MIB)]

    text = host_code_markdown({"table1": Fidelity(compared=tuple(pairs))})

    assert "2 cases differ:" in text
    names = [row[0] for row in rows(text)]
    assert names.index("much") < names.index("little")
    assert "alike" not in names


def test_no_more_than_ten_cases_are_listed() -> None:
    pairs = [pair(f"case{i}", allocated=i + 1) for i in range(12)]

    text = host_code_markdown({"table1": Fidelity(compared=tuple(pairs))})

    assert "12 cases differ; the worst 10:" in text
    listed = [row[0] for row in rows(text) if row[0].startswith("case")]
    assert listed[1:] == [f"case{i}" for i in range(11, 1, -1)]  # after the table's head


def test_verdicts_that_differ_and_cases_that_were_not_compared_stand_in_the_report() -> None:
    out = make_record(status="oom", reason="out of memory in forward")
    found = Fidelity(
        compared=(pair("a"),),
        agreed_oom=("b", "c"),
        differing=((of_torch(), out),),
        not_predicted=(("d", "measured failed: no"),),
    )

    text = host_code_markdown({"heldout": found})

    assert "## heldout" in text
    assert "Out of memory on both sides: 2 cases." in text
    assert f"- {out.case}: measured ok" in text
    assert "predicted oom (out of memory in forward)" in text
    assert "- d: not compared: measured failed: no" in text
    assert "differ:" not in text


def test_the_first_paragraph_says_what_is_not_judged_and_that_no_gpu_measured() -> None:
    text = host_code_markdown({"table1": Fidelity(compared=(pair("a"),))})

    first = text.split("\n\n")[2].replace("\n", " ")
    assert "workspaces, contexts and times are not judged here" in first
    assert "nothing here was measured on a GPU" in first
    assert f"`{NAME}`" in first
    assert "driver stand-in" in text


def test_a_suite_without_a_case_on_both_sides_says_so() -> None:
    text = host_code_markdown({"table1": Fidelity(compared=())})
    assert "No case is `ok` on both sides." in text
    assert "Nothing was compared." in text


# -- what records may stand in it ------------------------------------------------------------------


def test_records_of_a_gpu_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table1.jsonl"
    append_record(path, of_torch())
    record = make_record(evidence="measured", tracer=None)
    environment = dataclasses.replace(record.environment, gpu="NVIDIA H200")
    append_record(path, dataclasses.replace(record, environment=environment, case="x"))

    with pytest.raises(MembenchError, match="records of NVIDIA H200, which is no stand-in"):
        stand_in_records(path)


def test_predicted_records_beside_the_measured_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "table1.jsonl"
    append_record(path, of_torch())
    append_record(path, make_record())

    ((_, records),) = stand_in_records(path).items()
    assert [r.evidence for r in records] == ["measured"]


def test_a_case_is_predicted_for_a_card_of_the_stand_ins_memory_and_no_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench import fidelity
    from bench.predict.cards import Card

    cards: list[Card] = []

    def predicted(records: list[Record], *_: Any) -> Any:
        card = fidelity.card_of(records[0])
        cards.append(card)
        return card, [(r, make_record()) for r in records]

    monkeypatch.setattr(fidelity, "_predicted", predicted)

    found = compare_suites({"table1": [of_torch()]}, "t4-16gb")

    (card,) = cards
    assert (card.name, card.capacity_bytes, card.context_bytes) == ("standin-16gb", CAPACITY, 0)
    assert card.convolution_workspace_bytes("half", GIB) == 0
    assert card.compute_capability == (7, 5)
    assert len(found["table1"].compared) == 1


def test_a_case_that_crashed_is_told_and_stops_nothing() -> None:
    crashed = of_torch(status="failed", reason="process killed by SIGSEGV", capacity_bytes=None)

    found = compare_suites({"heldout": [crashed]}, "t4-16gb")

    text = host_code_markdown(found)
    assert f"- {crashed.case}: not compared: measured failed: process killed by SIGSEGV" in text


def test_a_capped_record_is_refused() -> None:
    with pytest.raises(MembenchError, match="does not say the stand-in's memory"):
        compare_suites({"table1": [of_torch(capped_to="v100-32gb")]}, "t4-16gb")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in that measures at once: one record of the suite that is asked for."""
    calls: list[list[str]] = []

    def run(_python: str, _card: str, arguments: list[str]) -> int:
        import os

        calls.append([*arguments, os.environ["STANDIN_CONTEXT_BYTES"]])
        folder = Path(arguments[arguments.index("--results") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        append_record(folder / f"{arguments[3]}.measured.jsonl", of_torch())
        return 0

    monkeypatch.setattr(host_code, "run_on_stand_in", run)
    monkeypatch.setattr(
        host_code,
        "compare",
        lambda records, report: (
            report(Progress(case=None, record=None)),  # type: ignore[arg-type]
            Fidelity(compared=tuple(pair(r.case) for r in records)),
        )[1],
    )
    return calls


def test_the_command_measures_without_a_context_and_writes_the_report(
    tmp_path: Path, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_CONTEXT_BYTES", "77")
    code = main(["table1", "--results", str(tmp_path / "r"), "-o", str(tmp_path / "reports")])

    assert code == 0
    ((*command, context),) = measured
    assert command[:6] == ["-m", "bench", "run", "table1", "--device", "cuda"]
    assert command[-1] == "--resume"
    assert context == "0"
    assert "## " in (tmp_path / "reports" / "host_code.md").read_text()


def test_records_never_go_into_results(
    measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table1", "--results", "results/mine"]) == 2
    assert "results/ holds what GPUs measured" in capsys.readouterr().err
    assert measured == []


@pytest.mark.parametrize(("ended", "code"), [(2, 1), (-11, 1), (1, 0)])
def test_a_run_that_fails_ends_it_and_cases_that_fail_do_not(
    ended: int,
    code: int,
    tmp_path: Path,
    measured: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner: Any = vars(host_code)["run_on_stand_in"]
    monkeypatch.setattr(host_code, "run_on_stand_in", lambda *a: inner(*a) or ended)
    options = ["--results", str(tmp_path / "r"), "-o", str(tmp_path)]
    assert main(["table1", *options]) == code
    assert len(measured) == 1
