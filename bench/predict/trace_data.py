"""A trace as text, so that the child process that made it can hand it to the one that asked.

Pickled, and only ever between a process and the child that it started itself: whatever an event
holds arrives as it was.
"""

from __future__ import annotations

import base64
import pickle
import zlib

from bench.predict.step_trace import Trace

__all__ = ["decode_trace", "encode_trace"]

_LEVEL = 1  # events repeat: the least effort makes a tenth of them


def encode_trace(trace: Trace) -> str:
    """Return ``trace`` for ``decode_trace``."""
    return base64.b64encode(zlib.compress(pickle.dumps(trace, protocol=5), _LEVEL)).decode("ascii")


def decode_trace(text: str) -> Trace:
    """Return the trace that ``encode_trace`` was given."""
    trace = pickle.loads(zlib.decompress(base64.b64decode(text)))
    assert isinstance(trace, Trace)
    return trace
