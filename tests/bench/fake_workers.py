"""Child processes that misbehave on request: ``python -m tests.bench.fake_workers``.

The case's variant says what to do with it, so that the runner is tested against real crashes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from bench.errors import MembenchError
from bench.serve import serve

GIB = 2**30
READINGS = {"status": "ok", "reason": "", "process_bytes": 3 * GIB, "peak_reserved_bytes": 2 * GIB}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    behaviour = request["case"]["variant"]
    if behaviour.startswith("sleep"):
        time.sleep(float(behaviour.removeprefix("sleep")))
    elif behaviour == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    elif behaviour == "start":
        return {**READINGS, "notes": [str(subprocess.Popen(["sleep", "100"]).pid)]}
    elif behaviour == "fork-SIGSEGV":
        if os.fork() == 0:
            time.sleep(100)  # with all of its parent's pipes open
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "close-pipe":
        os.closerange(3, 100)
        time.sleep(100)
    elif behaviour == "exit":
        print("the last words", file=sys.stderr)
        os._exit(3)
    elif behaviour.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, behaviour))
    elif behaviour == "bug":
        raise RuntimeError("two\nlines")
    elif behaviour == "user-error":
        raise MembenchError("nothing to be done")
    elif behaviour == "chatty":
        print("this goes to stderr")
        sys.stdout.flush()
        os.write(1, b"and so does this\n")
    elif behaviour == "oom":
        return {"status": "oom", "reason": "needs 40.0 GiB", "needs_bytes": 40 * GIB}
    return {**READINGS, "notes": [f"pid {os.getpid()}"]}


if __name__ == "__main__":
    if os.environ.get("FAKE_WORKER_FAILS"):
        sys.exit("cannot start")
    serve({"torch": "9.9.9", "unknown": 1}, answer)
