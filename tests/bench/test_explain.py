"""Who holds the bytes, and who holds more of them: exact sums, and lines that only moved."""

from __future__ import annotations

from typing import Any

from bench.explain import Change, Share, explain_growth, growth_text, held_by, signed_bytes
from bench.record import Holder

MIB = 2**20


def holder(size: int, **fields: Any) -> Holder:
    values: dict[str, Any] = {
        "module": "encoder.0",
        "operator": "aten.convolution.default",
        "source_line": "net.py:10",
        "category": "activation",
    } | fields
    return Holder(bytes=size, **values)


def test_what_is_held_adds_up_along_each_axis_largest_first() -> None:
    holders = [
        holder(3),
        holder(5, module="head", source_line="net.py:12"),
        holder(4, module="head", category="optimizer_state", operator="aten.zeros_like.default"),
        holder(1, module="", source_line=""),
    ]
    assert held_by(holders, "category") == [Share("activations", 9), Share("optimizer state", 4)]
    assert held_by(holders, "module") == [
        *(Share("head", 9), Share("encoder.0", 3), Share("(no module)", 1)),
    ]
    assert held_by(holders, "operator") == [
        *(Share("aten.convolution.default", 9), Share("aten.zeros_like.default", 4)),
    ]
    assert held_by(holders, "line") == [
        *(Share("net.py:10", 7), Share("net.py:12", 5), Share("(no line)", 1)),
    ]


def test_growth_is_named_along_each_axis_largest_first_and_losses_last() -> None:
    before = [holder(10), holder(20, module="head", category="temporary")]
    after = [
        holder(13),
        holder(7, module="encoder.1", operator="aten.clone.default", source_line="net.py:40"),
        holder(15, module="head", category="temporary"),
    ]
    growth = explain_growth(before, after)
    assert (growth.known, growth.before_bytes, growth.after_bytes) == (True, 30, 35)
    assert growth.by_module == (
        *(Change("encoder.1", 0, 7), Change("encoder.0", 10, 13), Change("head", 20, 15)),
    )
    assert growth.by_category == (Change("activations", 10, 20), Change("temporaries", 20, 15))
    assert growth.by_operator == (
        *(Change("aten.clone.default", 0, 7), Change("aten.convolution.default", 30, 28)),
    )
    assert growth.by_line == (Change("net.py:40", 0, 7), Change("net.py:10", 30, 28))
    assert growth.to_dict()["by_module"][0] == {
        "name": "encoder.1",
        "before_bytes": 0,
        "after_bytes": 7,
        "growth_bytes": 7,
    }


def test_along_every_axis_the_changes_add_up_to_the_growth() -> None:
    before = [holder(10), holder(4, source_line="a.py:1"), holder(9, module="gone")]
    after = [holder(13, source_line="net.py:11"), holder(6, operator="new"), holder(1, module="n")]
    growth = explain_growth(before, after)
    for axis in ("category", "module", "operator", "line"):
        changes = growth.by(axis)
        assert sum(change.growth_bytes for change in changes) == 20 - 23


def test_lines_that_only_moved_are_no_growth() -> None:
    before = [holder(10, source_line="net.py:93"), holder(20, source_line="net.py:95")]
    after = [holder(10, source_line="net.py:95"), holder(20, source_line="net.py:97")]
    growth = explain_growth(before, after)
    assert growth.by_line == ()
    assert growth_text(growth) == "  the holders at both peaks are the same"


def test_a_line_that_moved_and_grew_is_shown_where_it_stands_now() -> None:
    growth = explain_growth([holder(10, source_line="n.py:9")], [holder(15, source_line="n.py:11")])
    assert growth.by_line == (Change("n.py:11", 10, 15),)


def test_a_line_added_between_two_that_moved_is_the_one_that_grew() -> None:
    """One module's operator at two lines, then at three: equal bytes are the same ones."""
    before = [holder(10, source_line="n.py:9"), holder(20, source_line="n.py:10")]
    after = [
        *(holder(10, source_line="n.py:12"), holder(5, source_line="n.py:13")),
        holder(20, source_line="n.py:100"),
    ]
    assert explain_growth(before, after).by_line == (Change("n.py:13", 0, 5),)


def test_without_holders_on_a_side_nobody_is_accused() -> None:
    for before, after in (([], [holder(5)]), ([holder(5)], []), ([], [])):
        growth = explain_growth(before, after)
        assert not growth.known
        assert growth.by_module == ()
        assert "measured records have none" in growth_text(growth)


def test_the_text_names_the_largest_and_counts_the_others() -> None:
    before = [holder(2 * MIB, module="head")]
    after = [holder((n + 1) * MIB, module=f"m{n}", source_line="") for n in range(4)]
    text = growth_text(explain_growth(before, after), top=2)
    assert "  by module\n    +4 MiB  m3  (0 B -> 4 MiB)\n    +3 MiB  m2  (0 B -> 3 MiB)\n" in text
    assert "    +3 MiB in 2 more\n    less: -2 MiB  head\n" in text
    assert "  by category\n    +8 MiB  activations  (2 MiB -> 10 MiB)\n" in text


def test_a_category_of_a_later_version_keeps_its_name() -> None:
    assert held_by([holder(1, category="cache")], "category") == [Share("cache", 1)]


def test_bytes_carry_their_sign() -> None:
    assert [signed_bytes(n) for n in (MIB, 0, -3)] == ["+1 MiB", "0 B", "-3 B"]
