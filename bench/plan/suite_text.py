"""A plan's proposals as a suite file, which ``membench run`` measures or predicts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.imported import parse_input
from bench.plan.search import Proposal
from bench.shapes import format_shape

__all__ = ["check_writable", "suite_text", "write_suite"]


def check_writable(path: Path) -> None:
    """Refuse a path that ``write_suite`` could not write, before minutes are spent on a search.

    Errors: MembenchError where its folder is not there, or it is no file that may be written.
    """
    folder = path.parent
    if not folder.is_dir():
        why = f"{folder} is no folder; make it first"
    elif path.is_dir():
        why = "it is a folder; name a file in it"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "it may not be written; name another file"
    else:
        return
    raise MembenchError(f"cannot write the suite {path}: {why}")


def write_suite(path: Path, proposals: Sequence[Proposal], card: str | None, title: str) -> None:
    """Write ``suite_text`` to ``path``.

    Errors: MembenchError where a suite cannot hold the network, or the file cannot be written.
    """
    text = suite_text(proposals, card, title)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MembenchError(
            f"cannot write the suite {path}: {error.strerror or error}; name another file"
        ) from None


def suite_text(proposals: Sequence[Proposal], card: str | None, title: str) -> str:
    """Return a suite whose cases are the proposals', each a row of its own.

    Errors: MembenchError for a network that takes more than one plain image, which a suite cannot
    say.
    """
    import yaml

    first = proposals[0].case
    optimizer: Any = {"name": first.optimizer, **first.optimizer_options}
    suite: dict[str, Any] = {"title": title}
    if card is not None:
        suite["card"] = card
    suite["training"] = {"loss": first.loss, "optimizer": optimizer, "steps": first.steps}
    suite["matrix"] = {
        "networks": [_row(proposal.case, first) for proposal in proposals],
        "shapes": [{"shape": format_shape(first.requested_shape), "pad": True}],
        "batch": [first.batch_size],
        "mode": [first.mode],
    }
    head = (
        "# Written by membench plan: its best proposals, the best first. Run: membench run FILE\n"
    )
    copied = json.loads(json.dumps(suite))  # no list twice: YAML would write an alias
    return head + str(yaml.safe_dump(copied, sort_keys=False))


def _row(case: Case, first: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"name": case.network, "variant": case.variant}
    if case.imported is not None:
        row = {"name": case.network, "variant": case.variant, "network": _imported(case)}
    row["precision"] = case.precision
    if case.requested_shape != first.requested_shape:  # of plans for patches
        row["shapes"] = [{"shape": format_shape(case.requested_shape), "pad": True}]
    if case.techniques:
        row["techniques"] = [{"name": use.name, **use.options} for use in case.techniques]
    return {**row, **({} if case.imported is not None else case.network_options)}


def _imported(case: Case) -> dict[str, Any]:
    given = case.imported
    assert given is not None
    specs = [parse_input(text) for text in given.inputs]
    plain = not specs or (len(specs) == 1 and specs[0].dtype == "float32")
    if not plain or given.target is not None or given.pickled or len(case.shape) not in (2, 3):
        raise MembenchError(
            f"network {given.reference!r} cannot stand in a suite: a suite gives one float32 image "
            "of two or three sides; leave out --write-suite"
        )
    network: dict[str, Any] = {"import": given.reference}
    if given.arguments:
        network["arguments"] = given.arguments
    network["in_channels"] = specs[0].shape[1] if specs else given.in_channels
    if given.classes is not None:
        network["classes"] = given.classes
    return network
