"""``membench parity``: equal curves pass, a technique that trains otherwise is caught."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.errors import MembenchError
from bench.parity import Comparison, Run, Training, check_fit, compare, run_parity, train_run
from bench.record import append_line
from bench.report.parity import comparison_text, findings, parity_files
from bench.report.results import read_results
from bench.suite import Suite, load_suite
from bench.suite.parity import Pair
from bench.training import Reading
from memsave.techniques import TECHNIQUES, Technique
from tests.bench.parity_fixtures import suite_file, training, volume

__all__ = ["suite_file", "training", "volume"]


def multiply_gradient(parameter: torch.nn.Parameter, factor: float) -> None:
    parameter.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def invoke(suite: Path, volume: tuple[Path, Path] | None, *more: str) -> Result:
    folder = suite.parent
    words = ["parity", str(suite), "--output", str(folder / "reports")]
    words += ["--results", str(folder / "results")]
    if volume is not None:
        words += ["--image", str(volume[0]), "--labels", str(volume[1])]
    return CliRunner().invoke(app, [*words, *more])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- the command --------------------------------------------------------------------------------


def test_it_prints_writes_and_passes(suite_file: Path, volume: tuple[Path, Path]) -> None:
    result = invoke(suite_file, volume)
    assert result.exit_code == 0, result.output
    folder = suite_file.parent
    assert sorted(p.name for p in (folder / "reports").iterdir()) == [
        *("parity.md", "parity.png", "parity.svg")
    ]
    report = (folder / "reports/parity.md").read_text()
    assert "Trained on the CPU: 6 steps from seed 0" in report
    assert f"membench parity {suite_file} --image {volume[0]} --labels {volume[1]}" in report
    for text in (result.stdout, report):
        assert "1 of 1 exact techniques repeat the plain run's loss to the bit" in text
        assert "1 of 1 others stay within their bands" in text
        assert "To compare: the paper says so." in text
    assert "wide, 16x8x8, batch 2, bf16" in report  # in place of fp16, which CPUs do not compute in
    assert str(volume[0].parent) not in (folder / "reports/parity.svg").read_text()


def test_json_prints_what_the_curves_file_holds(
    suite_file: Path, volume: tuple[Path, Path]
) -> None:
    result = invoke(suite_file, volume, "--json", "--steps", "4", "--seed", "5")
    assert result.exit_code == 0, result.output
    printed = lines(result.stdout)
    path = suite_file.parent / "results/parity/tiny.cpu.jsonl"
    assert printed == lines(path.read_text())
    runs = {line["variant"]: line for line in printed if line["kind"] == "run"}
    assert list(runs) == ["plain", "wide", "checkpoint", "leaky", "inplace"]
    for run in runs.values():
        assert (run["evidence"], run["device"], run["seed"]) == ("measured", "cpu", 5)
        assert len(run["loss"]) == len(run["learning_rate"]) == run["steps"] == 4
        assert [entry["step"] for entry in run["dice"]] == [3, 4]
        assert all(0 <= d <= 1 for entry in run["dice"] for d in entry["dice"])
        assert run["classes"] == ["label 1", "label 2"]
    assert runs["checkpoint"]["loss"] == runs["plain"]["loss"]
    assert (runs["wide"]["precision"], runs["wide"]["batch_size"]) == ("bf16", 2)
    exact, banded = (line for line in printed if line["kind"] == "comparison")
    assert (exact["exact"], exact["difference"], exact["band"]) == (True, 0.0, 0.0)
    assert (banded["exact"], banded["inside"], banded["band"]) == (False, True, 0.001)
    assert 0 < banded["difference"] < 0.001


def test_runs_are_appended_and_no_report_takes_them_for_records(
    suite_file: Path, volume: tuple[Path, Path]
) -> None:
    for _ in range(2):
        more = ("--case", "fcn/wide/*", "--steps", "1")
        assert invoke(suite_file, volume, *more).exit_code == 0
    results = suite_file.parent / "results"
    assert len(lines((results / "parity/tiny.cpu.jsonl").read_text())) == 2
    with pytest.raises(MembenchError, match="no records in"):
        read_results([results])


def test_a_technique_whose_gradient_has_the_wrong_sign_is_caught(
    suite_file: Path, volume: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, the case named; the forward is right, so the first loss agrees."""

    def break_gradients(model: torch.nn.Module, _options: Any) -> torch.nn.Module:
        for parameter in model.parameters():
            multiply_gradient(parameter, -1)
        return model

    broken = dataclasses.replace(TECHNIQUES["checkpoint"], module=break_gradients)
    monkeypatch.setitem(TECHNIQUES, "checkpoint", broken)
    result = invoke(suite_file, volume, "--json", "--case", "fcn/checkpoint/*")
    assert result.exit_code == 1, result.output
    plain, technique, comparison = lines(result.stdout)
    assert plain["loss"][0] == technique["loss"][0]
    assert not comparison["inside"]
    assert comparison["difference"] > 0.01
    assert "fcn/checkpoint/8x8x8/train left its band" in result.stderr


