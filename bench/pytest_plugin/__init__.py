"""Limits on peak GPU memory in users' own tests: a marker, a fixture and a baseline for pytest.

``@pytest.mark.limit_gpu_memory("2.3 GiB")`` fails a test whose peak goes over; the ``gpu_memory``
fixture gives the peak to the test itself; ``--membench-baseline FILE`` fails a test whose peak
grew. Where there is a GPU peaks are measured, around the test. Where there is none the test is run
again by its node id in a child process, on fake tensors, and its peak is predicted for a card: the
outcome here is the child's. Every line that gives a figure says which of the two it is.

pytest loads this with every run of whoever installed membench: nothing here imports torch, and
the modules beside it are imported with the first test that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.pytest_plugin.fixture import GpuMemory
    from bench.pytest_plugin.session import MemorySession

__all__ = [
    "gpu_memory",
    "memory_session",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_runtest_setup",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_unconfigure",
]

_MARKER = "limit_gpu_memory"
_FIXTURE = "gpu_memory"
_SYS_PATH = list(sys.path)
_KEY = pytest.StashKey["MemorySession"]()
_OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("baseline", "", {"metavar": "FILE"}, "hold each test's peak against FILE; see its update"),
    ("tolerance", "1%", {"metavar": "SIZE"}, "how much a peak may grow: 1%, 5MiB or 0"),
    ("card", "", {"metavar": "CARD"}, "predict for this card where there is no GPU (v100-32gb)"),
    ("device", "auto", {"choices": ("auto", "cuda", "predict")}, "measure on a GPU, or predict"),
    ("most", "10", {"metavar": "N"}, "how many tests the summary lists, the largest first"),
    (
        "allow-different",
        "",
        {"metavar": "FIELDS"},
        "compare with the baseline although these differ, as torch,card",
    ),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--membench-...``, and an ini option of each one's name."""
    group = parser.getgroup("membench", "peak GPU memory (membench)")
    for name, default, how, text in _OPTIONS:
        shown = f"{text}; by default {default}" if default else text
        group.addoption(f"--membench-{name}", default=None, help=shown, **how)
        parser.addini(f"membench_{name.replace('-', '_')}", shown, default=default)
    group.addoption(
        "--membench-update",
        action="store_true",
        help="write the peaks of this run into the file of --membench-baseline",
    )
    group.addoption(
        "--hide-membench-summary",
        action="store_true",
        help="no membench section at the end",
    )
    parser.addini("hide_membench_summary", "no membench section at the end", "bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse options that cannot be used."""
    config.addinivalue_line(
        "markers",
        f'{_MARKER}(size, *, card=None, counter="allocated"): fail the test if its peak GPU memory '
        'goes over size, as "2.3 GiB"; counter: allocated, reserved or process; card: the card to '
        "predict for where there is no GPU",
    )
    if _asks_for_something(config):
        memory_session(config).check_options()
    config.pluginmanager.register(_Collector(config), "membench-collector")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the child process."""
    session = config.stash.get(_KEY, None)
    if session is not None:
        session.close()


def _asks_for_something(config: pytest.Config) -> bool:
    options = [name.replace("-", "_") for name, *_ in _OPTIONS]
    return config.option.membench_update or any(
        config.getoption(f"membench_{name}") or config.getini(f"membench_{name}") != default
        for name, (_, default, _, _) in zip(options, _OPTIONS, strict=True)
    )


def memory_session(config: pytest.Config) -> MemorySession:
    """Return what the plugin knows in this run; made when it is first needed."""
    session = config.stash.get(_KEY, None)
    if session is None:
        from bench.pytest_plugin.session import MemorySession

        session = config.stash[_KEY] = MemorySession(config, _SYS_PATH)
    return session


def _concerned(item: pytest.Item) -> bool:
    if item.get_closest_marker(_MARKER) is not None:
        return True
    return _FIXTURE in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a concerned test in a child where there is no GPU; its reports are reported here."""
    if not _concerned(item) or not memory_session(item.config).predicts:
        return None
    from bench.pytest_plugin.rerun import run_protocol

    run_protocol(item, nextitem, memory_session(item.config).rerun)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test in one line if its marker cannot be used."""
    if _concerned(item):
        memory_session(item.config).check_marker(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Meter a concerned test's own code; fail the test if its peak is not allowed."""
    if _concerned(item):
        return (yield from memory_session(item.config).around_call(item))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the report of a concerned test carry what it took."""
    report = yield
    if _concerned(item):
        memory_session(item.config).attach(item, report)
    return report


class _Collector:
    """Collects what reports carry, in whatever process they come together."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a test took."""
        if hasattr(report, "membench"):
            memory_session(self._config).collect(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the baseline, if asked to, once all tests that were chosen have run."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        known = session.config.stash.get(_KEY, None)
        if known is not None:
            known.finish()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List what the tests took, the largest first."""
    known = config.stash.get(_KEY, None)
    if known is None or config.option.hide_membench_summary:
        return
    if config.getini("hide_membench_summary") or not known.usages:
        return
    from bench.pytest_plugin.summary import summary_lines

    terminalreporter.write_sep("=", "membench: peak GPU memory")
    for line in summary_lines(known):
        terminalreporter.write_line(line)


@pytest.fixture
def gpu_memory(request: pytest.FixtureRequest) -> GpuMemory:
    """Peak GPU memory of this test: measured on a GPU, else predicted in a child process."""
    from bench.pytest_plugin.fixture import GpuMemory

    session = memory_session(request.config)
    return GpuMemory(session.need_meter(), session.check_marker(request.node))
