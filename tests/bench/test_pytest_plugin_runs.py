"""Users' tests under the plugin, without a GPU: run again in a child, on fake tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.baseline import read_baseline
from tests.bench.plugin_runs import NETWORK, PluginRun, run_pytest

# 2^20 float32 values are 4 MiB: two blocks of them 8 MiB, exactly, since 512 divides both.
TESTS = """\
import os

import pytest
import torch
from net import Net, step

WHOLE = torch.arange(4.0)  # real, made as the file is imported


@pytest.fixture
def net():
    return Net().cuda()


@pytest.fixture(scope="module", autouse=True)
def told():
    yield
    print("torn down")


def four_mib():
    return torch.empty(2**20, device="cuda")


@pytest.mark.limit_gpu_memory("8 MiB")
def test_at_the_limit():
    kept = [four_mib(), four_mib()]


@pytest.mark.limit_gpu_memory(8 * 2**20 - 1)
def test_a_byte_over_the_limit():
    print("said by the test")
    kept = [four_mib(), four_mib()]


@pytest.mark.limit_gpu_memory("30 MiB")
def test_a_step(net):
    step(net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.limit_gpu_memory("1 MiB", card="t4-16gb")
def test_the_machine_has_the_card():
    assert torch.cuda.get_device_name() == "Tesla T4"
    assert (WHOLE.to("cuda") + 1).device.type == "cuda"


def test_the_fixture(gpu_memory):
    kept = four_mib()
    with gpu_memory.track() as tracked:
        four_mib()
    with gpu_memory.track() as nothing:
        pass
    assert (tracked.before_allocated_bytes, tracked.peak_allocated_bytes) == (2**22, 2**23)
    assert (tracked.growth_bytes, nothing.growth_bytes) == (2**22, 0)
    assert tracked.peak_reserved_bytes == gpu_memory.peak_reserved_bytes >= 2**23
    assert gpu_memory.peak_allocated_bytes == torch.cuda.max_memory_allocated() == 2**23
    assert torch.cuda.memory_allocated() == 2**22
    assert gpu_memory.limit_bytes is None
    assert (gpu_memory.evidence, gpu_memory.card) == ("predicted", "v100-32gb")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 2**22


@pytest.mark.limit_gpu_memory("1 MiB")
def test_a_value():
    assert torch.zeros(3, device="cuda").sum() == 0


@pytest.mark.limit_gpu_memory("1 MiB")
def test_close_to():
    torch.testing.assert_close(torch.zeros(3, device="cuda"), torch.ones(3, device="cuda"))


@pytest.mark.limit_gpu_memory("90 GiB")
def test_too_large_for_the_card():
    torch.empty(2**35, device="cuda", dtype=torch.uint8)


@pytest.mark.limit_gpu_memory("5 MB")
def test_a_mistaken_marker():
    pass


@pytest.mark.xfail(reason="known to be large", strict=True)
@pytest.mark.limit_gpu_memory("1 MiB")
def test_known_to_be_large():
    four_mib()


@pytest.mark.skip(reason="not today")
@pytest.mark.limit_gpu_memory("1 MiB")
def test_skipped():
    pass


@pytest.mark.limit_gpu_memory("1 MiB")
def test_that_fails_by_itself():
    assert 1 == 2


@pytest.mark.limit_gpu_memory("1 MiB")
def test_that_ends_the_process():
    os.abort()


def test_that_is_not_concerned():
    assert not torch.cuda.is_available()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "net.py").write_text(NETWORK)
    (folder / "test_net.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> PluginRun:
    """The run that writes the baseline."""
    return run_pytest(folder, "--membench-baseline", "peaks.json", "--membench-update")


def test_a_peak_at_the_limit_passes_and_a_byte_over_it_fails(first: PluginRun) -> None:
    assert first.tests["test_at_the_limit"].outcome == "passed"
    over = first.tests["test_a_byte_over_the_limit"]
    assert over.outcome == "failed"
    assert (
        "peak allocated 8,388,608 bytes is over the limit of 8,388,607 (predicted for v100-32gb)"
        in over.text
    )
    assert "who holds the bytes at the allocated peak of 8 MiB" in over.text
    assert "8 MiB  test_net.py:" in over.text  # by source line
    assert "said by the test" in first.output


def test_the_reports_say_the_peak_and_how_it_is_known(first: PluginRun) -> None:
    assert first.tests["test_at_the_limit"].properties == {
        "membench_peak_allocated_bytes": str(2**23),
        "membench_evidence": "predicted",
    }
    assert "peak allocated, predicted for v100-32gb:" in first.output
    assert "peak allocated, predicted for t4-16gb:" in first.output
    assert "test_net.py::test_at_the_limit  (limit 8 MiB)" in first.output


def test_the_test_sees_the_card_and_the_fixture_the_peaks(first: PluginRun) -> None:
    assert first.tests["test_the_machine_has_the_card"].outcome == "passed"
    assert first.tests["test_the_fixture"].outcome == "passed"
    assert first.tests["test_a_step"].outcome == "passed"


@pytest.mark.parametrize("name", ["test_a_value", "test_close_to"])
def test_a_test_that_needs_values_is_told_so_in_one_line(first: PluginRun, name: str) -> None:
    test = first.tests[name]
    line = TESTS[: TESTS.index(f"def {name}")].count("\n") + 2
    assert test.outcome == "failed"
    assert f"test_net.py:{line}: this needs the value of a tensor" in test.text
    assert 'only if gpu_memory.evidence == "measured"' in test.text
    assert "Traceback" not in test.text
    assert "torch/" not in test.text


def test_what_does_not_fit_the_card_fails(first: PluginRun) -> None:
    text = first.tests["test_too_large_for_the_card"].text
    assert "out of memory on v100-32gb: tried to allocate 32.0 GiB with 0 B allocated" in text


def test_other_outcomes_are_those_of_the_child(first: PluginRun) -> None:
    assert first.tests["test_a_mistaken_marker"].outcome == "error"  # at its setup
    assert "MB means 10^6 bytes" in first.tests["test_a_mistaken_marker"].text
    assert first.tests["test_known_to_be_large"].outcome == "skipped"  # xfail, in JUnit's words
    assert "known to be large" in first.tests["test_known_to_be_large"].text
    assert "not today" in first.tests["test_skipped"].text
    assert "assert 1 == 2" in first.tests["test_that_fails_by_itself"].text
    assert "1 xfailed" in first.output


def test_a_child_that_dies_costs_one_test(first: PluginRun) -> None:
    died = first.tests["test_that_ends_the_process"]
    assert died.outcome == "failed"
    assert "killed by SIGABRT" in died.text
    # The one after it ran, here, without the library that stands in for a GPU.
    assert first.tests["test_that_is_not_concerned"].outcome == "passed"


def test_the_baseline_has_the_peaks_of_tests_that_came_to_their_end(
    first: PluginRun, folder: Path
) -> None:
    peaks = {one.case: one for one in read_baseline(folder / "peaks.json")}
    assert sorted(peaks) == [
        f"test_net.py::test_{name}"
        for name in (
            *("a_byte_over_the_limit", "a_step", "at_the_limit", "known_to_be_large"),
            *("the_fixture", "the_machine_has_the_card"),
        )
    ]
    assert peaks["test_net.py::test_at_the_limit"].peak_allocated_bytes == 2**23
    # 4 values of 4 bytes twice, each a block of 512 bytes; the sum is the third.
    assert peaks["test_net.py::test_the_machine_has_the_card"].peak_allocated_bytes == 1024
    assert f"6 peaks written to {folder / 'peaks.json'}" in first.output


def test_an_activation_too_many_is_caught_and_its_block_named(
    first: PluginRun, folder: Path
) -> None:
    """The kept output of second: 8 channels of 32^3 float32, 1 MiB."""
    assert first.tests["test_a_step"].outcome == "passed"
    (folder / "net.py").write_text(NETWORK.replace("KEEP = False", "KEEP = True"))
    try:
        ran = run_pytest(folder, "--membench-baseline=peaks.json", "-k", "a_step or at_the_limit")
    finally:
        (folder / "net.py").write_text(NETWORK)
    assert ran.tests["test_at_the_limit"].outcome == "passed"
    text = ran.tests["test_a_step"].text
    assert "peak allocated grew by 1 MiB" in text
    grew = text[text.index("by module") : text.index("by operator")].splitlines()
    assert grew[1].split()[:3] == ["+1", "MiB", "second"]
    assert "aten.mul.Tensor" in text
    line = NETWORK[: NETWORK.index("self.kept")].count("\n") + 1
    assert f"net.py:{line}" in text
    assert "+1 MiB against the baseline" in ran.output
    assert ran.code == 1


@pytest.mark.slow
def test_under_xdist_the_baseline_is_written_once_with_all_peaks(
    folder: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "xdist.json"
    chosen = ("-n2", "-k", "at_the_limit or a_step or not_concerned")
    wrote = run_pytest(folder, f"--membench-baseline={baseline}", "--membench-update", *chosen)
    assert wrote.output.count("2 peaks written") == 1
    assert len(read_baseline(baseline)) == 2
    held = run_pytest(folder, f"--membench-baseline={baseline}", *chosen)
    assert held.code == 0
    assert "at_the_limit  (limit 8 MiB)" in held.output


@pytest.mark.slow
def test_another_torch_is_refused_and_a_new_test_is_named(folder: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "old.json"
    run_pytest(folder, f"--membench-baseline={baseline}", "--membench-update", "-k", "at_the_limit")
    data = json.loads(baseline.read_text())
    data["made_with"][0]["torch"] = "2.0.0"
    baseline.write_text(json.dumps(data))
    chosen = (f"--membench-baseline={baseline}", "-k", "at_the_limit or a_step")
    refused = run_pytest(folder, *chosen)
    assert "torch: 2.0.0 before" in refused.tests["test_at_the_limit"].text
    assert "1 not in the baseline, as test_net.py::test_a_step" in refused.output
    allowed = run_pytest(folder, *chosen, "--membench-allow-different=torch")
    assert allowed.code == 0


OTHERS = """\
import pytest
import torch

if torch.cuda.is_available():
    raise RuntimeError("not with a GPU")


@pytest.mark.limit_gpu_memory("1 MiB")
def test_not_collected():
    pass
"""
AFTER_ANOTHER = """\
import pytest
import torch


@pytest.fixture(scope="module")
def held():
    yield
    raise RuntimeError("could not be let go")


def test_before(held):
    pass


@pytest.mark.limit_gpu_memory("1 MiB")
def test_printing():
    print("shown at once")
    torch.zeros(3, device="cuda")
"""


@pytest.mark.slow
def test_what_goes_wrong_around_a_test_is_reported(tmp_path: Path) -> None:
    """In its file's import in the child, and in what the test before it left to tear down."""
    (tmp_path / "test_after.py").write_text(AFTER_ANOTHER)
    (tmp_path / "test_others.py").write_text(OTHERS)
    ran = run_pytest(tmp_path, "-s")
    assert "not with a GPU" in ran.tests["test_not_collected"].text
    assert "cannot be run where torch has a fake GPU" in ran.tests["test_not_collected"].text
    assert "could not be let go" in ran.output
    assert "shown at once" in ran.output
    assert "3 passed" not in ran.output


@pytest.mark.slow
def test_without_a_stand_in_for_the_gpu_the_remedy_is_said(tmp_path: Path) -> None:
    (tmp_path / "test_after.py").write_text(AFTER_ANOTHER)
    ran = run_pytest(tmp_path, "-k", "printing", MEMBENCH_TRACER="cpu")
    assert "install g++" in ran.tests["test_printing"].text
