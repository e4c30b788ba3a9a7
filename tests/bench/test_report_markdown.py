"""The markdown report: what stands in it, where it is written, and what is never left half-done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.errors import MembenchError
from bench.record import Record, append_record
from bench.report.markdown import report_files, write_report, write_reports
from bench.report.results import read_results
from tests.bench.records import GIB, make_record, make_table1

MEASURED = {"evidence": "measured", "tracer": None, "card": "h200-141gb"}


@pytest.fixture(autouse=True)
def _quick_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time; tests of the text do without."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr("bench.report.plots.plot_table", lambda _, kind: kind.encode())


@pytest.fixture
def with_plots() -> None:
    """Draw the plots for real."""


def text_of(records: list[Record]) -> str:
    files = report_files("table1", records)
    return files["table1.md"].decode()


def table_after(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, its rule left out."""
    below = text[text.index(f"\n{heading}") :]
    lines = re.findall(r"^\|.*\|$", below.split("\n\n|")[1].join(["|", ""]), re.M)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


def test_the_report_has_the_shape_of_the_paper_s_table() -> None:
    """A row for each variant, a column for each shape; ours, the ratio, the paper's."""
    rows = table_after(text_of(make_table1()), "## table1")
    assert rows[0] == ["variant", "parameters", "96x96x96", "256x256x152", "256x256x234"]
    assert [row[0] for row in rows[1:]] == [
        *("baseline", "bottleneck", "sepconv", "ccblock"),
        *("ccblock+inplace_abn", "ccblock+inplace_abn+mp"),
    ]
    assert rows[1][1:] == [
        "9,522,787",
        "**3.4 GiB**, 1.00<br>paper 3.7 GB",
        "**26.6 GiB**, 1.00<br>paper 28.4 GB",
        r"**does not fit 31.5 GiB: needs 41.7 GiB**, 1.00\*<br>paper &gt; 32 GB",
    ]
    assert rows[6][3] == "**9.6 GiB**, 0.36<br>paper 11.7 GB"


def test_all_figures_of_a_case_stand_in_the_detailed_table() -> None:
    rows = table_after(text_of(make_table1()), "### All figures")
    by_name = dict(zip(rows[0], rows[12], strict=True))
    # The last row of 256x256x152: 9.1 GiB reserved, 7/8 of it allocated, 0.5 of context.
    assert by_name == {
        "shape": "256x256x152",
        "variant": "ccblock+inplace_abn+mp",
        "precision": "fp16",
        "status": "ok",
        "parameters": "2,635,395",
        "GPU memory": "9.6 GiB",
        "needs": "9.6 GiB",
        "ratio": "0.36",
        "paper": "11.7 GB",
        "of paper": "88 %",
        "requested": "8.0 GiB",
        "allocated": "8.0 GiB",
        "reserved": "9.1 GiB",
    }


def test_figures_keep_their_decimals() -> None:
    rows = table_after(text_of([make_record()]), "### All figures")
    assert dict(zip(rows[0], rows[1], strict=True))["ratio"] == "1.00"


def test_parts_are_shown_for_what_ran_and_estimates_are_named() -> None:
    text = text_of(make_table1())
    rows = table_after(text, "### Parts")
    named = dict(zip(rows[0], rows[1], strict=True))
    assert named["tensors"] == "2.4 GiB"  # 2.9 * 7/8 - 0.125
    assert named["workspace"] == "128 MiB"
    assert named["allocator's cache"] == "371 MiB"  # 2.9 / 8
    assert named["context"] == "512 MiB"
    assert named["not calibrated"] == "cudnn_workspace"
    of_oom = dict(zip(rows[0], rows[13], strict=True))
    assert of_oom["tensors"] == of_oom["workspace"] == "-"
    assert "Not calibrated on v100-32gb, so estimated: cudnn_workspace." in text


def test_a_measured_report_leaves_out_what_a_gpu_cannot_tell() -> None:
    record = make_record(**MEASURED, parts={"workspace_bytes": None}, step_times_s=(0.5, 0.25, 9.0))
    text = text_of([record])
    assert "workspace" not in table_after(text, "### Parts")[0]
    figures = table_after(text, "### All figures")
    assert figures[0][-2:] == ["step time", "voxels/s"]
    # Readings 0.25, 0.5 and 9 s: quartiles half way between neighbours, 0.375 and 4.75 s.
    # 96^3 = 884,736 voxels: 1.77 million a second, quartiles 0.93 and 2.65 million.
    assert figures[1][-2:] == ["0.5 s, IQR 4.4 s, noisy", "1,770,000, IQR 1,700,000, noisy"]
    assert "membench run table1 --device cuda\n" in text


