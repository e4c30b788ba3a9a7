"""What is not a YAML mapping: one line that names the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.suite_files import GOOD, load, refusal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is empty; a suite needs a title and a matrix"),
        ("# nothing\n\n", " is empty; a suite needs a title and a matrix"),
        ("hello", "line 1: a suite is a mapping (title: ...), not 'hello'"),
        ("- a\n- b\n", "line 1: a suite is a mapping (title: ...), not a list"),
        (
            "title: [a\n",
            (
                "line 2: not YAML: while parsing a flow sequence, expected ',' or ']', "
                "but got '<stream end>'"
            ),
        ),
        (
            "title: T\n\tx: 1\n",
            (
                "line 2: not YAML: while scanning for the next token, "
                "found character '\\t' that cannot start any token"
            ),
        ),
        (b"title: T\nx: \xff\n", "line 2: not UTF-8 text"),
        ("title: T\nx: \x00\n", "line 2: not YAML: a control character"),
        (
            "a: 1\n---\nb: 2\n",
            (
                "line 2: not YAML: expected a single document in the stream, "
                "but found another document"
            ),
        ),
        ("\ntitle: " + "[" * 16, "line 2: not YAML: nested more than 16 levels deep"),
        ("title: " + "[" * 5000, "line 1: not YAML: nested more than 16 levels deep"),
        ("a: &a [1]\nb: *a\n", "line 2: not YAML: aliases are not read here"),
        (
            "a: !!python/object:os.system x\n",
            "line 1: the tag 'tag:yaml.org,2002:python/object:os.system' is not read here",
        ),
        ("a: !own [1]\n", "line 1: the tag '!own' is not read here"),
        ("? [a]\n: 1\n", "line 1: a key must be text, not a list or a mapping"),
        ("a:\n  b: 1e999\n", "line 2: 1e999 is too large for a number"),
        (
            "title: T\ncard: c\ntitle: U\n",
            "line 3: key 'title' stands here and at line 1 already",
        ),
        ("#" * 262_145, " has 262145 bytes, over the limit of 262144"),
    ],
)
def test_what_is_not_a_yaml_mapping(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path, content) == message


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.ljust(262_143, "#") + "\n").title == "Two rows"


def test_an_alias_bomb_is_refused_at_its_first_alias(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert refusal(tmp_path, bomb) == "line 2: not YAML: aliases are not read here"
