"""A child's end, whatever it has started: real processes, forked and left behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.child import Child, ChildCrashError, ChildTimeoutError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def asked(behaviour: str, **more: Any) -> dict[str, Any]:
    return {"case": {"variant": behaviour}, **more}


@pytest.fixture
def child() -> Child:
    return Child("tests.bench.fake_workers")


def started(child: Child) -> int:
    """Let the child start a process that would outlive it; return its number."""
    return int(child.ask(asked("start"), 30)["notes"][-1])


def test_a_hanging_child_is_ended_with_all_that_it_started(child: Child) -> None:
    pid = started(child)
    assert alive(pid)

    with pytest.raises(ChildTimeoutError, match="time limit of 1 s"):
        child.ask(asked("hang"), 1.0)

    assert gone(pid)
    assert gone(child.pid)


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_a_child_that_dies_takes_with_it_all_that_it_started(child: Child, how: str) -> None:
    pid = started(child)

    with pytest.raises(ChildCrashError):
        child.ask(asked(how), 30)

    assert gone(pid)


def test_a_child_that_ends_in_order_takes_with_it_all_that_it_started(child: Child) -> None:
    pid = started(child)

    child.finish()

    assert gone(pid)


def test_a_crash_is_seen_though_a_forked_process_holds_the_pipe(child: Child) -> None:
    begun = time.monotonic()

    with pytest.raises(ChildCrashError, match="process killed by SIGSEGV"):
        child.ask(asked("fork-SIGSEGV"), 100)

    assert time.monotonic() - begun < 30  # its time limit, and the forked process's life, are 100 s


def test_a_child_that_closes_its_pipe_and_lives_on_is_ended(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.child._FINISH_LIMIT_S", 0.5)

    with pytest.raises(ChildCrashError, match="closed the pipe of its replies and did not end"):
        child.ask(asked("close-pipe"), 100)

    assert gone(child.pid)
