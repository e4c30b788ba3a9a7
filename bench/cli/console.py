"""Where the commands print, and the one boundary at which an error becomes a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TextIO

import typer
from rich.console import Console
from rich.markup import escape

from bench.errors import MembenchError

__all__ = ["err", "is_terminal", "out", "user_errors"]

_PIPED_WIDTH = 400  # no table of ours is wider; rich would otherwise fold at 80 columns


def is_terminal(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal; a standard stream that is closed is None in Python."""
    return stream is not None and stream.isatty()


@cache
def out() -> Console:
    """Return the console on stdout: results. Never folded when piped."""
    return Console(width=None if is_terminal(sys.stdout) else _PIPED_WIDTH, highlight=False)


@cache
def err() -> Console:
    """Return the console on stderr: progress and errors."""
    return Console(stderr=True, highlight=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a MembenchError into one line and exit code 2; let bugs keep their traceback."""
    try:
        yield
    except MembenchError as error:
        line = " ".join(str(error).split())
        err().print(f"[red]error:[/red] {escape(line)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err().print("interrupted", soft_wrap=True)
        raise typer.Exit(130) from None
