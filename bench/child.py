"""The parent's side of a run: a child process that is asked one case after another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.errors import MembenchError

__all__ = ["Child", "ChildCrashError", "ChildTimeoutError"]

_START_LIMIT_S = 300.0  # torch's import from a cold network disk
_FINISH_LIMIT_S = 10.0
_WAIT_S = 1.0  # of one select; then a look whether the child still lives
_SOURCE_ROOT = Path(__file__).resolve().parent.parent


class ChildCrashError(MembenchError):
    """The child ended without an answer; the message says how."""


class ChildTimeoutError(MembenchError):
    """The child did not answer in time and was killed."""


class Child:
    """A process that runs ``python -m module`` and speaks ``bench.serve``'s protocol.

    ``hello`` is what the child said of itself when it was ready. It leads a process group of its
    own, which ends with it: what a network starts (workers, a shell) may hold a GPU too.
    """

    def __init__(self, module: str, environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._unread = b""
        self._closed = False
        path = os.pathsep.join(p for p in (str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the parent, which ends the child in order
        )
        try:
            self.hello = self._read_reply(_START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id, as this process knows it."""
        return self._process.pid

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send one request and return its reply.

        Raises ChildTimeoutError after ``limit_s``, ChildCrashError when the child ends first; the
        child is gone after either.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._crashed() from None
        return self._read_reply(limit_s)

    def finish(self) -> None:
        """Let an idle child end by itself, and end it if it does not."""
        if self._process.stdin is not None and self._process.poll() is None:
            try:
                self._process.stdin.close()
                self._process.wait(_FINISH_LIMIT_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass  # close() ends it
        self.close()

    def close(self) -> None:
        """End the child and all that it started, whatever they are doing."""
        if self._closed:
            return
        self._closed = True
        self._end_group()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # bytes that a dead child won't read
                    stream.close()
        self._log.close()

    def _end_group(self) -> None:
        """Kill every process of the child's group: what it started may outlive it otherwise."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_reply(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self.close()
                raise ChildTimeoutError(f"no answer within its time limit of {limit_s:g} s")
            if not select.select([descriptor], [], [], min(remaining, _WAIT_S))[0]:
                if self._process.poll() is not None:  # what it forked keeps the pipe open
                    raise self._crashed()
                continue
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                raise self._crashed()
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _crashed(self) -> ChildCrashError:
        try:
            code = self._process.wait(_FINISH_LIMIT_S)
        except subprocess.TimeoutExpired:  # it has closed its replies and lives on
            self.close()
            return ChildCrashError("process closed the pipe of its replies and did not end")
        if code < 0:
            try:
                how = f"killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"killed by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        last = self._last_words()
        self.close()
        return ChildCrashError(f"process {how}{': ' + last if last else ''}")

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
