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
from bench.predict.cards import Card, find_card
from bench.predict.step_trace import Trace
from bench.predict.tracer import TraceError
from bench.pytest_plugin import memory_session
from bench.pytest_plugin.fake_gpu import answer_for
from bench.pytest_plugin.ledger import PredictedMeter
from bench.pytest_plugin.session import DEFAULT_CARD
from bench.pytest_plugin.tracing import NO_GPU, tracing
from bench.pytest_plugin.usage import Limit, read_limit
from bench.record import Tracer as TracerName

__all__ = ["ChildRun"]

# Options that choose other tests, that only one process may act on, or that write a file of the
# asking run's.
_OFF = (
    *("pyargs", "collectonly", "lf", "failedfirst", "newfirst", "stepwise", "usepdb", "trace"),
    *("setuponly", "setupplan", "looponfail", "distload"),
)
_PLAIN: dict[str, Any] = {
    "markexpr": "",
    "keyword": "",
    "deselect": None,
    "maxfail": 0,
    "numprocesses": None,
    "maxprocesses": None,
    "dist": "no",
    "tx": [],
    "xmlpath": None,
    "log_file": os.devnull,
    "cov_source": [],
    "no_cov": True,
    **dict.fromkeys(_OFF, False),
}
# pytest's cache is the asking run's, and nobody reads what a terminal would show here.
_NOT_HERE = ("lfplugin", "nfplugin", "stepwiseplugin", "terminalreporter")
_TORCH = str(Path(torch.__file__).parent)
_NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException, TraceError)
_NO_VALUES_TEXTS = (".numpy() is not supported for tensor subclasses", "Cannot access data pointer")
_NO_CUDA = (
    NO_GPU,
    "not linked with support for cuda",
    "not compiled with CUDA",
    "no NVIDIA driver",
)


class ChildRun:
    """The plugin that makes a pytest run predict one test; ``reports`` are what it made."""

    def __init__(self, test: str, tracer: str, folder: Path) -> None:
        self.reports: list[dict[str, Any]] = []
        self._test = test
        self._tracer: TracerName = tracer  # type: ignore[assignment]  # hello's word for it
        self._folder = folder
        self._config: pytest.Config | None = None
        self._refused: list[str] = []
        # Conftest files may ask for a GPU as they are imported, before the options are known.
        self._answer(find_card(DEFAULT_CARD), Trace())

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
        """Have a GPU before test files are imported; leave to the asking run what is its own."""
        self._answer(memory_session(config).card(Limit()), Trace())
        for name in _NOT_HERE:
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
        with tracing("cpu" if self._tracer == "cpu" else "cuda") as tracer:
            session.meter = self._answer(card, tracer.trace)
            return (yield)

    def _answer(self, card: Card, trace: Trace) -> PredictedMeter:
        """Return the meter of ``trace`` on ``card``, and let torch.cuda answer by it."""
        settings = parse_alloc_conf(allocator_settings())
        meter = PredictedMeter(trace, self._tracer, card, settings)
        if self._tracer != "cpu":
            answer_for(card, meter)
        return meter

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Say in one line when a test needs a value that a fake tensor does not have."""
        report = yield
        if report.failed and call.excinfo is not None:
            found = _value_needed(call.excinfo.value)
            if self._tracer == "cpu" and any(t in str(call.excinfo.value) for t in _NO_CUDA):
                found = NO_GPU
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
            last = lines[-1].removeprefix("E ").strip() if lines else "it cannot be collected"
            self._refused.append(last)

    def pytest_internalerror(self, excrepr: Any) -> None:
        """Keep what went wrong outside of any test."""
        lines = str(excrepr).strip().splitlines()
        self._refused.append(lines[-1] if lines else "an internal error of pytest")

    def why_no_reports(self, code: int) -> str:
        """Say why the test did not run."""
        if self._refused:
            return f"{self._test} cannot be run where torch has a fake GPU: {self._refused[0]}"
        return f"pytest ended with exit code {code} and did not run {self._test}"


def _value_needed(error: BaseException) -> str:
    """Return one line when ``error`` comes from a value that a fake tensor does not have."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, _NO_VALUES) or any(known in text for known in _NO_VALUES_TEXTS):
            return (
                f"{_own_line(error.__traceback__)}: this needs the value of "
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
