"""The runner against child processes that really crash, hang and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.case import Case
from bench.errors import MembenchError
from bench.record import Environment, Record, append_record, read_records
from bench.resume import finished_cases, untried_first
from bench.runner import Backend, Progress, Run, TimeLimit, run_cases

ROOT = Path(__file__).resolve().parents[2]


def case(variant: str, **changes: object) -> Case:
    shape = (8, 8, 8)
    made = Case(network="fcn", variant=variant, requested_shape=shape, shape=shape)
    return replace(made, **changes)  # type: ignore[arg-type]


def run_of(
    path: Path, *variants: str, reuse: bool = True, workers: int = 1, limit_s: float = 60.0
) -> Run:
    return Run(
        cases=[case(variant, time_limit_s=limit_s) for variant in variants],
        backend=Backend(
            evidence="predicted",
            module="tests.bench.fake_workers",
            card="v100-32gb",
            workers=workers,
            reuse=reuse,
            tracer="cuda-shim",
        ),
        environment=Environment(membench="test", torch="9.9.9"),
        path=path,
    )


def ignore(_: Progress) -> None:
    pass


def pid(record: Record) -> str:
    return record.environment.notes[-1]


def test_every_case_becomes_a_record_in_the_order_of_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "card" / "s.jsonl"
    records = run_cases(run_of(path, "sleep0.3", "b", "oom", workers=2), ignore)
    assert [(r.variant, r.status) for r in records] == [
        ("sleep0.3", "ok"),
        ("b", "ok"),
        ("oom", "oom"),
    ]
    assert {r.variant for r in read_records(path)} == {"sleep0.3", "b", "oom"}
    assert records[0].environment.torch == "9.9.9"
    assert records[0].techniques == ()
    assert records[0].exact


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("exit", "failed", "process ended with exit code 3: the last words"),
        ("SIGSEGV", "failed", "process killed by SIGSEGV"),
        ("SIGABRT", "failed", "process killed by SIGABRT"),
        ("SIGKILL", "failed", "process killed by SIGKILL"),
        ("bug", "failed", "RuntimeError: two lines (fake_workers.py:"),
        ("user-error", "failed", "nothing to be done"),
    ],
)
def test_a_case_that_goes_wrong_is_recorded_and_the_others_go_on(
    tmp_path: Path, behaviour: str, status: str, reason: str
) -> None:
    records = run_cases(run_of(tmp_path / "s.jsonl", "a", behaviour, "b"), ignore)
    assert [r.status for r in records] == ["ok", status, "ok"]
    assert records[1].reason.startswith(reason)
    assert "\n" not in records[1].reason


def test_a_hanging_case_is_ended_at_its_time_limit(tmp_path: Path) -> None:
    begun = time.monotonic()
    records = run_cases(run_of(tmp_path / "s.jsonl", "hang", "b", limit_s=1.0), ignore)
    assert [r.status for r in records] == ["timeout", "ok"]
    assert records[0].reason == "no answer within its time limit of 1 s"
    assert time.monotonic() - begun < 30


def test_a_time_limit_longer_than_select_can_wait_is_a_time_limit(tmp_path: Path) -> None:
    (record,) = run_cases(run_of(tmp_path / "s.jsonl", "a", limit_s=1e300), ignore)
    assert record.status == "ok"


def test_a_child_that_cannot_start_fails_its_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_FAILS", "1")
    (record,) = run_cases(run_of(tmp_path / "s.jsonl", "a"), ignore)
    assert (record.status, record.reason) == (
        "failed",
        "process ended with exit code 1: cannot start",
    )


def test_what_a_case_prints_is_not_mistaken_for_its_reply(tmp_path: Path) -> None:
    (record,) = run_cases(run_of(tmp_path / "s.jsonl", "chatty"), ignore)
    assert record.status == "ok"


def test_workers_are_shared_when_reused_and_fresh_when_not(tmp_path: Path) -> None:
    shared = run_cases(run_of(tmp_path / "a.jsonl", "a", "b"), ignore)
    fresh = run_cases(run_of(tmp_path / "b.jsonl", "a", "b", reuse=False), ignore)
    assert pid(shared[0]) == pid(shared[1])
    assert pid(fresh[0]) != pid(fresh[1])


def test_progress_hears_of_the_beginning_and_the_end_of_each_case(tmp_path: Path) -> None:
    heard: list[tuple[str, str | None]] = []

    def hear(progress: Progress) -> None:
        record = progress.record
        heard.append((progress.case.variant, record.status if record else None))

    run_cases(run_of(tmp_path / "s.jsonl", "a", "oom"), hear)
    assert heard == [("a", None), ("a", "ok"), ("oom", None), ("oom", "oom")]


def test_an_error_of_the_caller_ends_the_run(tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        if progress.record is not None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_cases(run_of(tmp_path / "s.jsonl", "a", "b"), fail)
    assert [r.variant for r in read_records(tmp_path / "s.jsonl")] == ["a"]


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MembenchError, match=r"cannot write results to .*--results"):
        run_cases(run_of(tmp_path / "file" / "s.jsonl", "exit"), ignore)


def test_finished_cases_are_those_that_nothing_has_changed_for(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    plan = run_of(path, "a", "oom", "bug", "b")
    assert finished_cases(plan) == {}
    run_cases(plan, ignore)
    assert {r.variant for r in finished_cases(plan).values()} == {"a", "oom", "b"}

    changed = replace(plan, cases=[case("a", seed=1), case("b", time_limit_s=60.0)])
    assert {r.variant for r in finished_cases(changed).values()} == {"b"}
    made_here = plan.environment
    for environment in (
        replace(made_here, torch="2.11.0"),
        replace(made_here, membench="next"),
        replace(made_here, commit="abc"),
        replace(made_here, card_hash="abc"),
        replace(made_here, allocator_settings="expandable_segments:True"),
    ):
        assert finished_cases(replace(plan, environment=environment)) == {}, environment
    other_tracer = replace(plan, backend=replace(plan.backend, tracer="cpu"))
    assert finished_cases(other_tracer) == {}


# -- a run with a time limit --------------------------------------------------------------------


def within(plan: Run, seconds: float) -> Run:
    return replace(plan, limit=TimeLimit.from_now(seconds))


def timeouts(path: Path) -> list[str]:
    return [r.variant for r in read_records(path) if r.status == "timeout"]


def test_a_case_that_had_most_of_the_run_is_recorded_and_the_others_are_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s.jsonl"
    begun = time.monotonic()
    # The child's start is part of the run too, and takes what it takes on a busy machine.
    begun_with: list[str] = []
    plan = within(run_of(path, "hang", "b"), 8.0)
    records = run_cases(plan, lambda progress: begun_with.append(progress.case.variant))
    assert set(begun_with) == {"hang"}
    assert time.monotonic() - begun < 40
    assert [(r.variant, r.status) for r in records] == [("hang", "timeout")]
    assert "what was left of the run's time limit of 8 s" in records[0].reason


def test_a_case_that_had_little_of_the_run_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    plan = run_of(path, "sleep5", "hang")
    records = run_cases(within(plan, 8.0), ignore)
    assert [(r.variant, r.status) for r in records] == [("sleep5", "ok")]
    assert [r.variant for r in read_records(path)] == ["sleep5"]
    assert [case.variant for case in untried_first(plan)] == ["hang", "sleep5"]


def test_a_case_has_no_more_of_the_run_than_its_own_limit(tmp_path: Path) -> None:
    plan = run_of(tmp_path / "s.jsonl", "hang", "b", limit_s=0.5)
    records = run_cases(within(plan, 60.0), ignore)
    assert [(r.variant, r.status) for r in records] == [("hang", "timeout"), ("b", "ok")]
    assert records[0].reason == "no answer within its time limit of 0.5 s"


def test_a_record_whose_definition_is_no_cases_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    plan = run_of(path, "a")
    (record,) = run_cases(plan, ignore)
    append_record(path, replace(record, definition={}))
    assert finished_cases(plan) == {}


def test_a_run_goes_on_with_cases_that_were_never_tried(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    run_cases(run_of(path, "bug", "a"), ignore)
    plan = run_of(path, "bug", "a", "new", "b")
    assert [case.variant for case in untried_first(plan)] == ["new", "b", "bug", "a"]


def test_two_time_limits_in_a_row_end_a_case_for_runs_with_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    plan = run_of(path, "hang", limit_s=0.2)
    limited = within(plan, 60.0)
    run_cases(plan, ignore)
    assert finished_cases(limited) == {}
    run_cases(plan, ignore)
    assert [r.status for r in finished_cases(limited).values()] == ["timeout"]
    assert finished_cases(plan) == {}  # whoever has all the time in the world tries it again
    assert timeouts(path) == ["hang", "hang"]
    newer = replace(limited, environment=replace(plan.environment, torch="2.11.0"))
    assert finished_cases(newer) == {}


def test_a_time_limit_after_another_failure_is_the_first_one(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    plan = run_of(path, "hang", limit_s=0.2)
    (record,) = run_cases(plan, ignore)
    for status in ("failed", "timeout"):
        append_record(path, replace(record, status=status))
    assert finished_cases(within(plan, 60.0)) == {}


# A shell's background jobs ignore Ctrl-C, and so would all that they start: these tests too.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tests.bench.test_runner import run_of
from bench.runner import run_cases
def say(progress):
    if progress.record is not None:
        print(progress.case.variant, progress.record.environment.notes[-1], flush=True)
run_cases(run_of(Path(sys.argv[1]), "a", "b", "hang", "c", limit_s=1000), say)
"""


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent on Linux only")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_run_keeps_what_finished_and_leaves_no_child(
    tmp_path: Path, how: signal.Signals
) -> None:
    path = tmp_path / "s.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    first, second = process.stdout.readline().split(), process.stdout.readline().split()
    child = int(second[-1])
    assert (first[0], second[0]) == ("a", "b")
    os.kill(process.pid, how)
    process.wait(60)
    process.stdout.close()
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    assert [json.loads(line)["variant"] for line in path.read_text().splitlines()] == ["a", "b"]
