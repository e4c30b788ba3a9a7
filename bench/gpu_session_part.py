"""One part of a GPU session: a command in a process group of its own, ended in order.

What ends a part before its time is its limit, or a signal to the session (Ctrl-C, SIGTERM, SIGHUP).
Either way it is first asked as Ctrl-C asks: ``membench run`` then stops with every finished case in
its file, and pytest sums up. What does not end gets SIGTERM, then SIGKILL. A session that is killed
outright takes its part with it.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from bench.serve import die_with_parent

__all__ = ["ROOT", "Outcome", "Part", "Stop", "run_part", "say", "stop_on_signals"]

ROOT = Path(__file__).resolve().parents[1]
_ENDING = ((signal.SIGINT, 0.0), (signal.SIGTERM, 6.0), (signal.SIGKILL, 8.0))
"""What a part is sent, and how many seconds after it has to end."""
_OWN_SHARE = 0.9  # of a part's limit: what a command that keeps to a limit of its own is told
_LOOK_S = 0.1  # between two looks at the clock while a part is silent
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Part:
    """One command of the session. ``keeps_limit``: it takes ``--time-limit`` and goes on later."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    keeps_limit: bool = False

    def within(self, limit_s: float) -> Part:
        """Return the part told to end by itself before its limit, where it can."""
        if not self.keeps_limit:
            return self
        own = str(max(1, int(limit_s * _OWN_SHARE)))
        return replace(self, command=(*self.command, "--time-limit", own))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended. ``exit_code`` below 0: ended by that signal. ``reason``: "" if it passed.

    The reason is what ended it and the last line that it printed.
    """

    name: str
    exit_code: int
    seconds: float
    reason: str = ""


@dataclass(slots=True)
class Stop:
    """Which signal asked the session to end, None while none has."""

    signal: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; the session ends its part when it next looks."""
        if self.signal is None:
            self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Have signals remembered instead of ending this process; one that is ignored stays ignored."""
    stop = Stop()
    caught = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, stop)) for number in caught]
    try:
        yield stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def run_part(
    part: Part,
    log: Path,
    limit_s: float | None = None,
    stop: Stop | None = None,
    root: Path = ROOT,
) -> Outcome:
    """Run a command in ``root``, its output both here and in ``log``; end it as the module says."""
    began = time.monotonic()
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    process = subprocess.Popen(
        part.command,
        cwd=root,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_before_its_program,
    )
    ending = _Ending(process, None if limit_s is None else began + limit_s, stop or Stop())
    try:
        _copy_output(process, log, ending)
        while process.poll() is None:  # it has closed its output and goes on
            ending.look()
            time.sleep(_LOOK_S)
    finally:
        with suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = round(time.monotonic() - began, 1)
    return Outcome(part.name, process.returncode, seconds, _reason(process, ending, log, limit_s))


def _reason(
    process: subprocess.Popen[bytes], ending: _Ending, log: Path, limit_s: float | None
) -> str:
    """Say in a line why a part has not passed, "" where it has."""
    code = process.returncode
    if code == 0:
        return ""
    if ending.cause == "limit":
        how = f"ended at its limit of {limit_s:g} s"
    elif ending.cause:
        how = f"ended by the session's {ending.cause}"
    else:
        how = f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"
    last = _last_line(log)
    return f"{how}: {last}" if last else how


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


def _before_its_program() -> None:
    """Run in the new process: Ctrl-C reaches it even where a background job ignores that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


class _Ending:
    """Asks a part to end, ever harder, from its deadline or a signal on."""

    def __init__(
        self, process: subprocess.Popen[bytes], deadline: float | None, stop: Stop
    ) -> None:
        self._process, self._deadline, self._stop = process, deadline, stop
        self._since: float | None = None
        self.cause = ""  # "limit", or the name of the session's signal; "" where it ends by itself
        self._left = list(_ENDING)

    def look(self) -> None:
        """Send what is due by now."""
        now = time.monotonic()
        late = self._deadline is not None and now >= self._deadline
        if self._since is None and (late or self._stop.signal is not None):
            self._since = now
            number = self._stop.signal
            self.cause = "limit" if number is None else _signal_name(number)
        while self._since is not None and self._left and now >= self._since + self._left[0][1]:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, self._left.pop(0)[0])


def _copy_output(process: subprocess.Popen[bytes], log: Path, ending: _Ending) -> None:
    """Copy what a part prints until it ends, even if what it has left behind keeps its pipe."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    assert process.stdout is not None
    with process.stdout, log.open("wb") as file:
        while True:
            ending.look()
            ended = process.poll() is not None
            if select.select([process.stdout], [], [], _LOOK_S)[0]:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return
                file.write(chunk)
                say(decoder.decode(chunk), end="")
            elif ended:
                return


def say(text: str, end: str = "\n") -> None:
    """Print, as long as somebody listens: a closed terminal or pipe must not end the session."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
