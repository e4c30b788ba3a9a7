"""A disk that is full: a device that takes nothing, and a file that may not grow any more."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.record import read_records
from tests.bench.cli.test_run import SUITE

ROOT = Path(__file__).resolve().parents[3]
FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def run(folder: Path, *options: str, output: Path | None = None, limit_bytes: int | None = None):  # type: ignore[no-untyped-def]
    """Predict the small suite in a process of its own, whose files may have ``limit_bytes``."""
    suite = folder / "small.yaml"
    suite.write_text(SUITE)

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = ["bench", "run", str(suite), "--device", "predict", "--card", "v100-32gb"]
    with (output or folder / "out.txt").open("wb") as stdout:
        return subprocess.run(
            [sys.executable, "-m", *command, "--results", str(folder / "results"), *options],
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
            check=False,
        )


def results_of(folder: Path) -> Path:
    return folder / "results" / "v100-32gb" / "small.predicted.jsonl"


def test_a_results_file_on_a_full_disk_is_one_line_that_names_case_and_file(
    tmp_path: Path,
) -> None:
    results_of(tmp_path).parent.mkdir(parents=True)
    results_of(tmp_path).symlink_to(FULL)

    done = run(tmp_path, "--case", "*small/16x16x16*")

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot write the record of fcn/small/16x16x16/train to ")
    assert "No space left on device; the records before it are kept" in line


def test_a_disk_that_fills_in_the_middle_of_a_record_keeps_those_before_and_resumes(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, "--case", "fcn/small/16x16x16/*").returncode == 0
    kept = results_of(tmp_path).stat().st_size

    done = run(tmp_path, "--resume", limit_bytes=kept + 100)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot write the record of fcn/")
    assert "Traceback" not in done.stderr
    assert results_of(tmp_path).stat().st_size == kept + 100  # cut within the second record
    assert [r.case for r in read_records(results_of(tmp_path))] == ["fcn/small/16x16x16/train"]
    again = run(tmp_path, "--resume")
    assert again.returncode == 0, again.stderr
    assert len(list(read_records(results_of(tmp_path)))) == 4


@pytest.mark.parametrize("option", ["--json", None], ids=["records", "table"])
def test_an_output_on_a_full_disk_is_one_line(tmp_path: Path, option: str | None) -> None:
    options = ("--case", "fcn/small/16x16x16/*", *([option] if option else []))

    done = run(tmp_path, *options, output=FULL)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write the output: No space left on device" in done.stderr.splitlines()[-1]
    assert len(list(read_records(results_of(tmp_path)))) == 1
