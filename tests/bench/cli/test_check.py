"""``membench check``, ``baseline``, ``compare`` and ``explain``, as a shell sees them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.cli.console import err, out
from bench.record import Holder, Record, append_record
from tests.bench.records import GIB, make_record

ROOT = Path(__file__).resolve().parents[3]
NAME = "fcn/baseline/96x96x96/train"


@pytest.fixture(autouse=True)
def _fresh_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner swaps the streams that the cached consoles hold; CI sets the summary's place."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    out.cache_clear()
    err.cache_clear()


def invoke(*arguments: object) -> tuple[int, str, str]:
    out.cache_clear()
    err.cache_clear()
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def holder(module: str, size: int, category: Any = "activation") -> Holder:
    return Holder(
        module=module, operator="aten.clone", source_line="f.py:9", category=category, bytes=size
    )


def results(folder: Path, *records: Record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        append_record(folder / "table1.predicted.jsonl", record)
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    record = make_record(peak_holders=(holder("encoder.0", GIB), holder("head", GIB, "workspace")))
    return results(tmp_path / "before", record)


@pytest.fixture
def after(tmp_path: Path) -> Path:
    held = (holder("encoder.0", 2 * GIB), holder("head", GIB, "workspace"))
    return results(tmp_path / "after", make_record(peak_allocated_bytes=3 * GIB, peak_holders=held))


@pytest.fixture
def baseline(before: Path, tmp_path: Path) -> Path:
    path = tmp_path / "b.json"
    code, stdout, stderr = invoke("baseline", before, "-o", path)
    assert (code, stdout, stderr) == (0, f"baseline: {path}, 1 case\n", "")
    return path


def test_the_run_of_the_baseline_itself_passes(before: Path, baseline: Path) -> None:
    code, stdout, stderr = invoke("check", before, "--baseline", baseline, "--tolerance", "0")
    assert (code, stderr) == (0, "")
    assert "1 case: 1 within tolerance; tolerance: allocated 0\n" in stdout


def test_a_regression_is_exit_code_1_and_names_who_grew(after: Path, baseline: Path) -> None:
    code, stdout, stderr = invoke("check", after, "--baseline", baseline)
    assert (code, stderr) == (1, "")
    assert f"regression: {NAME} on v100-32gb, predicted: allocated 2.5 GiB -> 3.0 GiB" in stdout
    assert "  by category\n    +1.0 GiB  activations  (1.0 GiB -> 2.0 GiB)\n" in stdout
    assert "  by module\n    +1.0 GiB  encoder.0  (1.0 GiB -> 2.0 GiB)\n" in stdout
    assert "  by source line\n    +1.0 GiB  f.py:9" in stdout
    assert invoke("check", after, "--baseline", baseline, "--tolerance", "512MiB")[0] == 0


def test_misuse_is_exit_code_2(after: Path, baseline: Path, tmp_path: Path) -> None:
    for arguments in (
        ("check", after),
        ("check", after, "--baseline", tmp_path / "absent.json"),
        ("check", after, "--baseline", baseline, "--tolerance", "5MB"),
        ("check", after, "--baseline", baseline, "--gate", "memory"),
        ("check", after, "--baseline", baseline, "--allow-different", "evidence"),
        ("check", after, "--baseline", baseline, "--case", "nothing"),
        ("check", tmp_path, "--baseline", baseline, "--summary", tmp_path),
        ("baseline", after),
        ("explain", after, "nothing"),
        ("compare", after, tmp_path / "absent"),
    ):
        assert invoke(*arguments)[0] == 2, arguments


def test_unlike_runs_are_refused_and_can_be_accepted(tmp_path: Path, baseline: Path) -> None:
    other = results(tmp_path / "other", make_record(environment={"torch": "2.12.0"}))
    code, stdout, stderr = invoke("check", other, "--baseline", baseline)
    assert (code, stdout) == (2, "")
    assert "torch: 2.13.0 before, 2.12.0 now" in stderr
    assert stderr.count("\n") == 1
    code, stdout, stderr = invoke(
        "check", other, "--baseline", baseline, "--allow-different", "torch"
    )
    assert code == 0
    assert stderr.startswith("not alike, as allowed: torch: 2.13.0 before, 2.12.0 now")


def test_cases_that_come_and_go_are_named(tmp_path: Path, before: Path, baseline: Path) -> None:
    results(before, make_record(variant="more"))
    code, stdout, _ = invoke("check", before, "--baseline", baseline)
    assert code == 0
    assert "new               fcn/more/96x96x96/train on v100-32gb" in stdout
    assert invoke("check", before, "--baseline", baseline, "--fail-on-new")[0] == 1
    assert "more" not in invoke("check", before, "--baseline", baseline, "--case", NAME)[1]
    other = results(tmp_path / "less", make_record(variant="more"))
    code, stdout, _ = invoke("check", other, "--baseline", baseline)
    assert code == 1
    assert f"vanished  {NAME}" in stdout


def test_with_ratchet_the_command_that_records_is_printed_and_works(
    tmp_path: Path, baseline: Path
) -> None:
    better = results(tmp_path / "better", make_record(peak_allocated_bytes=GIB))
    assert invoke("check", better, "--baseline", baseline)[0] == 0
    code, stdout, _ = invoke("check", better, "--baseline", baseline, "--ratchet")
    assert code == 1
    command = f"membench baseline {better} -o {baseline}"
    assert f"record what is better or new: {command}\n" in stdout
    assert invoke(*command.split()[1:])[0] == 0
    assert invoke("check", better, "--baseline", baseline, "--ratchet")[0] == 0


def test_the_summary_goes_where_it_is_asked_for_and_to_a_github_job(
    after: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, summary = tmp_path / "job.md", tmp_path / "summary.md"
    job.write_text("before\n")
    summary.write_text("old")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job))
    assert invoke("check", after, "--baseline", baseline, "--summary", summary)[0] == 1
    text = summary.read_text()
    assert text.startswith("## Peak GPU memory: the check failed\n")
    assert "encoder.0" in text
    assert job.read_text() == "before\n" + text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    code, _, stderr = invoke("check", after, "--baseline", baseline)
    assert code == 2
    assert f"cannot write the summary to {tmp_path}" in stderr


def test_json_is_one_object_with_every_figure(after: Path, baseline: Path) -> None:
    code, stdout, _ = invoke("check", after, "--baseline", baseline, "--json")
    data = json.loads(stdout)
    assert (code, data["passed"], data["counts"]) == (1, False, {"regression": 1})
    (case,) = data["cases"]
    assert case["metrics"]["allocated"] == {
        "before_bytes": 5 * GIB // 2,
        "after_bytes": 3 * GIB,
        "change_bytes": GIB // 2,
        "gated": True,
        "tolerance": "1 %",
        "grew": True,
    }
    assert case["growth"]["by_module"] == [
        {
            "name": "encoder.0",
            "before_bytes": GIB,
            "after_bytes": 2 * GIB,
            "growth_bytes": GIB,
        }
    ]


def test_of_many_cases_only_what_changed_is_listed(tmp_path: Path) -> None:
    many = results(tmp_path / "many", *(make_record(variant=f"v{n}") for n in range(101)))
    code, stdout, _ = invoke("check", many, "--baseline", many)
    assert (code, stdout.strip()) == (
        *(0, "101 cases: 101 within tolerance; tolerance: allocated 1 %"),
    )
    more = [make_record(variant=f"v{n}", peak_allocated_bytes=3 * GIB) for n in range(7)]
    less = tmp_path / "less"
    shutil.copytree(many, less)
    code, stdout, _ = invoke("check", results(less, *more), "--baseline", many)
    assert code == 1
    assert "2 more grew" in stdout
    assert "v8" not in stdout


# -- compare ------------------------------------------------------------------------------------


def test_compare_says_who_grew_between_any_two_runs(before: Path, after: Path) -> None:
    code, stdout, stderr = invoke("compare", before, after)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(
        f"{NAME} on v100-32gb, predicted: peak allocated 2.5 GiB -> 3.0 GiB, +512 MiB (+20.00 %)\n"
    )
    assert "    +1.0 GiB  encoder.0  (1.0 GiB -> 2.0 GiB)\n" in stdout
    assert invoke("compare", before, before)[1] == "1 case the same\n"


def test_compare_names_what_is_not_alike_and_goes_on(tmp_path: Path, before: Path) -> None:
    other = results(
        tmp_path / "o",
        make_record(evidence="measured", tracer=None, card="h200"),
        make_record(variant="w", status="oom"),
    )
    results(before, make_record(variant="v"), make_record(variant="w"))
    code, stdout, stderr = invoke("compare", before, other)
    assert code == 0
    assert "not alike: card: v100-32gb before, h200 now" in stderr
    assert "not alike: evidence: predicted before, measured now" in stderr
    assert "measured records have none" in stdout
    assert "fcn/v/96x96x96/train on v100-32gb, predicted: only in A\n" in stdout
    assert "fcn/w/96x96x96/train on v100-32gb, predicted: ok -> oom\n" in stdout


def test_compare_in_json_has_both_peaks_and_the_growth(before: Path, after: Path) -> None:
    results(after, make_record(variant="v", peak_allocated_bytes=None))
    results(before, make_record(variant="v"))
    data = json.loads(invoke("compare", before, after, "--json")[1])
    first, second = data["cases"]
    assert first["peak_allocated_bytes"] == {"before": 5 * GIB // 2, "after": 3 * GIB}
    assert first["growth_bytes"] == GIB // 2
    assert first["growth"]["by_category"][0]["name"] == "activations"
    assert (second["case"], second["growth_bytes"]) == ("fcn/v/96x96x96/train", None)
    assert "no allocated peak recorded" in invoke("compare", before, after)[1]


# -- explain ------------------------------------------------------------------------------------


def test_explain_says_who_holds_the_peak_along_four_axes(after: Path, baseline: Path) -> None:
    code, stdout, _ = invoke("explain", after, "fcn/base*")
    assert code == 0
    lines = [line.split() for line in stdout.splitlines()]
    assert ["2.0", "GiB", "66.7", "%", "encoder.0"] in lines
    assert ["1.0", "GiB", "33.3", "%", "workspace"] in lines
    for title in ("by category", "by module", "by operator", "by source line"):
        assert title in stdout
    assert "1.0 GiB" in invoke("explain", baseline, NAME)[1]


def test_explain_by_one_axis_and_its_largest_only(after: Path) -> None:
    stdout = invoke("explain", after, NAME, "--by", "module", "--top", "1")[1]
    assert "by module" in stdout
    assert "by category" not in stdout
    assert "in 1 more" in stdout
    data = json.loads(invoke("explain", after, NAME, "--by", "module", "--top", "1", "--json")[1])
    assert data["by_module"] == [{"name": "encoder.0", "bytes": 2 * GIB}]
    assert (data["case"], data["held_bytes"]) == (NAME, 3 * GIB)
    assert "by_line" not in data


def test_explain_lists_what_a_glob_matches_when_it_is_not_one(after: Path) -> None:
    results(after, *(make_record(variant=f"v{n}") for n in range(25)))
    code, _, stderr = invoke("explain", after, "*")
    assert code == 2
    assert f"'*' is 26 cases, name one: {NAME} on v100-32gb, predicted, " in stderr
    assert "and 6 more" in stderr


def test_a_record_without_holders_says_so(tmp_path: Path) -> None:
    folder = results(tmp_path / "m", make_record(evidence="measured", tracer=None))
    code, stdout, _ = invoke("explain", folder, NAME)
    assert code == 0
    assert "measured records have none" in stdout
    results(folder, make_record(status="oom", peak_allocated_bytes=None, variant="o"))
    assert "not known, which ended before its peak" in invoke("explain", folder, "*/o/*")[1]


def test_the_commands_need_neither_torch_nor_pandas(before: Path, baseline: Path) -> None:
    """They run on every pull request, and in editors' hooks."""
    code = (
        "import sys; from bench.cli import app; sys.argv[0] = 'membench'\n"
        "try: app()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "sys.exit(str({'torch', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", code, "check", str(before), "--baseline", str(baseline)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip() == ""


# -- the whole way ------------------------------------------------------------------------------

SUITE = """\
title: A small suite
card: v100-32gb
matrix:
  networks:
    - {name: fcn, variant: plain, widths: [4, 8]}
    - {name: fcn, variant: compact, widths: [4, 8], block: ccblock}
  shapes: [32x32x32]
"""
ONE_ACTIVATION_MORE = """

import torch  # noqa: E402


class _KeepsItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _forward(self, x):
    return nn.Sequential.forward(self, _KeepsItsInput.apply(x))


CCBlock.forward = _forward
"""


def predict(tree: Path, suite: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "bench", "run", str(suite), "--device", "predict"]
    done = subprocess.run(
        [*command, "--results", str(folder)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_an_activation_too_many_in_one_block_is_caught_without_a_gpu_and_the_block_is_named(
    tmp_path: Path,
) -> None:
    """The block of ``encoder.1`` keeps a copy of its input too: 4 channels of 16^3 in float32."""
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE)
    changed = tmp_path / "changed"
    for package in ("bench", "memsave", "suites"):
        shutil.copytree(ROOT / package, changed / package, ignore=lambda *_: {"__pycache__"})
    blocks = changed / "memsave" / "blocks.py"
    blocks.write_text(blocks.read_text() + ONE_ACTIVATION_MORE)
    baseline = tmp_path / "b.json"
    assert invoke("baseline", predict(ROOT, suite, tmp_path / "a"), "-o", baseline)[0] == 0
    after = predict(changed, suite, tmp_path / "c")
    code, stdout, _ = invoke("check", after, "--baseline", baseline, "--tolerance", "0", "--json")
    assert code == 1
    verdicts = {case["case"]: case for case in json.loads(stdout)["cases"]}
    assert verdicts["fcn/plain/32x32x32/train"]["verdict"] == "same"
    growth = verdicts["fcn/compact/32x32x32/train"]["growth"]
    kept = 4 * 16**3 * 4
    largest = {axis: growth[f"by_{axis}"][0] for axis in ("module", "operator", "category")}
    assert {axis: (c["name"], c["growth_bytes"]) for axis, c in largest.items()} == {
        "module": ("encoder.1", kept),
        "operator": ("aten.clone.default", kept),
        "category": ("activations", kept),
    }
    assert growth["by_line"][0]["name"].startswith("memsave/blocks.py:")
    code, stdout, _ = invoke("check", after, "--baseline", baseline, "--tolerance", "0")
    assert code == 1
    assert "+64 KiB  encoder.1  (0 B -> 64 KiB)" in stdout
