"""The GitHub Action and the pre-commit hook, run as their runners would: step by step, in bash."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SUITE = """\
title: A small suite
card: v100-32gb
matrix:
  networks:
    - {name: fcn, variant: small, widths: [4, 8], block: double_conv}
  shapes: [16x16x16]
"""
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a suite, its baseline, and a stricter baseline that it does not meet."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "small.yaml").write_text(SUITE)
    run_membench(folder, "run", "small.yaml", "--device", "predict", "--results", "first")
    run_membench(folder, "baseline", "first", "-o", "baseline.json")
    text = (folder / "baseline.json").read_text()
    lower = re.sub(
        r'("peak_allocated_bytes": )(\d+)', lambda m: f"{m[1]}{int(m[2]) * 9 // 10}", text
    )
    assert lower != text
    (folder / "lower.json").write_text(lower)
    return folder


def run_membench(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "bench", *arguments]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True)


def environment(folder: Path) -> dict[str, str]:
    """The runner's: ``membench`` and ``python`` are on the path, and are this checkout's."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, command in (("membench", "-m bench"), ("python", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command} "$@"\n')
        script.chmod(0o755)
    return {
        **{k: v for k, v in os.environ.items() if k != "GITHUB_STEP_SUMMARY"},
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


class Runner:
    """Runs a composite action's steps: inputs filled in, outputs read back from their file."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.action = yaml.safe_load((ROOT / "action.yml").read_text())
        self.folder = folder
        defaults = {name: one.get("default", "") for name, one in self.action["inputs"].items()}
        assert set(inputs) <= set(defaults)
        self.values = {f"inputs.{name}": v for name, v in {**defaults, **inputs}.items()}
        self.values["github.action_path"] = str(ROOT)
        self.output = ""

    def fill(self, text: str) -> str:
        return _EXPRESSION.sub(lambda match: self.values[match[1]], text)

    def run(self, *, without: tuple[str, ...] = ("install",)) -> int:
        """Run the steps up to the first that fails; return its exit code, or 0."""
        for step in self.action["runs"]["steps"]:
            if "run" in step and step.get("id") not in without:
                code = self.run_step(step)
                if code:
                    return code
        return 0

    def run_step(self, step: dict[str, Any]) -> int:
        assert step["shell"] == "bash"  # required of a composite action
        outputs = self.folder / "github_output"
        outputs.write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self.fill(step["run"])],
            cwd=self.folder,
            env={
                **environment(self.folder),
                "RUNNER_TEMP": str(self.folder / "runner"),
                "GITHUB_OUTPUT": str(outputs),
                "GITHUB_STEP_SUMMARY": str(self.folder / "step_summary.md"),
                **{name: self.fill(value) for name, value in step.get("env", {}).items()},
            },
            capture_output=True,
            text=True,
        )
        self.output += done.stdout + done.stderr
        for line in outputs.read_text().splitlines():
            name, _, value = line.partition("=")
            self.values[f"steps.{step['id']}.outputs.{name}"] = value
        return done.returncode

    def outputs(self) -> dict[str, str]:
        return {name: self.fill(one["value"]) for name, one in self.action["outputs"].items()}


def runner(project: Path, **inputs: str) -> Runner:
    (project / "runner").mkdir(exist_ok=True)
    (project / "step_summary.md").unlink(missing_ok=True)
    return Runner(project, suite="small.yaml", **inputs)


def test_the_action_passes_a_suite_that_meets_its_baseline(project: Path) -> None:
    action = runner(project, baseline="baseline.json", tolerance="0")
    assert action.run() == 0, action.output
    outputs = action.outputs()
    assert outputs["passed"] == "true"
    assert Path(outputs["summary"]).read_text()
    assert (project / "step_summary.md").read_text() == Path(outputs["summary"]).read_text()
    assert list(Path(outputs["results"]).rglob("*.jsonl"))


def test_the_action_fails_on_a_regression_and_its_outputs_say_so(project: Path) -> None:
    action = runner(project, baseline="lower.json", case="fcn/*")
    assert action.run() == 1
    assert action.outputs()["passed"] == "false"
    assert "regress" in Path(action.outputs()["summary"]).read_text().lower()


@pytest.mark.slow
def test_another_card_is_misuse_of_the_baseline(project: Path) -> None:
    action = runner(project, baseline="baseline.json", card="t4-16gb", ratchet="true")
    assert action.run() == 2
    assert "t4-16gb" in action.output


def test_the_action_installs_what_it_is_told_to(project: Path) -> None:
    """The install step with a pip that only says what it was asked."""
    asked = []
    for inputs in ({}, {"torch": "torch==2.13.0", "torch-index-url": "", "membench": "membench"}):
        action = runner(project, baseline="baseline.json", **inputs)
        (step,) = (s for s in action.action["runs"]["steps"] if s.get("id") == "install")
        step = {**step, "run": 'python() { echo "$*"; }\n' + step["run"]}
        assert action.run_step(step) == 0
        asked.append(action.output.splitlines())
    assert asked == [
        [
            "-m pip install --index-url https://download.pytorch.org/whl/cpu torch",
            f"-m pip install {ROOT}",
        ],
        ["-m pip install torch==2.13.0", "-m pip install membench"],
    ]
    nothing = runner(project, baseline="baseline.json", torch="none", membench="none")
    assert nothing.run(without=("run", "check")) == 0
    assert nothing.output == ""


def test_every_input_of_the_action_is_used_and_described() -> None:
    text = (ROOT / "action.yml").read_text()
    action = yaml.safe_load(text)
    for name, one in action["inputs"].items():
        assert one["description"]
        assert f"inputs.{name} " in text, name
    assert action["runs"]["using"] == "composite"


@pytest.mark.parametrize(
    ("baseline", "code"),
    [pytest.param("baseline.json", 0, marks=pytest.mark.slow), ("lower.json", 1)],
)
def test_the_pre_commit_hook_holds_a_suite_against_its_baseline(
    project: Path, baseline: str, code: int
) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["pass_filenames"]) == ("membench-check", False)
    command = [*shlex.split(hook["entry"]), *hook["args"], "small.yaml", "--baseline", baseline]
    before = set(project.iterdir())
    done = subprocess.run(
        command, cwd=project, env=environment(project), capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert set(project.iterdir()) == before


def test_the_pre_commit_hook_passes_misuse_on(project: Path) -> None:
    from bench.pre_commit import main

    assert main(["no-such-suite", "--baseline", str(project / "baseline.json")]) == 2
