"""``papers.md``: a section a paper, its figures beside ours, and what pocket widths save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.case import PaperFigure, PaperTime
from bench.record import Record
from bench.report.markdown import write_reports
from bench.report.paper_grids import cases_grid, pocket_grid, pocket_pairs
from bench.report.papers import PAPERS, papers_text
from bench.report.rows import Table, make_tables
from bench.suite import shipped_suites
from tests.bench.records import GIB, make_case, make_record, make_table1


def table_of(records: list[Record]) -> Table:
    (table,) = make_tables(records)
    return table


def told(record: Record, **fields: Any) -> Record:
    """The record with fields of its case's definition replaced."""
    case = make_case(**fields)
    for name in fields:
        record.definition[name] = case.to_definition()[name]
    return record


def pair(**pocket: Any) -> list[Record]:
    """A full network of 8,000 parameters and 4 GiB, and its pocket form of 2,000 and 3 GiB."""
    full = {
        "variant": "unet",
        "parameters": 8_000,
        "process_bytes": 4 * GIB,
        "peak_allocated_bytes": 2 * GIB,
        "step_flops": 1_000,
    }
    small = {
        "variant": "unet+pocket",
        "parameters": 2_000,
        "process_bytes": 3 * GIB,
        "peak_allocated_bytes": GIB,
        "step_flops": 400,
    }
    return [make_record(**full), make_record(**(small | pocket), position=1)]


def only_pair(records: list[Record]) -> dict[str, str]:
    table = table_of(records)
    (row,) = pocket_grid(list(pocket_pairs(table)), table).to_dict("records")
    return {str(name): str(text) for name, text in row.items()}


def test_every_paper_s_suite_is_one_that_is_shipped() -> None:
    assert {suite for paper in PAPERS for suite in paper.suites} <= set(shipped_suites())


def test_pocket_widths_save_one_less_their_share() -> None:
    row = only_pair(pair())
    assert row == {
        "variant": "unet",
        "case": "96x96x96",
        "parameters": "8,000 to 2,000",
        "parameters saved": "75.0 %",
        "GPU memory": "4.0 GiB to 3.0 GiB",
        "GPU memory saved": "25.0 %",
        "allocated saved": "50.0 %",
        "step FLOPs saved": "60.0 %",
    }


def test_time_saved_stands_only_where_both_were_measured() -> None:
    assert "time saved" not in only_pair(pair(step_times_s=(1.0,)))
    records = pair(step_times_s=(0.5, 0.25, 3.0))
    records[0] = make_record(variant="unet", step_times_s=(2.0,))
    row = only_pair(records)
    assert (row["time"], row["time saved"]) == ("2 s to 0.5 s", "75.0 %")


def test_where_one_does_not_fit_what_is_saved_is_of_needs_and_starred() -> None:
    """Needs 2.75 and 5.5 GiB of the allocator, 0.5 of context: 1 - 3.25/6."""
    records = pair()
    records[0] = make_record(variant="unet", status="oom", needs_bytes=5 * GIB + GIB // 2)
    row = only_pair(records)
    assert row["GPU memory"] == "needs 6.0 GiB to 3.0 GiB"
    assert row["GPU memory saved"] == r"45.8 %\*"
    assert row.get("allocated saved", "-") == "-"


def test_a_row_called_pocket_belongs_to_the_baseline_and_one_without_a_full_one_to_nothing() -> (
    None
):
    records = [
        make_record(),
        make_record(variant="pocket", position=1),
        make_record(variant="alone+pocket", position=2),
    ]
    pairs = pocket_pairs(table_of(records))
    assert [(full.record.variant, own.record.variant) for _, full, own in pairs] == [
        ("baseline", "pocket")
    ]


def test_a_case_has_the_paper_s_memory_time_and_flops_beside_ours() -> None:
    record = told(
        make_record(
            network="dense_vnet",
            variant="stage_two",
            mode="infer",
            forward_flops=47_952_691_200,
            step_flops=47_952_691_200,
            recomputation_factor=1.0,
            step_times_s=(2.0, 1.5, 9.0),
            paper=PaperFigure(text="~2 GB", relation="~", bytes=2 * 10**9),
        ),
        paper_time=PaperTime(text="~30 s", relation="~", seconds=30.0),
        paper_flops=20_339_341_715,
    )
    (row,) = cases_grid(table_of([record])).to_dict("records")
    assert row == {
        "variant": "stage_two",
        "case": "96x96x96, prediction",
        "parameters": "9,522,787",
        "GPU memory": "3.5 GiB",
        "paper": "~2 GB",
        "of paper": "188 %",
        "forward FLOPs": "47,952,691,200",
        "paper's FLOPs": "20,339,341,715",
        "time": "2 s, IQR 3.8 s, noisy",
        "voxels/s": "442,000, IQR 250,000, noisy",
        "paper's time": "~30 s",
    }


def test_a_factor_of_recomputation_stands_where_a_row_computes_twice() -> None:
    twice = {"forward_flops": 1, "step_flops": 4, "recomputation_factor": 4 / 3}
    records = [
        make_record(forward_flops=1, step_flops=3, recomputation_factor=1.0),
        make_record(variant="checkpoint", position=1, **twice),
    ]
    grid = cases_grid(table_of(records))
    assert list(grid["recomputation"]) == ["1.00", "1.33"]
    assert "recomputation" not in cases_grid(table_of(records[:1]))


def test_a_section_says_card_evidence_source_and_where_the_plot_is() -> None:
    text = papers_text({"table1": make_table1()}, {"table1": ["table1.plot"]}, "head")
    section = text[text.index("## Memory-efficient FCN") : text.index("## Full-volume")]
    assert "Wang, Oda, Mori" in section
    assert "fcn on v100-32gb (31.5 GiB), predicted (cuda-shim)" in section
    assert "paper 28.4 GB" in section
    assert "[Plot](table1.plot.png), [all figures](table1.md)." in section
    assert "0 cases measured on a GPU, 18 predicted" in text


def test_a_paper_without_records_says_how_to_make_them() -> None:
    text = papers_text({}, {}, "head")
    for name in ("table1", "cclstm", "flare21", "pocketnet_3d", "pocketnet_2d", "scaling"):
        assert f"No records: `membench run {name}` makes them." in text


def test_measured_and_predicted_stand_in_tables_of_their_own() -> None:
    made = {"environment": {"suite": "flare21"}, "network": "light_unet", "mode": "infer"}
    measured = make_record(evidence="measured", tracer=None, **made)
    text = papers_text({"flare21": [measured, make_record(**made)]}, {"flare21": ["a", "b"]}, "h")
    assert "v100-32gb (31.5 GiB), measured" in text
    assert "v100-32gb (31.5 GiB), predicted" in text
    assert "1 case measured on a GPU, 1 predicted" in text
    assert "are not those of the network it describes" in text  # the note on the paper's FLOPs


def test_papers_md_lies_beside_the_reports_and_its_links_lead_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.report.plots.plot_table", lambda _, kind: kind.encode())
    other = make_record(environment={"suite": "table1", "torch": "2.11.0"})
    written = write_reports({"table1": [*make_table1(), other]}, tmp_path, papers=True)
    assert written == [tmp_path / "table1.md", tmp_path / "papers.md"]
    text = written[1].read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links == [
        *("table1.v100-32gb.predicted.png", "table1.md"),
        *("table1.v100-32gb.predicted-2.png", "table1.md"),
    ]
    assert all((tmp_path / link).exists() for link in links)
