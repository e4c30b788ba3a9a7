"""The plans that are kept: ``python -m bench.plan_session [CARD ...]``.

For each card ``membench plan`` searches what makes the FCN's largest volume fit it. The answer goes
into ``results/plans/<card>.json``, the suite of its best proposals into ``<card>.yaml`` beside it,
and the report of all that lie there into ``reports/plans.md``. The rows of the README's table come
last, to be put there. All of it is predicted: no GPU is used. A card takes minutes.

Exit code 0: done; 1: a search failed, and those of the cards before it are kept; 2: the arguments
are wrong, or a file cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.environment import read_environment
from bench.errors import MembenchError
from bench.plan.stored import StoredPlan, read_plans, stored_plan, write_plan
from bench.predict.cards import Card, find_card
from bench.predict.shim import choose_tracer
from bench.report.markdown import write_files
from bench.report.plans import FILE_NAME, SHOWN, plans_markdown, readme_rows

__all__ = ["ASKED", "CARDS", "main", "search"]

CARDS = ("rtx4060-8gb", "rtx4070ti-12gb", "rtxa4000-16gb", "rtx4090-24gb", "rtx5090-32gb")
ASKED = ("plan", "--network", "fcn", "--shape", "256x256x234", "--allow-architecture")
"""What is asked of each card; the paper's own answer for 24 GB is another architecture."""


class _SearchError(MembenchError):
    """``membench plan`` ended without an answer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Search for the cards, write the report, print the README's rows; return the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        cards = [] if chosen.report_only else [find_card(name) for name in chosen.cards or CARDS]
        for card in cards:
            path = write_plan(chosen.plans, search(card, chosen.plans))
            print(f"plan: {path}", flush=True)
        plans = read_plans(chosen.plans)
        write_files(chosen.output, {FILE_NAME: plans_markdown(plans).encode()})
    except _SearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {chosen.output / FILE_NAME}")
    print("\n".join(readme_rows(plans)))
    return 0


def search(card: Card, folder: Path, asked: Sequence[str] = ASKED) -> StoredPlan:
    """Run ``membench plan`` for ``card``, with a suite of its best written into ``folder``.

    Errors: MembenchError where the folder cannot be made, and where the command has no answer.
    """
    command = (*asked, "--card", card.name, "--json")
    written = ("--write-suite", str(folder / f"{card.name}.yaml"), "--best", str(SHOWN))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MembenchError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    environment = read_environment()  # of the start: the source may change while it searches
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command, *written],
        stdout=subprocess.PIPE,  # what it says beside its answer is for people, as it comes
        text=True,
        check=False,
    )
    # 1 is an answer where nothing fits, and Python's own where the command crashed.
    if done.returncode not in (0, 1) or not done.stdout.startswith("["):
        raise _SearchError(f"membench {' '.join(command)} ended with {done.returncode}")
    tracer, _ = choose_tracer()
    return stored_plan(command, card, tracer, environment, json.loads(done.stdout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan_session", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("cards", nargs="*", metavar="CARD", help=f"default: {' '.join(CARDS)}")
    add("--plans", type=Path, default=Path("results/plans"), help="folder of plans (%(default)s)")
    add("-o", "--output", type=Path, default=Path("reports"), help="folder of reports")
    add("--report-only", action="store_true", help="search nothing, report what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
