"""The side of whoever runs pytest: a test is asked of a child process, its reports come back."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bench.child import Child
from bench.errors import MembenchError
from bench.predict.shim import choose_tracer

__all__ = ["Rerunner", "run_protocol"]

_ONE_PROCESS_SERVES_ALL = sys.platform == "linux"  # it forks for each test


class Rerunner:
    """Runs tests by their node id, each in a process of its own where torch is loaded already."""

    def __init__(self, config: pytest.Config, sys_path: list[str]) -> None:
        self._config = config
        self._sys_path = sys_path
        self._child: Child | None = None

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Return the reports of one test, as its child process made them."""
        try:
            child = self._child = self._child or self._start()
            reply = child.ask(self._request(item), math.inf)
        except MembenchError as error:  # the child is gone
            self._child = None
            return [_failed(item, str(error))]
        finally:
            if not _ONE_PROCESS_SERVES_ALL:
                self.close()
        if "reports" not in reply:
            return [_failed(item, reply["reason"])]
        return [self._report(data) for data in reply["reports"]]

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        hook = self._config.hook
        report: pytest.TestReport = hook.pytest_report_from_serializable(
            config=self._config, data=data
        )
        # JSON has no tuples, and plugins unpack these or ask whether they are.
        report.location = tuple(data["location"])
        report.user_properties = [(name, value) for name, value in data["user_properties"]]
        if report.skipped and isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
        return report

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.finish()
            self._child = None

    def _start(self) -> Child:
        tracer, _ = choose_tracer()
        return Child("bench.pytest_plugin.child", {"MEMBENCH_WORKER_TRACER": tracer})

    def _request(self, item: pytest.Item) -> dict[str, Any]:
        _, separator, name = item.nodeid.partition("::")
        return {
            "test": f"{item.path}{separator}{name}",
            "args": [str(arg) for arg in self._config.invocation_params.args],
            "directory": str(self._config.invocation_params.dir),
            "sys_path": self._sys_path,
            "pythonpath": os.environ.get("PYTHONPATH"),
        }


def _failed(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the process that predicts GPU memory gave no result: {why}",
        when="call",
    )


def run_protocol(
    item: pytest.Item,
    nextitem: pytest.Item | None,
    rerun: Callable[[pytest.Item], list[pytest.TestReport]],
) -> None:
    """Do for ``item`` what pytest does for a test, with the reports that ``rerun`` gives."""
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in rerun(item):
        if item.config.getoption("capture") == "no":
            _print_captured(report)
        hook.pytest_runtest_logreport(report=report)
    # Fixtures of wider scope that the test before left, and the one after does not need.
    state = item.session._setupstate
    call = pytest.CallInfo.from_call(lambda: state.teardown_exact(nextitem), "teardown")
    if call.excinfo is not None:
        hook.pytest_runtest_logreport(report=pytest.TestReport.from_item_and_call(item, call))
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _print_captured(report: pytest.TestReport) -> None:
    """With ``-s`` a test's own output is shown: the child had to capture it."""
    for name, text in report.sections:
        if name == f"Captured stdout {report.when}":
            sys.stdout.write(text)
        elif name == f"Captured stderr {report.when}":
            sys.stderr.write(text)
