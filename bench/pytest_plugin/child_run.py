"""A pytest run of one test, on fake tensors: what is different from the run that asked for it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from bench.environment import allocator_settings
from bench.errors import MembenchError
from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.tracer import TraceError
from bench.pytest_plugin import memory_session
from bench.pytest_plugin.fake_gpu import answer_for
from bench.pytest_plugin.ledger import PredictedMeter
from bench.pytest_plugin.tracing import TestTracer, tracing
from bench.pytest_plugin.usage import Limit, read_limit
from bench.record import Tracer as TracerName

__all__ = ["ChildRun"]

# Options that choose other tests, that only one process may act on, or that write a file of the
# asking run's.
_PLAIN = {
    **{"markexpr": "", "keyword": "", "deselect": None, "pyargs": False, "collectonly": False},
    **{"lf": False, "failedfirst": False, "newfirst": False, "stepwise": False, "maxfail": 0},
    **{"usepdb": False, "trace": False, "setuponly": False, "setupplan": False},
    **{"numprocesses": None, "maxprocesses": None, "dist": "no", "tx": [], "looponfail": False},
    **{"distload": False, "xmlpath": None, "log_file": os.devnull, "cov_source": []},
    "no_cov": True,
}
_KEEP_CACHES = ("lfplugin", "nfplugin", "stepwiseplugin")
_TORCH = str(Path(torch.__file__).parent)
_NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException, TraceError)
_NO_VALUES_TEXTS = (".numpy() is not supported for tensor subclasses", "Cannot access data pointer")


class ChildRun:
    """The plugin that makes a pytest run predict one test; ``reports`` are what it made."""

    def __init__(self, test: str, tracer: str, folder: Path) -> None:
        self.reports: list[dict[str, Any]] = []
        self._test = test
        self._tracer: TracerName = tracer  # type: ignore[assignment]  # hello's word for it
        self._folder = folder
        self._config: pytest.Config | None = None
        self._refused: list[str] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> Generator[None, object, object]:
        """Choose the one test, before any other plugin reads the options."""
        self._config = config
        config.args[:] = [self._test]
        for name, value in _PLAIN.items():
            if hasattr(config.option, name):
                setattr(config.option, name, value)
        config.option.basetemp = str(self._folder / "tmp")
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Leave pytest's cache to the asking run."""
        for name in _KEEP_CACHES:
            if config.pluginmanager.hasplugin(name):
                config.pluginmanager.unregister(name=name)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace the test from the setup of its fixtures to their teardown."""
        session = memory_session(item.config)
        try:
            card = session.card(read_limit(item))
        except MembenchError:  # said when the test is set up
            card = session.card(Limit())
        tracer = TestTracer("cpu" if self._tracer == "cpu" else "cuda")
        settings = parse_alloc_conf(allocator_settings())
        meter = session.meter = PredictedMeter(tracer, self._tracer, card, settings)
        if self._tracer != "cpu":
            answer_for(card, meter)
        with tracing(tracer):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Say in one line when a test needs a value that a fake tensor does not have."""
        report = yield
        if report.failed and call.excinfo is not None:
            found = _value_needed(call.excinfo.value)
            if found:
                report.longrepr = found
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report, in the form that can be sent."""
        assert self._config is not None  # set before any test
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self.reports.append(data)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep why the test's file cannot be collected here."""
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            self._refused.append(lines[-1] if lines else "it cannot be collected")

    def why_no_reports(self, code: int) -> str:
        """Say why the test did not run."""
        if self._refused:
            return (
                f"{self._test} cannot be collected where torch has a fake GPU: {self._refused[0]}"
            )
        return f"pytest ended with exit code {code} and did not run {self._test}"


def _value_needed(error: BaseException) -> str:
    """Return one line when ``error`` comes from a value that a fake tensor does not have."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, _NO_VALUES) or any(known in text for known in _NO_VALUES_TEXTS):
            return (
                f"{_own_line(seen.__traceback__ or error.__traceback__)}: this needs the value of "
                "a tensor, and a predicted test has shapes without values; assert on values in a "
                'test without limit_gpu_memory, or only if gpu_memory.evidence == "measured"'
            )
        seen = seen.__cause__ or seen.__context__
    return ""


def _own_line(tb: TracebackType | None) -> str:
    """Return ``test_net.py:12``, the last line before the error that is not torch's or ours."""
    where = "the test"
    for frame, number in traceback_lines(tb):
        if not frame.startswith((_TORCH, str(Path(__file__).parents[1]))):
            where = f"{os.path.relpath(frame)}:{number}"
    return where


def traceback_lines(tb: TracebackType | None) -> Iterator[tuple[str, int]]:
    """Yield the file and line of each entry of a traceback, outermost first."""
    while tb is not None:
        yield tb.tb_frame.f_code.co_filename, tb.tb_lineno
        tb = tb.tb_next