def test_an_in_place_norm_with_a_wrong_gradient_leaves_its_band(
    suite_file: Path, volume: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the norms' weights, which are a hundredth of all, learn the wrong way."""
    from bench import named_workload

    build = named_workload._build_model

    def broken(case: Any, techniques: list[tuple[Technique, Any]]) -> torch.nn.Module:
        model = build(case, techniques)
        if case.variant == "inplace":
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    multiply_gradient(parameter, -1)
        return model

    monkeypatch.setattr(named_workload, "_build_model", broken)
    result = invoke(suite_file, volume, "--case", "fcn/inplace/*", "--steps", "20")
    assert result.exit_code == 1, result.output
    assert "LEFT ITS BAND" in result.stdout
    assert "0 of 1 others stay within their bands" in result.stdout


def test_a_run_that_diverges_is_reported_and_fails(
    suite_file: Path, volume: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient is a number: the weights are none after one step, the loss after two."""

    def spoil(model: torch.nn.Module, _options: Any) -> torch.nn.Module:
        multiply_gradient(next(iter(model.parameters())), float("nan"))
        return model

    broken = dataclasses.replace(TECHNIQUES["checkpoint"], module=spoil)
    monkeypatch.setitem(TECHNIQUES, "checkpoint", broken)
    result = invoke(suite_file, volume, "--json", "--case", "fcn/checkpoint/*")
    assert result.exit_code == 1, result.output
    _, technique, comparison = lines(result.stdout)
    assert (technique["status"], len(technique["loss"])) == ("diverged", 1)
    assert "the loss of step 2 is nan" in technique["reason"]
    assert (comparison["difference"], comparison["step"]) == (None, 2)
    report = (suite_file.parent / "reports/parity.md").read_text()
    assert "the loss of step 2 is nan" in report


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "0"), "--steps must be 1 or more, got 0"),
        (("--seed", "-1"), "--seed must be 0 to 2^63 - 1, got -1"),
        (("--case", "fcn/plane/*"), "no case that parity trains matches 'fcn/plane/*'"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    suite_file: Path, volume: tuple[Path, Path], more: tuple[str, ...], message: str
) -> None:
    result = invoke(suite_file, volume, *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (suite_file.parent / "results").exists()


def test_an_image_without_labels_is_refused(suite_file: Path, volume: tuple[Path, Path]) -> None:
    result = invoke(suite_file, None, "--image", str(volume[0]))
    assert result.exit_code == 2
    assert "--image and --labels belong together" in result.stderr


def test_a_suite_without_the_section_says_so() -> None:
    result = CliRunner().invoke(app, ["parity", "table1"])
    assert result.exit_code == 2
    assert "suite table1 says nothing of parity" in result.stderr


def test_without_nilearn_the_error_says_what_to_install(
    suite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nilearn", None)
    result = invoke(suite_file, None)
    assert result.exit_code == 2
    assert "pip install nilearn" in result.stderr


def test_curves_that_cannot_be_written_are_said_before_anything_trains(
    suite_file: Path, volume: tuple[Path, Path]
) -> None:
    (suite_file.parent / "results/parity/tiny.cpu.jsonl").mkdir(parents=True)
    result = invoke(suite_file, volume, "--steps", "1")
    assert result.exit_code == 2
    assert "choose another folder with --results" in result.stderr
    assert "[1/5]" not in result.stderr


def test_a_full_disk_ends_the_command_with_the_curves_before_it_kept(
    suite_file: Path, volume: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import parity_session

    def append(path: Path, text: str) -> None:
        if path.exists() and path.read_text():
            raise OSError(28, "No space left on device")
        append_line(path, text)

    monkeypatch.setattr(parity_session, "append_line", append)
    result = invoke(suite_file, volume, "--steps", "1")
    assert result.exit_code == 2
    assert "cannot write curves to" in result.stderr
    assert "No space left on device" in result.stderr
    assert len(lines((suite_file.parent / "results/parity/tiny.cpu.jsonl").read_text())) == 1


# -- runs and comparisons -----------------------------------------------------------------------


def pair_of(suite: Suite, band: float | None) -> Pair:
    exact, _ = suite.parity().pairs
    return dataclasses.replace(exact, band=band)


def run_with(suite: Suite, losses: list[float], status: str = "ok") -> Run:
    readings = tuple(
        Reading(step=i, loss=loss, learning_rate=1e-3) for i, loss in enumerate(losses, start=1)
    )
    case = suite.own_cases[0]
    return Run(case=case, readings=readings, time_s=1.0, status=status, reason="")  # type: ignore[arg-type]


def held(
    suite: Suite, training: Training, band: float | None, losses: list[float], status: str = "ok"
) -> Comparison:
    plain = run_with(suite, [1.0, 1.0, 1.0, 1.0])
    return compare(pair_of(suite, band), plain, run_with(suite, losses, status), training)


def test_an_exact_technique_is_held_to_the_last_bit(suite_file: Path, training: Training) -> None:
    suite = load_suite(str(suite_file))
    off = float(np.nextafter(1.0, 2.0))
    assert held(suite, training, None, [1.0, 1.0, 1.0, 1.0]).inside
    found = held(suite, training, None, [1.0, 1.0, off, 1.0])
    assert (found.inside, found.step, found.difference) == (False, 3, off - 1.0)
    on_cuda = dataclasses.replace(training, device="cuda")
    assert held(suite, on_cuda, None, [1.0, 1.0, 1.000009, 1.0]).inside
    assert not held(suite, on_cuda, None, [1.0, 1.0, 1.000011, 1.0]).inside


def test_a_band_holds_the_mean_of_each_epoch(suite_file: Path, training: Training) -> None:
    """Epochs of two steps: +0.3 and -0.3 cancel within one, not across two."""
    suite = load_suite(str(suite_file))
    inside = held(suite, training, 0.25, [1.3, 0.7, 1.0, 1.5])
    assert (inside.inside, inside.difference, inside.step) == (True, 0.25, 4)
    assert inside.step_difference == 0.5
    outside = held(suite, training, 0.25, [1.0, 1.3, 0.7, 1.5 + 1e-9 + 0.3])
    assert not outside.inside


def test_a_run_that_diverged_is_never_inside(suite_file: Path, training: Training) -> None:
    suite = load_suite(str(suite_file))
    found = held(suite, training, 100.0, [1.0, 1.0], "diverged")
    assert (found.inside, found.step) == (False, 3)
    assert "by diverged at step 3" in comparison_text(found)


def test_two_runs_from_one_seed_are_one_curve_and_another_seed_is_another(
    suite_file: Path, training: Training
) -> None:
    case = load_suite(str(suite_file)).own_cases[0]
    first, again = train_run(case, training), train_run(case, training)
    assert first.losses == again.losses
    assert first.dice == again.dice
    other = train_run(case, dataclasses.replace(training, seed=1))
    assert other.losses[0] != first.losses[0]


def test_a_case_too_large_for_the_gpu_is_named(
    suite_file: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("bench.parity.train", train)
    with pytest.raises(MembenchError, match="fcn/plain/8x8x8/train does not fit on this GPU"):
        train_run(load_suite(str(suite_file)).own_cases[0], training)


def test_the_networks_must_have_the_volumes_classes(suite_file: Path, training: Training) -> None:
    suite = load_suite(str(suite_file))
    more = dataclasses.replace(training.volume, class_names=("background", "a", "b", "c"))
    with pytest.raises(MembenchError, match="has 3 classes and image"):
        check_fit(suite.own_cases[:1], more)
    with pytest.raises(MembenchError, match="has 3 classes"):
        next(run_parity(suite.parity(), dataclasses.replace(training, volume=more)))


def test_the_words_come_from_the_figures(suite_file: Path, training: Training) -> None:
    """Dice 0.25 and 0.5 of two classes are 0.375 in the mean; a run without any has no rank."""
    suite = load_suite(str(suite_file))
    plan = suite.parity()
    plain, wide = plan.figures[0].cases
    good = Reading(step=1, loss=1.0, learning_rate=1e-3, scores=(0.25, 0.5))
    done = Run(case=plain, readings=(good,), time_s=1.0, status="ok")
    lost = Run(case=wide, readings=(), time_s=1.0, status="diverged", reason="NaN at once")
    runs = {plain.name: done, wide.name: lost}
    (line,) = findings(plan, runs, [])
    assert line == (
        "Two. Mean Dice at the end: plain, 8x8x8: 0.375; diverged: wide, 16x8x8, batch 2, fp16. "
        "To compare: the paper says so."
    )
    alone = dataclasses.replace(plan, pairs=())
    files = parity_files("T", "membench parity", alone, [done, lost], [], training)
    report = files["parity.md"].decode()
    assert "NaN at once" in report
    assert "plain networks" not in report
