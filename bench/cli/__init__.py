"""The command line ``membench``: one file per command, each reads, calls and prints."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, cast

import typer

from bench import __version__
from bench.cli.console import is_terminal

__all__ = ["app", "main"]

app = typer.Typer(
    name="membench",
    help="GPU memory benchmarks for 3D networks: measured on a GPU, predicted without one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Its boxes fold an error at 80 columns when piped.
    rich_markup_mode="rich" if is_terminal(sys.stderr) else None,
)


def _version(value: bool) -> None:
    if value:
        print(f"membench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _register() -> None:
    """Add every command, in the order of ``membench --help``."""
    from bench.cli.baseline import baseline
    from bench.cli.calibrate import calibrate
    from bench.cli.check import check
    from bench.cli.compare import compare
    from bench.cli.doctor import doctor
    from bench.cli.explain import explain
    from bench.cli.fidelity import fidelity
    from bench.cli.infer import infer
    from bench.cli.list import list_
    from bench.cli.max_shape import max_shape
    from bench.cli.parity import parity
    from bench.cli.plan import plan
    from bench.cli.predict import predict
    from bench.cli.replay import replay
    from bench.cli.report import report
    from bench.cli.run import run
    from bench.cli.schema import schema
    from bench.cli.score import score
    from bench.cli.trace import trace
    from bench.cli.train import train

    app.command()(run)
    app.command()(predict)
    app.command()(plan)
    app.command("max-shape")(max_shape)
    app.command()(report)
    app.command()(check)
    app.command()(baseline)
    app.command()(compare)
    app.command()(explain)
    app.command("list")(list_)
    app.command()(trace)
    app.command()(replay)
    app.command()(infer)
    app.command()(parity)
    app.command()(score)
    app.add_typer(train)
    app.command()(calibrate)
    app.command()(fidelity)
    app.command()(doctor)
    app.command()(schema)


_register()

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _say_full(error: OSError) -> None:
    """Say in one line that a disk is full, and let nothing be written to it at the end."""
    where = error.filename or "the output"
    print(
        f"error: cannot write {where}: {error.strerror}; make room and run the command again",
        file=sys.stderr,
    )
    # Python would try once more to write what is left in its buffer, and end with 120.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> None:
    """Run the command line; the entry point of the script ``membench``."""
    # UsageError: typer has it from click, or its own copy, and exports this one kind of it.
    usage_error = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except usage_error as error:
        # Typer would print how to call the command first: the one line would be the last of four.
        command = error.ctx.command_path if error.ctx is not None else "membench"
        line = " ".join(error.format_message().split())
        print(f"error: {line} (see {command} --help)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _say_full(error)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
