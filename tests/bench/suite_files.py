"""A good suite file for tests to spoil, and what loading a spoilt one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import SuiteError
from bench.suite import Suite, load_suite

__all__ = ["GOOD", "load", "refusal", "with_row", "with_shape"]

GOOD = """\
title: Two rows
card: v100-32gb
matrix:
  networks:
    - {name: fcn, variant: baseline}
    - {name: fcn, variant: small, block: ccblock}
  shapes:
    - 96x96x96
    - {shape: 64x64x45, pad: true}
"""


def load(folder: Path, content: str) -> Suite:
    """Load ``content`` from a file ``s.yaml`` in ``folder``."""
    (folder / "s.yaml").write_text(content)
    return load_suite(str(folder / "s.yaml"))


def refusal(folder: Path, content: str | bytes) -> str:
    """Return the one line that loading ``content`` ends in, less the file it begins with."""
    path = folder / "s.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SuiteError) as error:
        load_suite(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).removeprefix(", ")


def with_row(options: str) -> str:
    """Return the good suite with other options in its second row, at line 6."""
    return GOOD.replace("block: ccblock", options)


def with_shape(shape: str) -> str:
    """Return the good suite with another first shape, at line 8."""
    return GOOD.replace("- 96x96x96", f"- {shape}")
