"""One glob or several: which cases are meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.errors import MembenchError
from bench.globs import Globs, choose
from bench.suite import load_suite

_NAMES = ["fcn/plain/8x8", "fcn/small/8x8", "unet/plain/8x8", "odd[1]"]


@pytest.mark.parametrize(
    ("globs", "kept", "missing"),
    [
        (None, _NAMES, None),
        ([], _NAMES, None),
        ("fcn/*", _NAMES[:2], None),
        (["unet/*", "fcn/plain/*"], [_NAMES[0], _NAMES[2]], None),
        (["fcn/*", "*/plain/*"], _NAMES[:3], None),
        (["fcn/*", "vnet/*", "cnn"], _NAMES[:2], "vnet/*"),
        ("odd[1]", ["odd[1]"], None),
        ("", [], ""),
    ],
)
def test_what_any_glob_matches_is_kept_once_and_in_order(
    globs: Globs, kept: list[str], missing: str | None
) -> None:
    assert choose(_NAMES, globs, lambda name: (name,)) == (kept, missing)


def test_nothing_to_choose_from_matches_no_glob() -> None:
    assert choose([], ["a", "b"], lambda name: (name,)) == ([], "a")


def test_a_suite_gives_the_cases_of_every_glob_and_refuses_one_that_matches_none() -> None:
    suite = load_suite("table1")
    names = [case.name for case in suite.cases()]
    assert [c.name for c in suite.cases(glob=[names[3], names[1]])] == [names[1], names[3]]
    with pytest.raises(MembenchError, match="no case of suite table1 matches 'nosuch'"):
        suite.cases(glob=[names[0], "nosuch"])


@pytest.mark.parametrize("command", [["run"], ["trace", "-o", "a.json"]])
def test_a_repeated_case_is_not_forgotten(tmp_path: Path, command: list[str]) -> None:
    """The first of the two is refused: it was read, and not the last alone."""
    done = _invoke(tmp_path, command, "nosuch", "*/v0/*")
    assert done.exit_code == 2, done.output
    assert "no case of suite three matches 'nosuch'" in done.stderr


def test_every_case_of_a_list_of_parity_is_trained_or_refused() -> None:
    plan = load_suite("figure4").parity()
    first, second = (case.name for case in plan.cases[:2])
    chosen = plan.matching([first, second])
    assert {c.name for f in chosen.figures for c in f.cases} == {first, second}
    with pytest.raises(MembenchError, match="no case that parity trains matches 'nosuch'"):
        plan.matching([first, "nosuch"])


def test_a_trace_is_of_one_case_whatever_number_of_globs_name_it(tmp_path: Path) -> None:
    done = _invoke(tmp_path, ["trace", "-o", "a.json"], "*/v0/*", "*/v2/*")
    assert done.exit_code == 2
    assert "'*/v0/*', '*/v2/*' is 2 cases" in done.stderr
    assert "v1" not in done.stderr


def _invoke(folder: Path, command: list[str], *globs: str) -> Result:
    suite = folder / "three.yaml"
    rows = "".join(f"  - {{network: fcn, variant: v{i}, shape: 8x8x8}}\n" for i in range(3))
    suite.write_text(f"title: Three\ncard: rtx4090-24gb\ninclude:\n{rows}")
    options = [word for glob in globs for word in ("--case", glob)]
    name, *others = command
    return CliRunner().invoke(app, [name, str(suite), *others, *options])
