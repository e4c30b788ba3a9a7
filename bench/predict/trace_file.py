"""Memory traces from files: PyTorch's snapshot pickles, and traces reduced to numbers.

A snapshot is what ``torch.cuda.memory._dump_snapshot`` writes after
``torch.cuda.memory._record_memory_history``; it is read without torch. A reduced trace is JSON
with ``segments_at_start`` [address, size, stream, pool], ``blocks_at_start`` [address, size],
``events`` and ``expected``. Both may be gzipped.

Files are not trusted: the unpickler makes plain containers and nothing else, and memory is
limited in proportion to the file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.errors import MembenchError
from bench.predict.reduced_trace import reduced_trace
from bench.predict.snapshot import snapshot_trace
from bench.predict.trace import Trace, TraceFormatError
from bench.units import GIB, format_bytes

__all__ = ["read_trace"]

_MAX_FILE_BYTES = 4 * GIB
_GZIP = b"\x1f\x8b"
_MEMORY_PER_FILE_BYTE = 64  # a dict entry of two small ints is 5 bytes of pickle and 100 of memory
_MEMORY_AT_LEAST_BYTES = GIB


class _ForbiddenClassError(Exception):
    """The pickle wants something imported."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes None, numbers, strings, lists, tuples, dicts and sets. Imports nothing."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise _ForbiddenClassError(f"{module_name}.{global_name}")


class _Reader:
    """The least that an unpickler reads from. With ``readinto``, CPython 3.11 prints an error of
    its own when a byte array is too large to be made.
    """

    def __init__(self, content: bytes) -> None:
        file = io.BytesIO(content)
        self.read = file.read
        self.readline = file.readline


def read_trace(path: Path, device: int | None = None) -> Trace:
    """Read the trace in ``path``; of several devices, ``device`` or the one with most events.

    Errors: MembenchError naming the file when it cannot be read, is neither kind of trace, asks
    for a class, is cut off, has no such device, or holds no recorded events.
    """
    data = _load(path)
    if not isinstance(data, dict):
        raise _not_a_trace(path, f"it holds a {type(data).__name__}, not a dict")
    try:
        if "device_traces" in data or "segments" in data:
            return snapshot_trace(data, device)
        if "events" in data:
            return reduced_trace(data, device)
    except TraceFormatError as error:
        raise MembenchError(f"cannot replay {path}: {error}") from None
    raise _not_a_trace(path, "it has neither 'segments' with 'device_traces' nor 'events'")


def _load(path: Path) -> Any:
    content = _content(path)
    if not content:
        raise _not_a_trace(path, "it is empty")
    if content.lstrip()[:1] in (b"{", b"["):
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _not_a_trace(path, f"it looks like JSON but is not: {error}") from None
    try:
        with _memory_limit(len(content)):
            return _PlainUnpickler(_Reader(content)).load()
    except _ForbiddenClassError as error:
        raise MembenchError(
            f"{path} is refused: its pickle asks for {error}, and a memory snapshot holds plain "
            "containers only; do not load this file with anything else either"
        ) from None
    except MemoryError:
        raise _not_a_trace(path, "its pickle asks for absurd amounts of memory") from None
    except EOFError:
        raise _not_a_trace(path, "its pickle is cut off") from None
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        text = " ".join(str(error).split())
        why = "its pickle is cut off" if "truncated" in text else f"no pickle: {text}"
        raise _not_a_trace(path, why) from None


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise MembenchError(
                f"{path} is too large: {format_bytes(size)}, at most "
                f"{format_bytes(_MAX_FILE_BYTES)}; record with a smaller max_entries"
            )
        content = path.read_bytes()
    except OSError as error:
        raise MembenchError(f"cannot read trace {path}: {error.strerror}") from None
    if not content.startswith(_GZIP):
        return content
    limit = min(max(1000 * len(content), 1 << 20), _MAX_FILE_BYTES)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            plain = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _not_a_trace(path, f"its gzip data is damaged: {error}") from None
    if len(plain) > limit:
        raise _not_a_trace(path, f"it unpacks to more than {format_bytes(limit)}")
    return plain


def _not_a_trace(path: Path, why: str) -> MembenchError:
    return MembenchError(
        f"{path} is not a memory trace: {why}; give a pickle of "
        "torch.cuda.memory._dump_snapshot or a reduced trace (JSON)"
    )


@contextmanager
def _memory_limit(file_bytes: int) -> Iterator[None]:
    """Let a pickle of ``file_bytes`` use memory in proportion; a few bytes can ask for gigabytes.

    Where the system has no such limit, nothing is limited.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = max(_MEMORY_PER_FILE_BYTE * file_bytes, _MEMORY_AT_LEAST_BYTES)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + allowed
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
