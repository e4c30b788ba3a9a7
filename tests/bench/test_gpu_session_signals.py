"""The GPU session as a process: what signals do to it, to its part, and to its archive."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A shell's background jobs ignore Ctrl-C, and so would all that they start: these tests too.
_HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
_RUN_OF_PARTS = """
import sys
from bench import gpu_session
from bench.gpu import GpuIdentity
from bench.gpu_session import Part
archive, results, *codes = sys.argv[1:]
parts = [Part(f"part{n}", (sys.executable, "-c", code)) for n, code in enumerate(codes)]
card = GpuIdentity(name="NVIDIA H200", uuid="GPU-1", memory_bytes=2**37, card="h200-141gb")
gpu_session.gpu_identity = lambda: card
gpu_session.plan = lambda *_, **__: parts
sys.exit(gpu_session.main(["--archive", archive, "--results", results]))
"""
_POLITE = """
import os, time
try:
    print("pids", os.getpid(), flush=True)
    time.sleep(120)
except KeyboardInterrupt:
    print("summed up", flush=True)
    raise SystemExit(130)
"""
_TALKING = """
import os, time
print("pids", os.getpid(), flush=True)
time.sleep(0.5)
print("late")
"""
_STUBBORN = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print("pids", os.getpid(), child, flush=True)
time.sleep(120)
"""


@dataclasses.dataclass
class Session:
    """A session that runs as a process, and the pids that its part has said."""

    process: subprocess.Popen[str]
    pids: list[int]
    archive: Path

    def ended(self) -> tuple[int, list[str]]:
        """Wait for its end; return its exit code and the lines it said after the pids."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said.splitlines()

    def member(self, name: str) -> str:
        with tarfile.open(self.archive) as tar:
            member = tar.extractfile(name)
            assert member is not None
            return member.read().decode()


Start = Callable[..., Session]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start sessions of the given programs, and wait until one has said its pids."""
    archive = tmp_path / "out" / "s.tar.gz"
    sessions: list[Session] = []

    def started(*codes: str, before: str = _HEARS_CTRL_C) -> Session:
        arguments = (str(archive), str(tmp_path / "results"), *codes)
        process = subprocess.Popen(
            [sys.executable, "-c", before + _RUN_OF_PARTS, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        session = Session(process, [], archive)
        sessions.append(session)
        assert process.stdout is not None
        for line in process.stdout:
            if re.fullmatch(r"pids [\d ]+\n", line):
                session.pids += map(int, line.split()[1:])
                break
        return session

    yield started
    for session in sessions:
        session.process.kill()
        session.process.wait()
        if session.process.stdout is not None:
            session.process.stdout.close()
        for pid in filter(alive, session.pids):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int]) -> bool:
    """Wait for the end of processes: a kill has been sent when this is asked."""
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_part_and_the_archive_is_written(
    start: Start, number: signal.Signals
) -> None:
    session = start("print('before')", _POLITE, "print('never')")

    session.process.send_signal(number)
    code, lines = session.ended()

    assert code == 128 + number
    assert lines[-1] == f"interrupted by {number.name}; the same command goes on"
    assert not any(map(alive, session.pids))
    assert session.member("logs/part1.log").endswith("summed up\n")
    outcomes = json.loads(session.member("logs/summary.json"))["outcomes"]
    assert [(o["name"], o["exit_code"]) for o in outcomes] == [("part0", 0), ("part1", 130)]
    assert outcomes[1]["reason"] == f"ended by the session's {number.name}: summed up"


def test_a_part_that_ignores_all_it_can_is_killed_with_what_it_started(start: Start) -> None:
    session = start(_STUBBORN)

    session.process.terminate()
    code, _ = session.ended()

    assert code == 143
    assert len(session.pids) == 2
    assert gone(session.pids)
    (outcome,) = json.loads(session.member("logs/summary.json"))["outcomes"]
    assert outcome["exit_code"] == -9


def test_a_session_that_is_killed_outright_takes_its_part_with_it(start: Start) -> None:
    session = start(_POLITE)

    session.process.kill()

    assert gone(session.pids)


def test_a_hangup_that_nohup_has_the_session_ignore_stays_ignored(start: Start) -> None:
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    session = start(_POLITE.replace("120", "1"), before=ignore)

    session.process.send_signal(signal.SIGHUP)

    assert session.ended()[0] == 0


def test_ctrl_c_reaches_a_part_of_a_session_in_the_background(start: Start) -> None:
    # As a shell without job control starts it: with SIGINT ignored, which a program inherits.
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    session = start(_POLITE, before=ignore)

    session.process.terminate()

    assert session.ended()[0] == 143
    assert session.member("logs/part0.log").endswith("summed up\n")


def test_a_session_nobody_listens_to_any_more_still_writes_its_archive(start: Start) -> None:
    session = start(_TALKING)
    assert session.process.stdout is not None
    session.process.stdout.close()  # as a terminal that has gone

    assert session.process.wait(60) == 0
    assert session.member("logs/part0.log").endswith("\nlate\n")
