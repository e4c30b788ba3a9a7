"""The plugin's parts: what a marker says, what is compared, what a GPU's counters give."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.baseline import read_baseline
from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.cards import find_card
from bench.predict.step_trace import Site, Trace
from bench.pytest_plugin.judge import Baseline, figures_of_test, judge, update_baseline
from bench.pytest_plugin.ledger import PredictedMeter
from bench.pytest_plugin.meter import MeasuredMeter
from bench.pytest_plugin.summary import summary_lines
from bench.pytest_plugin.usage import Limit, Reading, Usage, read_limit
from bench.record import Holder
from bench.tolerance import parse_tolerance
from bench.units import MIB
from tests.bench.fake_cuda import FakeCuda
from tests.bench.plugin_runs import ROOT, run_pytest

V100 = "v100-32gb"


def item_with(*args: Any, **kwargs: Any) -> Any:
    mark = SimpleNamespace(args=args, kwargs=kwargs)
    return SimpleNamespace(
        get_closest_marker=lambda name: mark if name == "limit_gpu_memory" else None
    )


def usage(allocated: int = 100 * MIB, nodeid: str = "test_a.py::test_b", **more: Any) -> Usage:
    holders = (
        Holder(
            module="up.1", operator="conv", source_line="n.py:1", category="activation", bytes=7
        ),
    )
    reading = Reading(
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=2 * allocated,
        holders=more.pop("holders", holders),
        out_of_memory=more.pop("out_of_memory", ""),
        process_bytes=more.pop("process_bytes", 3 * allocated),
    )
    return Usage(
        **{"evidence": "predicted", "card": V100, "torch": "2.13.0", **more},
        nodeid=nodeid,
        reading=reading,
    )


def baseline(*usages: Usage, tolerance: str = "1%") -> Baseline:
    figures = tuple(figures_of_test(one) for one in usages)
    return Baseline("peaks.json", figures, parse_tolerance(tolerance))


# -- start-up and options -------------------------------------------------------------------


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    script = (
        "import sys, bench.pytest_plugin\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'typer', 'yaml', 'bench.record'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_a_run_without_marked_tests_loads_no_torch_and_starts_no_child(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\ndef test_plain():\n"
        "    assert 'torch' not in sys.modules\n"
        "    assert 'bench.pytest_plugin.session' not in sys.modules\n"
    )
    ran = run_pytest(tmp_path)
    assert ran.code == 0
    assert "membench" not in ran.output


def test_pytest_finds_the_plugin_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"membench": "bench.pytest_plugin"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--membench-update"], "--membench-update needs --membench-baseline FILE"),
        (["--membench-baseline=none.json"], "write it with --membench-update"),
        (["--membench-tolerance=1"], "tolerance '1' has no unit"),
        (["--membench-card=v100"], "no card is called 'v100'"),
        (["--membench-most=few"], "'few' is no whole number"),
        (["--membench-allow-different=colour"], "'colour'"),
        (["--membench-device=cuda"], "--device predict"),
        (["-o", "membench_device=gpu"], "use auto, cuda or predict"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_any_test(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    ran = run_pytest(tmp_path, *arguments)
    assert ran.code == pytest.ExitCode.USAGE_ERROR
    assert said in ran.output


# -- markers --------------------------------------------------------------------------------


def test_a_marker_says_size_counter_and_card() -> None:
    assert read_limit(item_with("2.5 GiB")) == Limit(size_bytes=5 << 29)
    assert read_limit(item_with(4096)) == Limit(size_bytes=4096)
    told = read_limit(item_with(size="300MiB", card=V100, counter="reserved"))
    assert told == Limit(size_bytes=300 * MIB, card=V100, counter="reserved")
    unmarked: Any = SimpleNamespace(get_closest_marker=lambda _name: None)
    assert read_limit(unmarked) == Limit()


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "takes one size, got 0"),
        (("1MiB", "2MiB"), {}, "takes one size, got 2"),
        (("5 MB",), {}, "MB means 10\\^6"),
        ((1.5,), {}, "1.5 is no size"),
        ((True,), {}, "True is no size"),
        ((-1,), {}, "-1 is no size"),
        (("1MiB",), {"counter": "alocated"}, "did you mean 'allocated'"),
        (("1MiB",), {"cards": V100}, "did you mean 'card'"),
    ],
)
def test_a_mistaken_marker_is_named(args: Any, kwargs: Any, said: str) -> None:
    with pytest.raises(MembenchError, match=said):
        read_limit(item_with(*args, **kwargs))


@pytest.mark.parametrize(
    ("counter", "size", "over"),
    [
        ("allocated", 100 * MIB, ""),
        ("allocated", 90 * MIB, "peak allocated 100 MiB is over the limit of 90 MiB"),
        ("reserved", 199 * MIB, "peak reserved 200 MiB is over the limit of 199 MiB"),
        ("reserved", 200 * MIB, ""),
        ("process", 299 * MIB, "peak process 300 MiB is over"),
    ],
)
def test_a_limit_is_on_the_counter_that_it_names(counter: Any, size: int, over: str) -> None:
    said = usage(limit=Limit(size_bytes=size, counter=counter)).over_limit
    assert said.startswith(over)
    assert bool(said) == bool(over)


def test_a_limit_on_what_nobody_can_read_is_not_passed() -> None:
    one = usage(limit=Limit(size_bytes=MIB, counter="process"), process_bytes=None)
    assert "could not be predicted" in one.over_limit


# -- the baseline ---------------------------------------------------------------------------


def test_a_peak_that_grew_by_the_tolerance_passes_and_a_byte_more_fails() -> None:
    held = baseline(usage(100 * MIB))
    same, nothing = judge(usage(101 * MIB), held)
    assert (same.compared, nothing) == ("same", "")
    grown, text = judge(usage(101 * MIB + 1), held)
    assert (grown.compared, grown.growth_bytes) == ("regression", MIB + 1)
    assert text.startswith("peak allocated grew by 1 MiB, 100 MiB -> 101 MiB, tolerance 1 %")
    assert f"(predicted for {V100}; baseline peaks.json)" in text


def test_what_is_unlike_is_not_compared_and_says_what_differs() -> None:
    told, text = judge(usage(torch="2.14.0"), baseline(usage()))
    assert told.compared == "unlike"
    assert "torch: 2.13.0 before, 2.14.0 now" in text
    told, text = judge(usage(card="t4-16gb"), baseline(usage()))
    assert f"card: {V100} before, t4-16gb now" in text


def test_a_measurement_is_not_held_against_a_prediction() -> None:
    told, text = judge(usage(evidence="measured"), baseline(usage(1)))
    assert (told.compared, text) == ("new", "")


def test_over_the_limit_says_who_holds_the_bytes_and_what_grew() -> None:
    limited = usage(102 * MIB, limit=Limit(size_bytes=50 * MIB))
    _, text = judge(limited, baseline(usage(100 * MIB)))
    first, grown = text.split("\n\n")
    assert first.startswith("peak allocated 102 MiB is over the limit of 50 MiB")
    assert "7 B  up.1" in first
    assert grown.startswith("peak allocated grew by 2 MiB")
    _, shrank = judge(limited, baseline(usage(200 * MIB)))
    assert "grew" not in shrank


def test_without_holders_it_says_that_there_are_none() -> None:
    measured = usage(evidence="measured", holders=(), limit=Limit(size_bytes=MIB))
    _, text = judge(measured, None)
    assert f"(measured on {V100})" in text
    assert "no holders are recorded" in text


def test_an_update_keeps_the_tests_that_did_not_run(tmp_path: Path) -> None:
    path = tmp_path / "peaks.json"
    old = [figures_of_test(usage(1, "a")), figures_of_test(usage(2, "b"))]
    new = [usage(20, "b"), usage(30, "c"), usage(4, "d", ended=False)]
    new.append(usage(5, "e", out_of_memory="too large"))
    assert update_baseline(path, old, new) == (2, 1)
    peaks = {one.case: one.peak_allocated_bytes for one in read_baseline(path)}
    assert peaks == {"a": 1, "b": 20, "c": 30}


def test_a_usage_survives_the_way_through_a_report() -> None:
    one = usage(limit=Limit(size_bytes=1, card=V100), tracer="cpu")
    assert Usage.from_dict(one.to_dict()) == one
    assert one.said == f"predicted for {V100}, from the CPU's operators"


# -- meters ---------------------------------------------------------------------------------


def measured_meter(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, MeasuredMeter]:
    cuda = FakeCuda()
    monkeypatch.setattr("bench.nvml.process_bytes", lambda *_: cuda.process_bytes)
    return cuda, MeasuredMeter(cuda, "test-1gb")


def test_windows_on_a_gpu_keep_their_peaks_in_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, meter = measured_meter(monkeypatch)
    cuda.allocate(10 * MIB)
    with meter.window() as outer:
        cuda.allocate(50 * MIB)
        cuda.free(50 * MIB)
        with meter.window() as inner:
            cuda.allocate(20 * MIB)
            cuda.free(20 * MIB)
        cuda.allocate(40 * MIB)
    cuda.allocate(100 * MIB)  # after both
    first, second = meter.read(outer), meter.read(inner)
    assert (first.before_allocated_bytes, first.peak_allocated_bytes) == (10 * MIB, 60 * MIB)
    assert (second.before_allocated_bytes, second.peak_allocated_bytes) == (10 * MIB, 30 * MIB)
    assert first.process_bytes == 60 * MIB + cuda.context_bytes


def test_a_test_that_resets_the_peaks_itself_hides_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, meter = measured_meter(monkeypatch)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _device: cuda.reset_peak_memory_stats()
    )
    with meter.window() as window:
        cuda.allocate(50 * MIB)
        cuda.free(50 * MIB)
        torch.cuda.reset_peak_memory_stats()
        assert cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    assert meter.read(window).peak_allocated_bytes == 50 * MIB


def predicted_meter(card: str = V100) -> tuple[Trace, PredictedMeter]:
    trace = Trace()
    return trace, PredictedMeter(trace, "cuda-shim", find_card(card), AllocatorSettings())


def allocate(trace: Trace, size: int, module: str = "") -> int:
    trace.events.append(("alloc", len(trace.sites), size, 0))
    trace.sites.append(Site(module, "aten.conv", "net.py:1"))
    trace.categories.append("temporary")
    return len(trace.sites) - 1


def test_windows_of_a_trace_keep_their_peaks_and_their_holders() -> None:
    trace, meter = predicted_meter()
    allocate(trace, 4 * MIB, "stem")
    with meter.window() as window:
        big = allocate(trace, 6 * MIB, "up")
        trace.events.append(("free", big))
        allocate(trace, MIB, "head")
    allocate(trace, 64 * MIB, "later")
    reading = meter.read(window)
    assert (reading.before_allocated_bytes, reading.peak_allocated_bytes) == (4 * MIB, 10 * MIB)
    assert {holder.module: holder.bytes for holder in reading.holders} == {
        "stem": 4 * MIB,
        "up": 6 * MIB,
    }
    assert reading.process_bytes == reading.peak_reserved_bytes + find_card(V100).context_bytes


def test_library_workspaces_are_counted_and_named() -> None:
    trace, meter = predicted_meter()
    site = Site("conv", "aten.convolution", "net.py:2")
    card = find_card(V100)
    with meter.window() as window:
        trace.events += [("cublas", 0, site), ("convolution", 64 * MIB, "half", site)]
    reading = meter.read(window)
    workspaces = card.convolution_workspace_bytes("half", 64 * MIB), card.cublas_workspace_bytes
    assert sum(h.bytes for h in reading.holders if h.category == "workspace") == sum(workspaces)
    assert meter.memory_stats()["requested_bytes.all.current"] == card.cublas_workspace_bytes
    assert reading.peak_requested_bytes == sum(workspaces)


def test_nothing_is_counted_after_the_card_is_full() -> None:
    trace, meter = predicted_meter("t4-16gb")
    with meter.window() as window:
        allocate(trace, 8 << 30)
        refused = allocate(trace, 12 << 30)
        trace.events.append(("free", refused))
        allocate(trace, 1 << 30)
    reading = meter.read(window)
    assert reading.peak_allocated_bytes == 8 << 30
    assert "tried to allocate 12.0 GiB with 8.0 GiB allocated" in reading.out_of_memory


# -- the summary ----------------------------------------------------------------------------


def test_the_summary_lists_the_largest_first_and_says_what_is_new() -> None:
    usages = [
        usage(MIB, "a"),
        usage(3 * MIB, "b", compared="new", limit=Limit(size_bytes=4 * MIB, counter="reserved")),
        usage(2 * MIB, "c", compared="improvement", growth_bytes=-MIB),
        usage(9 * MIB, "d", evidence="measured", ended=False),
    ]
    session: Any = SimpleNamespace(
        usages={u.nodeid: u for u in usages}, most=2, written="4 peaks written to x"
    )
    assert list(summary_lines(session)) == [
        f"peak allocated, predicted for {V100}:",
        "    3 MiB  b  (limit 4 MiB reserved)",
        "    2 MiB  c  (-1 MiB against the baseline)",
        "           and 1 more: --membench-most 3",
        f"peak allocated, measured on {V100}:",
        "    9 MiB  d  (until it failed)",
        "1 not in the baseline, as b: record with --membench-update",
        "1 below the baseline, as c: record with --membench-update",
        "4 peaks written to x",
    ]
