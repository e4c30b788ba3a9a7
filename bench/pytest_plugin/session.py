"""A pytest run's options, the peaks it found, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from bench.backends import Device, use_cuda
from bench.errors import MembenchError
from bench.pytest_plugin.usage import Limit, Usage, read_limit

if TYPE_CHECKING:
    from bench.figures import Figures
    from bench.predict.cards import Card
    from bench.pytest_plugin.judge import Baseline
    from bench.pytest_plugin.meter import Meter
    from bench.pytest_plugin.rerun import Rerunner

__all__ = ["CHILD_VARIABLE", "DEFAULT_CARD", "MemorySession"]

CHILD_VARIABLE = "MEMBENCH_PYTEST_CHILD"
DEFAULT_CARD = "v100-32gb"
_USAGE = pytest.StashKey[Usage]()


class MemorySession:
    """What the plugin knows in one process: one that reruns tests, or one that meters them."""

    def __init__(self, config: pytest.Config, sys_path: list[str]) -> None:
        self.config = config
        self._sys_path = sys_path  # as pytest was started, before conftest files add to it
        self.usages: dict[str, Usage] = {}
        self.meter: Meter | None = None  # a child process is given its own
        self.written = ""
        self._rerunner: Rerunner | None = None
        # By its number, so that a pytest which a test starts is not taken for the child.
        self.is_child = os.environ.get(CHILD_VARIABLE) == str(os.getpid())
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist

    # -- options ----------------------------------------------------------------------------

    def option(self, name: str) -> str:
        """Return an option's text: the command line's, else the ini file's."""
        given = self.config.getoption(f"membench_{name}")
        return str(given if given is not None else self.config.getini(f"membench_{name}"))

    def check_options(self) -> None:
        """Refuse what cannot be used, before any test runs.

        Errors: pytest.UsageError.
        """
        try:
            self.card(Limit())
            _ = self.baseline, self.most, self.predicts
            if self.updates and self.baseline_path is None:
                raise MembenchError("--membench-update needs --membench-baseline FILE")
        except MembenchError as error:
            raise pytest.UsageError(f"membench: {error}") from None

    @property
    def updates(self) -> bool:
        """Whether peaks are written rather than held against the baseline."""
        return bool(self.config.option.membench_update)

    @cached_property
    def baseline_path(self) -> Path | None:
        """The baseline's file: from where pytest was started, or beside the ini file."""
        given = self.config.getoption("membench_baseline")
        if given:
            return self.config.invocation_params.dir / str(given)
        named = self.option("baseline")
        base = self.config.inipath.parent if self.config.inipath else self.config.rootpath
        return base / named if named else None

    @cached_property
    def baseline(self) -> Baseline | None:
        """The peaks to hold tests to; None without a baseline, and while it is written.

        Errors: MembenchError when the file cannot be read or the tolerance is none.
        """
        from bench.compare import parse_allowed
        from bench.pytest_plugin.judge import Baseline
        from bench.tolerance import parse_tolerance

        tolerance = parse_tolerance(self.option("tolerance"))
        allowed = parse_allowed([text] if (text := self.option("allow_different")) else [])
        if self.baseline_path is None or self.updates:
            return None
        if not self.baseline_path.is_file():
            raise MembenchError(
                f"there is no baseline {self.baseline_path}: write it with --membench-update"
            )
        figures = tuple(self._old_figures(self.baseline_path))
        return Baseline(self.baseline_path.name, figures, tolerance, allowed)

    @cached_property
    def most(self) -> int:
        """How many tests the summary lists."""
        text = self.option("most")
        if not text.isdecimal():
            raise MembenchError(f"--membench-most {text!r} is no whole number")
        return int(text)

    @cached_property
    def predicts(self) -> bool:
        """Whether tests are run again in a child, since there is no GPU or none is wanted."""
        device = self.option("device")
        if device not in ("auto", "cuda", "predict"):
            raise MembenchError(f"membench_device {device!r}: use auto, cuda or predict")
        return not self.is_child and not use_cuda(cast(Device, device))

    def card(self, limit: Limit) -> Card:
        """Return the card to predict for: the marker's, else the run's."""
        from bench.predict.cards import find_card

        return find_card(limit.card or self.option("card") or DEFAULT_CARD)

    # -- tests ------------------------------------------------------------------------------

    def rerun(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Run a test in the child process; return the reports it made there."""
        from bench.pytest_plugin.rerun import Rerunner

        if self._rerunner is None:
            self._rerunner = Rerunner(self.config, self._sys_path)
        return self._rerunner.run(item)

    def check_marker(self, item: pytest.Item) -> Limit:
        """Return a test's limit; fail the test in one line if its marker cannot be used."""
        try:
            limit = read_limit(item)
            self.card(limit)
            return limit
        except MembenchError as error:
            wrong = str(error)
        pytest.fail(wrong, pytrace=False)

    def need_meter(self) -> Meter:
        """Return the meter of this process: the child's own, or one of the GPU that is here."""
        if self.meter is None:
            from bench.cuda import TorchCuda
            from bench.predict.cards import card_name_for_gpu
            from bench.pytest_plugin.meter import MeasuredMeter

            cuda = TorchCuda()
            self.meter = MeasuredMeter(cuda, card_name_for_gpu(cuda.name, cuda.total_bytes))
        return self.meter

    def around_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Meter a test's own code, then fail the test if its peak is not allowed."""
        from bench.pytest_plugin.judge import judge

        meter, limit, ended = self.need_meter(), self.check_marker(item), False
        with meter.window() as window:
            fixture = getattr(item, "funcargs", {}).get("gpu_memory")
            if fixture is not None:
                fixture.begin(window)
            try:
                result = yield
                ended = True
            finally:
                usage = self._usage(item, limit, meter.read(window), ended)
                item.stash[_USAGE] = usage
                item.user_properties += [
                    ("membench_peak_allocated_bytes", usage.reading.peak_allocated_bytes),
                    ("membench_evidence", usage.evidence),
                ]
        usage, wrong = judge(usage, self.baseline)
        item.stash[_USAGE] = usage
        if wrong:
            pytest.fail(wrong, pytrace=False)
        return result

    def _usage(self, item: pytest.Item, limit: Limit, reading: Any, ended: bool) -> Usage:
        from bench.environment import read_environment

        meter = self.need_meter()
        made = read_environment()
        predicted = meter.evidence == "predicted"
        return Usage(
            nodeid=item.nodeid,
            evidence=meter.evidence,
            card=meter.card,
            tracer=meter.tracer,
            card_hash=self.card(limit).digest() if predicted else "",
            torch=made.torch or "",
            cudnn=made.cudnn or "",
            allocator_settings=made.allocator_settings,
            limit=limit,
            reading=reading,
            ended=ended,
        )

    # -- reports ----------------------------------------------------------------------------

    def attach(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Let a report carry the usage to whoever collects reports, in whatever process."""
        usage = item.stash.get(_USAGE, None)
        if report.when != "call" or usage is None:
            return
        report.__dict__["membench"] = usage.to_dict()  # what a report carries is sent with it

    def collect(self, report: pytest.TestReport) -> None:
        """Keep the usage that a report carries."""
        data = getattr(report, "membench", None)
        if data is not None:
            usage = Usage.from_dict(data)
            self.usages[usage.nodeid] = usage

    def finish(self) -> None:
        """Write the baseline, if asked to: once, where all reports come together.

        Errors: MembenchError when it cannot be written.
        """
        if not self.updates or self.is_child or self.is_worker:
            return
        from bench.pytest_plugin.judge import update_baseline

        path = self.baseline_path
        assert path is not None  # check_options has seen to it
        old = self._old_figures(path) if path.is_file() else []
        written, kept = update_baseline(path, old, self.usages.values())
        rest = f", {kept} of tests that did not run kept" if kept else ""
        self.written = f"{written} peaks written to {path}{rest}"

    def _old_figures(self, path: Path) -> list[Figures]:
        from bench.baseline import read_baseline

        return read_baseline(path)

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._rerunner is not None:
            self._rerunner.close()
            self._rerunner = None
