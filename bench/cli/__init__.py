"""The command line ``membench``: one file per command, each reads, calls and prints."""

from __future__ import annotations

import sys
from typing import Annotated

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
    from bench.cli.doctor import doctor
    from bench.cli.infer import infer
    from bench.cli.list import list_
    from bench.cli.replay import replay
    from bench.cli.report import report
    from bench.cli.run import run
    from bench.cli.schema import schema

    app.command()(run)
    app.command()(report)
    app.command("list")(list_)
    app.command()(replay)
    app.command()(infer)
    app.command()(doctor)
    app.command()(schema)


_register()


def main() -> None:
    """Run the command line; the entry point of the script ``membench``."""
    app()
