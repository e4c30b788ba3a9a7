"""Which line of a person's own code an operator was called from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from traceback import FrameSummary
from types import FrameType
from typing import Any

import torch

import memsave.checkpoint

__all__ = ["persons_line", "torchs_frames", "user_line", "what_to_do"]

_TORCH = str(Path(torch.__file__).parent)
# Frames that are nobody's own code: this package's, whose functions run in operators' places,
# generated ones, the wrapper of a checkpoint.
_HERE = str(Path(__file__).parent) + "/"
# What runs in the hooks of offloading and compression runs within somebody's operator.
_HOOKS = tuple(
    str(Path(memsave.checkpoint.__file__).with_name(name))
    for name in ("offload", "compression", "saved_parameters")
)
_OURS = (_HERE, memsave.checkpoint.__file__, *_HOOKS, "<")
_PACKAGE = str(Path(__file__).parents[1]) + "/"  # membench's, which runs the user's
_ENGINE = str(Path(torch.__file__).parent / "autograd" / "graph.py")  # calls backward
_RECOMPUTATION = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")
_OPTIMIZERS = str(Path(torch.__file__).parent / "optim")


def what_to_do(func: Any) -> str:
    """Return the advice for an operator that asked for a value."""
    if func is torch.ops.aten._pack_padded_sequence.default:
        return (
            "give the layer the padded tensor itself: packed, it would hold no more than that, and "
            "how much less depends on the lengths"
        )
    return "keep .item(), .tolist(), nonzero() and sizes that depend on data out of the step"


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def torchs_frames() -> Iterator[FrameType]:
    """Yield the frames of torch's own Python code from the innermost on, up to a person's own.

    An optimizer's step is no longer what called it: GradScaler is not asked for what that reads.
    """
    for frame in _frames():
        name = frame.f_code.co_filename
        if name.startswith(_OURS):
            continue
        if not name.startswith(_TORCH):
            return
        yield frame
        if name.startswith(_OPTIMIZERS):
            return


def user_line() -> str:
    """``file.py:12`` of the innermost frame that is a person's own, neither torch's nor ours.

    Within backward, "" if none is between the operator and the engine, or the recomputation.
    """
    for frame in _frames():
        name = frame.f_code.co_filename
        if not _is_torchs_or_ours(name):
            return f"{_short(name)}:{frame.f_lineno}"
        if (name == _ENGINE and frame.f_code.co_name == "_engine_run_backward") or (
            name == _RECOMPUTATION and frame.f_code.co_name == "unpack_hook"
        ):
            return ""
    return ""


def persons_line(frames: Sequence[FrameSummary]) -> str:
    """``file.py:12`` of the innermost of an error's frames that is a person's own, "" if none."""
    for frame in reversed(frames):
        if not _is_torchs_or_ours(frame.filename) and not frame.filename.startswith(_PACKAGE):
            return f"{_short(frame.filename)}:{frame.lineno}"
    return ""


@cache
def _is_torchs_or_ours(filename: str) -> bool:
    return filename.startswith((_TORCH, *_OURS))


_shortened: dict[str, str] = {}


def _short(filename: str) -> str:
    """Return the path from the import root, as ``memsave/blocks.py``: the same on every machine."""
    if filename not in _shortened:
        roots = [root for root in sys.path if root and filename.startswith(root.rstrip("/") + "/")]
        root = max(roots, key=len, default="")
        _shortened[filename] = filename[len(root.rstrip("/")) + 1 :] if root else filename
    return _shortened[filename]
