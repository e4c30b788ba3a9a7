"""After the benchmarks, the table of the ratios that they measured."""

from __future__ import annotations

import pytest

__all__: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ratios, where there are any."""
    from tests.benchmarks.side_by_side import TABLE, table_lines

    if TABLE:
        terminalreporter.section("ratios of times, ours to theirs: medians, side by side")
        for line in table_lines():
            terminalreporter.write_line(line)