def test_every_table_of_figures_says_its_evidence() -> None:
    text = text_of(make_table1())
    assert "## table1: fcn on v100-32gb (31.5 GiB), predicted (cuda-shim)" in text
    for sentence in ("Each cell: **ours** (predicted (cuda-shim))", "All predicted (cuda-shim);"):
        assert sentence in text


def test_measured_and_predicted_have_tables_and_plots_of_their_own() -> None:
    records = [make_record(), make_record(**MEASURED, process_bytes=GIB)]
    files = report_files("table1", records)
    text = files["table1.md"].decode()
    assert set(files) == {
        "table1.md",
        *(f"table1.v100-32gb.predicted.{kind}" for kind in ("png", "svg")),
        *(f"table1.h200-141gb.measured.{kind}" for kind in ("png", "svg")),
    }
    for name in files:
        assert name == "table1.md" or f"]({name})" in text
    assert "0.29" not in text  # 1.0 / 3.5, a measured figure over a predicted one


def test_plots_that_would_share_a_name_are_numbered() -> None:
    torches = ("2.13.0", "2.12.0", "2.11.0")
    files = report_files("t", [make_record(environment={"torch": torch}) for torch in torches])
    assert [name for name in files if name.endswith("png")] == [
        "t.v100-32gb.predicted.png",
        "t.v100-32gb.predicted-2.png",
        "t.v100-32gb.predicted-3.png",
    ]


def test_what_did_not_run_to_its_end_is_listed_with_its_reason() -> None:
    reason = "killed by | signal 9\nafter *3* s"
    bad = make_record(variant="bad", status="failed", reason=reason)
    text = text_of([make_record(), bad, make_record(variant="big", status="oom")])
    assert (
        "### Not run to the end\n\n"
        "- `fcn/bad/96x96x96/train`: failed: killed by \\| signal 9 after \\*3\\* s\n" in text
    )
    assert "### Does not fit\n\n- `fcn/big/96x96x96/train`: oom: made oom for a test\n" in text
    assert "### Not run" not in text_of([make_record()])
    assert "### Does not fit" not in text_of([make_record()])


def test_a_report_says_how_to_make_its_records_again() -> None:
    assert "\nmembench run table1 --device predict --card v100-32gb\n" in text_of([make_record()])
    odd = make_record(
        **MEASURED,
        capped_to="rtx4090-24gb",
        volumes=("a.nii",),
        environment={"allocator_settings": "a:b c"},
    )
    command = "PYTORCH_ALLOC_CONF='a:b c' membench run 'my suite' --device cuda --card rtx4090-24gb"
    assert f"\n{command} --volumes DIR\n" in report_files("my suite", [odd])["my-suite.md"].decode()


def test_the_environment_is_in_the_report_with_all_its_values() -> None:
    second = make_record(
        variant="b", environment={"dirty": True, "notes": ("n1", "n2"), "cudnn_benchmark": False}
    )
    rows = dict(table_after(text_of([make_record(), second]), "### Environment"))
    assert rows["torch"] == "2.13.0"
    assert rows["suite hash"] == "0123456789abcdef"
    assert rows["commit"] == "1234567890abcdef1234567890abcdef12345678"
    assert rows["uncommitted changes"] == "no, yes"
    assert rows["cudnn.benchmark"] == "no"
    assert rows["notes"] == "n1; n2"
    assert rows["driver"] == "-"
    assert rows["date"] == "2025-11-21"


def test_rows_of_several_networks_and_modes_are_told_apart() -> None:
    records = [
        make_record(),
        make_record(network="pocket", variant="full"),
        make_record(network="pocket", variant="full", mode="infer"),
    ]
    rows = table_after(text_of(records), "## table1")
    assert rows[0][2:] == ["96x96x96, train", "96x96x96, infer"]
    assert [row[0] for row in rows[1:]] == ["fcn baseline", "pocket full"]
    assert rows[1][3] == "-"


def test_one_shape_padded_and_not_is_two_columns() -> None:
    records = [make_record(), make_record(shape=(96, 96, 104), process_bytes=9 * GIB)]
    rows = table_after(text_of(records), "## table1")
    assert rows[0][2:] == ["96x96x96", "96x96x96, run as 96x96x104"]
    assert rows[1][2:] == ["**3.5 GiB**, 1.00", "**9.0 GiB**, 1.00"]


