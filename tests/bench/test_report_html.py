"""The HTML page: all of its figures, nothing from elsewhere, and sense for odd records too."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.record import Holder, Record
from bench.report.formats import ReportFormat, figure_files, write_formatted
from bench.report.html import page_text
from bench.report.html_tables import sort_value
from bench.units import GIB
from tests.bench.records import make_record, make_table1
from tests.bench.test_timeline import make_timeline

SCRIPT = "<script>alert(1)</script>"
MEASURED: dict[str, Any] = {"evidence": "measured", "tracer": None}
# Whatever could make a browser ask for something; a link within the page begins with "#".
_ASKING = re.compile(
    r"""\bsrc\s*=|\bhref\s*=\s*["'](?!\#)|url\((?!["']?\#)|@import|@font-face|\bfetch\(|
    XMLHttpRequest|WebSocket|sendBeacon|importScripts|<link|<iframe|<img|<base|https?:|srcset""",
    re.VERBOSE | re.IGNORECASE,
)


def records() -> list[Record]:
    """Three cases at two sizes, with a timeline, FLOPs and holders: every picture is drawn."""
    held = (Holder(module="", operator="", source_line="", category="activation", bytes=GIB),)
    return [
        make_record(
            variant=variant,
            requested_shape=(side,) * 3,
            position=place,
            step_flops=flops,
            peak_holders=held,
            timeline=make_timeline(),
            process_bytes=gib * GIB,
        )
        for place, (variant, side, flops, gib) in enumerate(
            [("baseline", 64, 100, 4), ("small", 64, 120, 2), ("baseline", 96, 300, 9)]
        )
    ]


class Reader(HTMLParser):
    """Checks that every element is closed, and keeps the texts and the attributes."""

    _EMPTY = frozenset({"meta", "br", "path", "rect", "use", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def page() -> str:
    return page_text("table1", records())


def test_the_page_asks_for_nothing(page: str) -> None:
    assert _ASKING.findall(page) == []


def test_the_page_forbids_itself_every_request_and_knows_its_own_script(page: str) -> None:
    policy = next(a["content"] for tag, a in read(page).seen if tag == "meta" and "content" in a)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy


def test_every_picture_is_there_with_words_that_tell_evidence_and_card(page: str) -> None:
    pictures = [a for tag, a in read(page).seen if tag == "svg"]
    labels = [a["aria-label"] or "" for a in pictures]
    assert len(labels) == 4
    assert all(a["role"] == "img" for a in pictures)
    assert all("Predicted, on v100-32gb." in label for label in labels)
    assert labels[0].startswith("Bars of GPU memory")
    assert "small 2.0 GiB" in labels[0]
    assert labels[3].endswith("Pareto front baseline, small")  # the second size has one case alone


def test_every_id_is_used_once_and_every_reference_has_its_id(page: str) -> None:
    ids = [a["id"] for _, a in read(page).seen if "id" in a]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | set(
        re.findall(r'href="#([^"]+)"', page)
    )
    assert references
    assert references <= set(ids)


def test_colours_of_text_and_page_are_the_page_s_and_have_a_dark_form(page: str) -> None:
    for name in set(re.findall(r"var\((--\w+)\)", page)):
        assert page.count(f"{name}: #") == 3, name  # light, dark and on paper
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "#333333" not in svg.lower()
    assert "#ffffff" not in svg.lower()


def test_a_figure_can_be_pointed_at(page: str) -> None:
    assert "<title>small, activations: 1.0 GiB</title>" in page


def test_predicted_bars_are_hatched_and_measured_ones_are_not(page: str) -> None:
    measured = page_text("table1", [make_record(**MEASURED)])
    assert "<pattern" in page
    assert "<pattern" not in measured
    assert '<span class="evidence predicted">predicted</span>' in page
    assert '<span class="evidence measured">measured</span>' in measured


def test_what_is_not_drawn_is_said() -> None:
    text = page_text("one", [make_record(**MEASURED)])
    assert "None of these records has a timeline: measured and older ones carry none." in text
    assert "No case has a second size to be compared with." in text
    assert "No case can be set against a baseline. Left out: baseline (no FLOPs counted)." in text


def test_text_that_looks_like_a_script_is_shown_as_text() -> None:
    evil = make_record(
        variant=SCRIPT,
        status="oom",
        reason=SCRIPT,
        card=SCRIPT,
        environment={"suite": SCRIPT, "notes": (SCRIPT,)},
    )
    text = page_text(SCRIPT, [evil])
    reader = read(text)
    assert [tag for tag, _ in reader.seen].count("script") == 1
    assert "alert(1)" in "".join(reader.texts)


def test_a_name_that_looks_like_a_colour_is_shown_as_it_is() -> None:
    assert "#333333</text>" in page_text("one", [make_record(variant="#333333")])


@pytest.mark.parametrize(
    "odd",
    [
        [make_record(status="failed"), make_record(variant="b", status="timeout")],
        [make_record(status="oom", needs_bytes=None), make_record(variant="b", status="oom")],
        [make_record()],
        [make_record(variant="long_name_" * 30 + str(i), network="fcn" * 99) for i in (0, 1)],
        [make_record(parts={"tensors_bytes": None, "context_bytes": None}, card=None)],
        make_table1(),
    ],
    ids=["failed", "out of memory", "one case", "long names", "little known", "table 1"],
)
def test_odd_records_give_a_whole_page(odd: list[Record]) -> None:
    text = page_text("suite", odd)
    read(text)
    assert _ASKING.findall(text) == []
    assert len(re.findall("<svg", text)) >= 1


def test_cases_that_did_not_end_are_named_with_their_reason() -> None:
    text = page_text("s", [make_record(variant="a", status="failed", reason="no <norm>")])
    assert "<h3>Not run to the end</h3>" in text
    assert "fcn/a/96x96x96/train</code>: failed: no &lt;norm&gt;" in text
    many = [make_record(variant=f"v{i}", status="failed") for i in range(205)]
    assert "and 5 more, named in the tables" in page_text("s", many)


def test_a_page_of_many_tables_draws_the_first_ones() -> None:
    """Six cards: pictures of five, each with bars alone."""
    text = page_text("s", [make_record(card=f"card{i}") for i in range(6)])
    assert text.count("<svg") == 5
    assert text.count("No pictures: this page has many tables") == 1
    assert 'href="#table-6"' in text


def test_no_records_are_an_error() -> None:
    with pytest.raises(MembenchError, match="no records to report on for table1"):
        page_text("table1", [])


def test_equal_records_give_an_equal_page(page: str) -> None:
    assert page_text("table1", records()) == page


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5 GiB", 1.5 * 2**30),
        ("-2 KiB", -2048),
        ("0.65*", 0.65),
        ("88 %", 88),
        ("9,522,787", 9_522_787),
        ("&gt; 3 MiB", 3 * 2**20),
        ("<strong>2 GiB</strong>, 0.39<br><small>paper 3 GB</small>", 2**31),
        ("<strong>does not fit 31.7 GiB: needs 42 GiB</strong>, 1.00*", 42 * 2**30),
        ("-", None),
        ("256x256x152", None),
        ("96³", None),
        ("fp32", None),
    ],
)
def test_a_column_sorts_by_its_figures(text: str, value: float | None) -> None:
    assert sort_value(text) == value


def test_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    written = write_formatted({"table1": records()}, tmp_path, ReportFormat.HTML, figures=True)
    names = {path.name for path in written}
    pictures = ("bars", "timeline", "sizes", "trade")
    assert names == {"table1.html"} | {
        f"table1.v100-32gb.predicted.{name}.{kind}" for name in pictures for kind in ("png", "svg")
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written if p.suffix == ".png")
    assert all(b"<svg" in p.read_bytes() for p in written if p.suffix == ".svg")


def test_a_picture_that_cannot_be_drawn_is_no_file() -> None:
    assert {name.split(".")[3] for name in figure_files("s", [make_record()])} == {"bars"}


def by_size() -> list[Record]:
    """A plain network at eight sizes, and one that is a fiftieth of it, the baseline."""
    return [
        make_record(
            variant=variant,
            requested_shape=(side,) * 3,
            position=place,
            baseline="small",
            step_flops=flops,
            needs_bytes=size * side**3,
            process_bytes=size * side**3 + GIB // 2,
        )
        for place, side in enumerate(range(64, 192, 16))
        for variant, size, flops in (("small", 100, 4), ("plain", 90_000, 3))
    ]


def test_a_table_of_many_sizes_shows_its_lines_and_limits() -> None:
    text = page_text("scaling", by_size())
    assert "Largest input of each size of card, predicted (cuda-shim)." in text
    assert "<h3>Bytes a voxel</h3>" in text
    assert "Pareto front plain, small" in text


def test_a_baseline_that_others_exceed_many_times_is_compared_by_ratio() -> None:
    """At 64 voxels a side plain takes 22 GiB, small 0.5: a multiple on a log axis, no saving."""
    text = page_text("scaling", by_size())
    assert "memory, x baseline" in text
    assert ">memory saved</text>" not in text
