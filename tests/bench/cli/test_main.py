"""The way into the command line: misuse is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest


def membench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "table1", "--devise", "predict"), "--device"),
        (("rum",), "'run'"),
        (("run",), "'suite'"),
        (("run", "table1", "--device", "moon"), "'moon'"),
    ],
    ids=" ".join,
)
def test_misuse_is_one_line_and_exit_code_2(arguments: tuple[str, ...], named: str) -> None:
    done = membench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_no_argument_shows_the_help() -> None:
    done = membench()
    assert (done.returncode, done.stderr) == (0, "")
    assert "Commands" in done.stdout


def test_a_command_s_own_exit_code_is_kept() -> None:
    assert membench("run", "no-such-suite").returncode == 2
    assert membench("list", "cards").returncode == 0