def test_names_cannot_break_the_table() -> None:
    rows = table_after(text_of([make_record(variant="a|b<c>[d]`e`*")]), "## table1")
    assert rows[1][0] == r"a\|b&lt;c&gt;\[d\]\`e\`\*"


@pytest.mark.usefixtures("with_plots")
def test_equal_records_give_equal_files() -> None:
    records = make_table1()[:2]
    assert report_files("table1", records) == report_files("table1", records)


@pytest.mark.usefixtures("with_plots")
def test_a_report_is_written_with_its_plots_and_nothing_else(tmp_path: Path) -> None:
    path = write_report(make_table1()[:2], tmp_path / "deep" / "reports")
    assert path == tmp_path / "deep" / "reports" / "table1.md"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "table1.md",
        "table1.v100-32gb.predicted.png",
        "table1.v100-32gb.predicted.svg",
    ]
    assert path.with_name("table1.v100-32gb.predicted.png").read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes() == report_files("table1", make_table1()[:2])["table1.md"]


def test_a_report_is_written_over_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "table1.md").write_text("old")
    assert write_report([make_record()], tmp_path).read_text().startswith("# table1\n")


def test_a_file_comes_to_its_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written beside it and renamed, so that a kill in mid-write cuts no report in two."""
    written: list[str] = []
    write_bytes = Path.write_bytes

    def noted(path: Path, data: bytes) -> int:
        written.append(path.name)
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", noted)
    assert write_report([make_record()], tmp_path).exists()
    assert len(written) == 3
    assert all(name.endswith(".tmp") for name in written)


def test_a_suite_s_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    record = make_record(environment={"suite": "../../evil name.yaml"})
    assert write_report([record], tmp_path / "r") == tmp_path / "r" / "evil-name.md"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]


def test_no_records_make_no_report(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match="no records to report on"):
        write_reports({"a": [make_record()], "b": []}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_is_named_and_what_was_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MembenchError, match=r"cannot write reports to .*file.*--output"):
        write_report([make_record()], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second file: no file is replaced and none is left behind."""
    (tmp_path / "table1.md").write_text("old")
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith(".table1.v100-32gb.predicted.svg"):
            write_bytes(path, data[:10])
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MembenchError, match="No space left on device"):
        write_report([make_record()], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["table1.md"]
    assert (tmp_path / "table1.md").read_text() == "old"


def _write_records(path: Path, *records: Record) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for record in records:
        append_record(path, record)
    return path


def test_records_are_read_by_suite_from_files_and_folders(tmp_path: Path) -> None:
    other = {"environment": {"suite": "other"}}
    _write_records(tmp_path / "a" / "card" / "t.predicted.jsonl", make_record(needs_bytes=1))
    _write_records(tmp_path / "a" / "x.jsonl", make_record(**other))
    (tmp_path / "a" / "notes.txt").write_text("no record")
    single = _write_records(tmp_path / "b.jsonl", make_record(variant="v"))
    read = read_results([tmp_path / "a", single])
    assert read == {
        "table1": [make_record(needs_bytes=1), make_record(variant="v")],
        "other": [make_record(**other)],
    }


def test_the_last_record_of_a_case_counts_across_files_in_the_order_given(tmp_path: Path) -> None:
    first = _write_records(
        tmp_path / "z.jsonl", make_record(needs_bytes=1), make_record(needs_bytes=2)
    )
    second = _write_records(tmp_path / "a.jsonl", make_record(needs_bytes=3))
    assert read_results([first]) == {"table1": [make_record(needs_bytes=2)]}
    assert read_results([first, second]) == {"table1": [make_record(needs_bytes=3)]}
    # z.jsonl is in the folder again, but was given first.
    assert read_results([first, tmp_path]) == {"table1": [make_record(needs_bytes=3)]}


def test_records_that_name_no_suite_go_by_their_file(tmp_path: Path) -> None:
    record = make_record(environment={"suite": None})
    path = _write_records(tmp_path / "mine.predicted.jsonl", record)
    assert read_results([path]) == {"mine": [record]}


def test_results_that_are_not_there_or_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match=r"absent does not exist"):
        read_results([tmp_path / "absent"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MembenchError, match=r"no records in .*: give"):
        read_results([tmp_path])
