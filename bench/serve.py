"""The child's side of a run: cases in on stdin, readings out on what was stdout, a line each.

Everything else that the process prints (a network's own ``print``, warnings) goes to stderr,
so it cannot be mistaken for a reply.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from bench.errors import MembenchError

__all__ = ["die_with_parent", "serve"]

_PR_SET_PDEATHSIG = 1
_TRACING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "predict", "tracer.py")


def serve(hello: dict[str, Any], handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until stdin closes. A request that fails is answered with its reason."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    die_with_parent()
    _send(replies, hello)
    for line in sys.stdin:
        _send(replies, _answer(json.loads(line), handle))


def _answer(
    request: dict[str, Any], handle: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    try:
        return handle(request)
    except MembenchError as error:
        return {"status": "failed", "reason": " ".join(str(error).split())}
    except Exception as error:
        # The process boundary: a network of the user's may raise anything, and the other cases
        # go on. The traceback is kept on stderr, the record keeps the line.
        traceback.print_exc()
        return {"status": "failed", "reason": _one_line(error)}


def _one_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    # The line that called torch says more than the one within torch that refused.
    frame = next((f for f in reversed(frames) if not _is_inner(f.filename)), None)
    frame = frame or (frames[-1] if frames else None)
    where = f" ({os.path.basename(frame.filename)}:{frame.lineno})" if frame else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"


def _is_inner(filename: str) -> bool:
    """Whether a file is torch's, or the tracer's, through which torch's operators are called."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    inner = [_TRACING, *([os.path.dirname(torch) + os.sep] if torch else [])]
    return filename.startswith((*inner, "<"))


def _send(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def die_with_parent() -> None:
    """Have this process killed with its parent, which must not leave one that holds a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
