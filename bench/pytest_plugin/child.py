"""The process in which tests are predicted: ``python -m bench.pytest_plugin.child``.

The library that stands in for a GPU must be loaded before torch, and changes what torch says of
the machine: so a test is run here, and never in the user's own pytest process. torch is imported
once; each test then gets a fork of this process to itself, and a pytest with the arguments of the
one that asks. Where processes cannot be forked safely, this one serves a single test.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from bench.predict.tracing_process import become
from bench.serve import serve

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 4096


def main() -> None:
    """Load the tracer that ``MEMBENCH_WORKER_TRACER`` names, then serve tests."""
    tracer = os.environ["MEMBENCH_WORKER_TRACER"]
    become(tracer)
    import torch
    import torch._dynamo  # which optimizers and checkpoints import in the midst of a step

    import bench.pytest_plugin.child_run  # noqa: F401 - all of it, once for all tests

    gc.freeze()  # what was imported stays: a test's collections need not go through it
    hello = {"tracer": tracer, "torch": torch.__version__}
    answer = _in_fork if sys.platform == "linux" else _here
    serve(hello, lambda request: answer(request, tracer))


def _here(request: dict[str, Any], tracer: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="membench-") as folder:
        return _run(request, tracer, Path(folder))


def _in_fork(request: dict[str, Any], tracer: str) -> dict[str, Any]:
    """Run a test in a process of its own, which has torch; say how it ended if it gave nothing."""
    with tempfile.TemporaryDirectory(prefix="membench-") as name:
        folder = Path(name)
        process = os.fork()
        if process == 0:
            _be_child(request, tracer, folder)
        _, status = os.waitpid(process, 0)
        try:
            reply: dict[str, Any] = json.loads((folder / "reply.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"reason": _how_it_ended(status, folder)}
        return reply


def _be_child(request: dict[str, Any], tracer: str, folder: Path) -> None:
    """Run the test, leave the reply in ``folder``, and end; nothing of the parent's is touched."""
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        reply = _run(request, tracer, folder)
        text = json.dumps(reply, default=str)
        (folder / "unfinished.json").write_text(text, encoding="utf-8")
        (folder / "unfinished.json").rename(folder / "reply.json")
        code = 0
    except BaseException:  # the end of this process, whatever the user's conftest raised
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # autograd's thread for the fake cuda:0 may abort the interpreter's own way out
        os._exit(code)


def _how_it_ended(status: int, folder: Path) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        log = (folder / "log.txt").read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        log = ""
    last = next((line.strip() for line in reversed(log.split("\n")) if line.strip()), "")
    return f"{how}{': ' + last[:300] if last else ''}"


def _run(request: dict[str, Any], tracer: str, folder: Path) -> dict[str, Any]:
    """Run pytest for the one test, from where the asking one was started."""
    import pytest

    from bench.pytest_plugin.child_run import ChildRun
    from bench.pytest_plugin.session import CHILD_VARIABLE

    os.environ[CHILD_VARIABLE] = str(os.getpid())
    os.environ.pop("PYTHONPATH", None)
    if request["pythonpath"] is not None:
        os.environ["PYTHONPATH"] = request["pythonpath"]
    os.chdir(request["directory"])
    sys.path[:] = request["sys_path"]
    run = ChildRun(request["test"], tracer, folder)
    # Captured always: what the test prints goes into its report.
    arguments = [
        *request["args"],
        "--capture=fd",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    code = pytest.main(arguments, plugins=[run])
    if not run.reports:
        return {"reason": run.why_no_reports(int(code))}
    return {"reports": run.reports}


if __name__ == "__main__":
    main()
