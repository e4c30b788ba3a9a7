"""The GPU session's archive: what a later piece, here or on a fresh machine, finds in it."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import gpu_session
from bench.gpu import GpuIdentity
from bench.gpu_session import Part, main, pack
from bench.gpu_session_archive import unpack

RECORDED = "results/h200-141gb/table1.measured.jsonl"
IDENTITY = GpuIdentity(name="NVIDIA H200", uuid="GPU-1", memory_bytes=2**37, card="h200-141gb")


def appends(results: Path, line: str, name: str = RECORDED) -> str:
    """A program that appends a record to the results, as a measured suite does."""
    path = results.joinpath(*Path(name).parts[1:])
    return (
        f"import pathlib; p = pathlib.Path({str(path)!r}); "
        f"p.parent.mkdir(parents=True, exist_ok=True); p.open('a').write({line + chr(10)!r})"
    )


def records(archive: Path, name: str = RECORDED) -> str:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read().decode()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """Run a session's part that appends lines, on a machine of that name, with one archive."""
    monkeypatch.setattr(gpu_session, "gpu_identity", lambda: IDENTITY)
    archive = tmp_path / "s.tar.gz"

    def session(machine: str, part: str, line: str) -> tuple[int, Path]:
        results = tmp_path / machine / "results"
        parts = [Part(part, (sys.executable, "-c", appends(results, line)))]
        monkeypatch.setattr(gpu_session, "plan", lambda *_, **__: parts)
        code = main(["--results", str(results), "--archive", str(archive)])
        return code, results

    return session


def test_a_session_on_a_fresh_machine_goes_on_from_the_records_in_the_archive(
    machines: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    _, first = machines("a", "one", "A")
    (first.with_name("results.shim")).mkdir()
    (first.with_name("results.shim") / "shim.jsonl").write_text("S\n")
    machines("a", "two", "B")

    code, results = machines("b", "three", "C")

    assert code == 0
    assert (results / "h200-141gb" / "table1.measured.jsonl").read_text() == "A\nB\nC\n"
    assert results.with_name("results.shim").joinpath("shim.jsonl").read_text() == "S\n"
    archive = tmp_path / "s.tar.gz"
    assert records(archive) == "A\nB\nC\n"
    assert records(archive, "results.shim/shim.jsonl") == "S\n"
    with tarfile.open(archive) as tar:
        assert {"logs/one.log", "logs/two.log", "logs/three.log"} <= set(tar.getnames())


def test_records_of_both_are_kept_where_a_machine_has_some_of_its_own(
    machines: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    machines("a", "one", "A")
    machines("a", "two", "B")
    other = tmp_path / "b" / "results" / "h200-141gb" / "table1.measured.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("A\nOWN\n")

    machines("b", "three", "C")

    assert records(tmp_path / "s.tar.gz") == "A\nB\nOWN\nC\n"


def test_other_files_that_are_there_are_not_overwritten(
    machines: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    _, first = machines("a", "one", "A")
    (first / "cards").mkdir()
    (first / "cards" / "c.json").write_text("older")
    machines("a", "two", "B")
    card = tmp_path / "b" / "results" / "cards" / "c.json"
    card.parent.mkdir(parents=True)
    card.write_text("newer")

    machines("b", "three", "C")

    assert card.read_text() == "newer"
    assert records(tmp_path / "s.tar.gz", "results/cards/c.json") == "newer"


def test_going_on_where_everything_is_there_adds_no_line_twice(
    machines: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    for part, line in (("one", "A"), ("two", "B"), ("three", "C")):
        machines("a", part, line)

    assert records(tmp_path / "s.tar.gz") == "A\nB\nC\n"


def test_a_line_cut_off_in_the_archive_costs_only_itself(tmp_path: Path) -> None:
    logs, results = tmp_path / "logs", tmp_path / "results"
    logs.mkdir()
    (results / "c").mkdir(parents=True)
    (results / "c" / "s.jsonl").write_text("A\nB cut")
    archive = tmp_path / "s.tar.gz"
    pack(archive, results, logs, {"card": "c", "outcomes": []})
    (results / "c" / "s.jsonl").write_text("OWN\n")

    unpack(archive, results, logs, "c")

    assert (results / "c" / "s.jsonl").read_text() == "A\nB cut\nOWN\n"


def test_an_archive_writes_nothing_outside_the_results(tmp_path: Path) -> None:
    archive = tmp_path / "s.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (
            ("logs/summary.json", '{"card": "c", "outcomes": []}'),
            ("results/../outside", "bad"),
            ("elsewhere/file", "bad"),
            ("results/inside", "good"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))

    unpack(archive, tmp_path / "there" / "results", tmp_path, "c")

    found = [path.name for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert found == ["inside"]
