"""After the benchmarks, and after all else that pytest tells, the table of their ratios."""

from __future__ import annotations

from collections.abc import Generator

import pytest

__all__: list[str] = []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Print the ratios, where there are any, below the benchmarks' own table and the summary."""
    yield
    from tests.benchmarks.side_by_side import TABLE, table_lines

    if TABLE:
        terminalreporter.section("ratios of times, ours to theirs: medians, side by side")
        for line in table_lines():
            terminalreporter.write_line(line)
