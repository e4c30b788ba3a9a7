"""Widths: rules by name, or lists."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from memsave.errors import MemsaveError, OptionError, UnknownNameError
from memsave.widths import doubling, pocket, resolve_widths


def test_rules() -> None:
    assert doubling(64, 4) == (64, 128, 256, 512)
    assert pocket(16, 5) == (16, 16, 16, 16, 16)


def test_names_and_lists_resolve() -> None:
    assert resolve_widths("doubling") == (64, 128, 256, 512)
    assert resolve_widths("pocket", 16, 3) == (16, 16, 16)
    assert resolve_widths([8, 24], 8, 2) == (8, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doubling", 0), "base_width must be an integer of 1 or more, got 0"),
        (("doubling", 8, 0), "levels must be an integer of 1 or more, got 0"),
        (("doubling", 8, 2.5), "levels must be .* got 2.5"),
        (([],), r"a rule's name or a list of channels, got \[\]"),
        ((7,), "a rule's name or a list of channels, got 7"),
        (([8, -1],), "each of widths must be an integer of 1 or more, got -1"),
        (([8, "16"],), "each of widths must be .* got '16'"),
        (([8, 16], None, 3), r"levels is 3, but widths \[8, 16\] has 2"),
        (([8, 16], 16), r"base_width is 16, but widths \[8, 16\] starts otherwise"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_widths(*arguments)


def test_an_unknown_rule_is_refused_with_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown widths 'pockets' .*'pocket'") as raised:
        resolve_widths("pockets")
    assert isinstance(raised.value, MemsaveError)
    # A worker process sends its errors home.
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
