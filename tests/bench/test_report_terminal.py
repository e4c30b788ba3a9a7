"""The table that membench run prints, as a reader gets it: by width and by evidence."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from bench.case import PaperFigure
from bench.record import Record
from bench.report import results_table
from tests.bench.records import GIB, make_record, make_table1


def shown(records: list[Record], width: int = 400, **console: Any) -> str:
    """Return what a console of ``width`` columns prints."""
    file = io.StringIO()
    Console(file=file, width=width, **console).print(results_table(records))
    return file.getvalue()


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_no_row_is_wider_than_the_terminal_and_none_is_folded() -> None:
    records = make_table1()
    for width in (*range(60, 150), 400):
        text = shown(records, width)
        assert text.count("ccblock+inplace_abn+mp ") == 3
        # Rich cuts what is too wide: the last column must be whole.
        last = line_of(text, "variant").split("  ")[-1].strip()
        assert last in ("paper", "of paper", "allocated", "reserved", "requested", "evidence")
        assert text.count("predicted (cuda-shim)") == (19 if last == "evidence" else 1)


def test_a_hundred_columns_show_the_paper_s_table_and_more() -> None:
    header = line_of(shown(make_table1(), 100), "variant").split("  ")
    assert [name.strip() for name in header if name.strip()] == [
        *("variant", "parameters", "GPU memory", "needs", "ratio", "paper", "of paper"),
        "allocated",
    ]


def test_a_narrow_terminal_keeps_what_tells_most() -> None:
    header = line_of(shown(make_table1(), 60), "variant").split("  ")
    assert [name.strip() for name in header if name.strip()] == [
        *("variant", "GPU memory", "ratio", "paper"),
    ]


def test_host_bytes_have_a_column_where_a_case_took_some() -> None:
    plain, moved = make_record(), make_record(variant="offload", peak_host_bytes=7 * GIB)
    assert "host" not in shown([plain])
    text = shown([plain, moved])
    assert "7.0 GiB" in line_of(text, "offload")
    assert "host: pinned memory" in text


def test_rows_stand_under_their_shape() -> None:
    lines = [line.rstrip() for line in shown(make_table1()).splitlines()]
    padded = lines.index("256x256x234, run as 256x256x240")
    assert lines.index("96x96x96") < lines.index("256x256x152") < padded
    row = lines[padded + 5].split()
    # 26.3 GiB reserved + 0.5 of context; over the baseline's 41.2 + 0.5; over 30.2 GB.
    assert " ".join(row[:12]) == (
        "ccblock+inplace_abn fp32 2,635,395 26.8 GiB 26.8 GiB 0.64* ~ 30.2 GB 95"
    )


def test_what_does_not_fit_says_so_and_what_it_needs() -> None:
    lines = shown(make_table1(), 100).splitlines()
    row = lines[lines.index("256x256x234, run as 256x256x240") + 1].split("  ")
    words = [word.strip() for word in row if word.strip()]
    assert words == [
        *("baseline", "9,522,787", "does not fit", "41.7 GiB", "1.00*", "> 32 GB", "agrees"),
        "> 36.0 GiB",
    ]


def test_the_title_names_suite_card_memory_and_evidence() -> None:
    text = shown(make_table1())
    assert text.splitlines()[0] == "table1: fcn on v100-32gb (31.5 GiB), predicted (cuda-shim)"
    assert text.splitlines()[1] == (
        "torch 2.13.0, 31.0 GiB for the allocator, commit 1234567890, 2025-11-21"
    )


def test_all_that_differs_between_runs_of_one_table_is_named() -> None:
    later = {"commit": "fedcba9876543210", "dirty": True, "started_at": "2025-11-22T01:00:00"}
    second = make_record(
        variant="other", environment={**later, "cuda": "13.0", "cudnn_benchmark": True}
    )
    line = shown([make_record(), second]).splitlines()[1]
    assert line == (
        "torch 2.13.0, CUDA 13.0, 31.0 GiB for the allocator, cudnn.benchmark on, "
        "commit 1234567890, fedcba9876+changes, 2025-11-21, 2025-11-22"
    )


def test_allocator_settings_and_a_cap_are_in_the_caption() -> None:
    record = make_record(
        evidence="measured",
        tracer=None,
        card="h200-141gb",
        capped_to="rtx4090-24gb",
        environment={"allocator_settings": "expandable_segments:True"},
    )
    text = shown([record])
    assert "h200-141gb (31.5 GiB) capped to rtx4090-24gb, measured" in text
    assert "allocator settings expandable_segments:True" in text
    assert "no GPU was used" not in text


def test_measured_and_predicted_are_two_tables() -> None:
    measured = make_record(evidence="measured", tracer=None, process_bytes=GIB)
    text = shown([make_record(), measured])
    assert text.count("  variant ") == 2
    assert text.index("predicted (cuda-shim)") < text.index("measured")
    assert "0.29" not in text  # 1.0 / 3.5 would be a measured figure over a predicted one


def test_piped_rows_carry_their_evidence() -> None:
    assert shown(make_table1()).count("predicted (cuda-shim)") == 19  # the title and 18 rows


def test_predicted_figures_are_yellow_and_measured_ones_green() -> None:
    colours: dict[str, Any] = {
        "force_terminal": True,
        "color_system": "standard",
        "legacy_windows": False,
    }
    yellow, green = "\x1b[33m", "\x1b[32m"
    predicted = shown([make_record()], **colours)
    measured = shown([make_record(evidence="measured", tracer=None)], **colours)
    assert yellow in predicted
    assert green not in predicted
    assert green in measured
    assert yellow not in measured


def test_notes_explain_what_the_table_shows_and_nothing_else() -> None:
    full = shown(make_table1())
    assert "ratio: GPU memory to that of 'baseline'" in full
    assert "GB = 10^9 bytes" in full
    assert "* taken from needs" in full
    assert "Not calibrated on v100-32gb, so estimated: cudnn_workspace." in full
    bare = shown([make_record()])
    assert "GB = 10^9" not in bare
    assert "taken from needs" not in bare
    assert "Not calibrated" not in bare


def test_a_failed_case_has_a_row_without_figures() -> None:
    text = shown([make_record(), make_record(variant="other", status="failed", needs_bytes=None)])
    assert line_of(text, "other").split()[:5] == ["other", "fp32", "9,522,787", "failed", "-"]


def test_sections_name_network_mode_batch_and_volume_where_they_differ() -> None:
    records = [
        make_record(),
        make_record(network="pocket", mode="infer"),
        make_record(batch_size=2),
        make_record(requested_shape=(8, 8, 8), volumes=("a.nii", "b.nii", "c.nii", "d.nii")),
    ]
    text = shown(records)
    assert "\npocket 96x96x96, infer, batch 1\n" in text
    assert "\nfcn 96x96x96, train, batch 2\n" in text
    assert "\nfcn 8x8x8, train, batch 1 (a.nii, b.nii and 2 more)\n" in text
    assert text.startswith("table1: fcn, pocket on v100-32gb")


def test_names_are_printed_as_they_are() -> None:
    """Square brackets are markup to rich, and must not be here."""
    paper = PaperFigure(text="[red]3 GB", relation="=", bytes=3)
    text = shown([make_record(variant="[bold]x", paper=paper, card="c[0]")])
    assert "[bold]x" in text
    assert "[red]3 GB" in text
    assert "c[0]" in text


def test_records_that_say_little_are_shown_with_what_they_say() -> None:
    record = make_record(
        card=None,
        capacity_bytes=None,
        parameters=None,
        parts={"context_bytes": None},
        environment={"suite": None, "torch": None, "commit": None, "started_at": None},
    )
    lines = shown([record]).splitlines()
    assert lines[0] == "records: fcn on unknown card, predicted (cuda-shim)"
    assert lines[1] == "torch not recorded"
    assert "parameters" not in lines[3]


def test_no_records_are_said_to_be_none() -> None:
    assert shown([]) == "no records\n"


def test_recomputation_is_a_column_where_a_row_computes_something_twice() -> None:
    plain = make_record(recomputation_factor=1.0)
    twice = make_record(variant="checkpoint", position=1, recomputation_factor=4 / 3)
    assert "recomputation" not in shown([plain])
    text = shown([plain, twice])
    assert "recomputation" in text
    assert " 1.33 " in text
