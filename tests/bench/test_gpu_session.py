"""The GPU session: which commands it runs, that it goes on after a failure, what it packs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_session
from bench.errors import MembenchError
from bench.gpu import GpuIdentity
from bench.gpu_session import Outcome, Part, main, pack, plan, run_part

IDENTITY = GpuIdentity(name="NVIDIA H200", uuid="GPU-1", memory_bytes=2**37, card="h200-141gb")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of two suites."""
    folder = tmp_path / "suites"
    folder.mkdir()
    for name in ("table2.yaml", "table1.yaml"):
        (folder / name).write_text("")
    return tmp_path


def python(name: str, code: str) -> Part:
    return Part(name, (sys.executable, "-c", code))


def test_a_session_tests_calibrates_measures_predicts_both_ways_and_compares(tree: Path) -> None:
    parts = plan(Path("/r"), "h200-141gb", root=tree)

    assert [part.name for part in parts] == [
        *("tests", "calibrate", "measure-table1", "measure-table2"),
        *("traces-table1", "traces-table2", "bench"),
        *("predict-table1", "predict-shim-table1", "predict-table2", "predict-shim-table2"),
        "fidelity",
    ]
    by_name = {part.name: part for part in parts}
    run = (sys.executable, "-m", "bench", "run", "table1")
    assert by_name["measure-table1"].command == (
        *(*run, "--device", "cuda", "--results", "/r", "--resume"),
    )
    predicted = (*run, "--device", "predict", "--card", "h200-141gb", "--resume", "--results")
    assert by_name["predict-table1"].command == (*predicted, "/r")
    assert by_name["predict-table1"].environment == (("MEMBENCH_CARDS", "/r/cards"),)
    assert by_name["predict-shim-table1"].command == (*predicted, "/r.shim")
    assert dict(by_name["predict-shim-table1"].environment)["MEMBENCH_TRACER"] == "cuda-shim"
    assert by_name["calibrate"].command[-3:] == ("calibrate", "-o", "/r/cards")
    limited = {part.name for part in parts if part.keeps_limit}
    assert limited == set(by_name) - {"tests", "bench"}
    assert by_name["fidelity"].command[-5:] == (
        *("/r/h200-141gb", "--output", "/r/reports", "--keep", "/r.shim/fidelity"),
    )
    assert by_name["tests"].command[1:5] == ("-m", "pytest", "-m", "gpu")
    assert "tests/benchmarks" in by_name["bench"].command


def test_proposals_of_plans_are_run_capped_to_the_cards_they_were_made_for(tree: Path) -> None:
    made = tree / "results" / "plans" / "rtx4060-8gb.yaml"
    made.parent.mkdir(parents=True)
    made.write_text("")
    parts = plan(Path("/r"), "h200-141gb", ("plans",), tree)
    assert [(part.name, part.command[1:]) for part in parts] == [
        (
            "plans-rtx4060-8gb",
            (
                *("-m", "bench", "run", str(made), "--device", "cuda", "--card", "rtx4060-8gb"),
                *("--results", "/r", "--resume"),
            ),
        )
    ]


def test_parts_are_run_one_by_one_and_the_archive_keeps_the_earlier_ones(
    session: tuple[Path, list[str]],
) -> None:
    archive, arguments = session

    assert main([*arguments, "--only", "second"]) == 1
    assert main([*arguments, "--only", "first"]) == 0

    with tarfile.open(archive) as tar:
        member = tar.extractfile("logs/summary.json")
        assert member is not None
        summary = json.load(member)
        assert {"logs/first.log", "logs/second.log"} <= set(tar.getnames())
    assert [(o["name"], o["exit_code"]) for o in summary["outcomes"]] == [
        ("second", 3),
        ("first", 0),
    ]


def test_a_part_that_is_not_planned_is_misuse(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*session[1], "--only", "frist"]) == 2
    assert "no part is called 'frist' (did you mean 'first'?)" in capsys.readouterr().err


def test_an_archive_of_another_card_is_not_gone_on_with(
    session: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, arguments = session
    main([*arguments, "--only", "second"])
    other = dataclasses.replace(IDENTITY, card="a100-40gb")
    monkeypatch.setattr(gpu_session, "gpu_identity", lambda: other)

    main([*arguments, "--only", "first"])

    with tarfile.open(archive) as tar:
        assert "logs/second.log" not in tar.getnames()


def test_a_file_that_is_no_archive_is_named(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    archive, arguments = session
    archive.parent.mkdir()
    archive.write_text("not an archive")

    assert main(arguments) == 2
    assert "is no archive of a session" in capsys.readouterr().err


def test_each_part_has_a_limit_of_its_own_and_its_environment(
    session: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, time; print(os.environ['WORD'], flush=True); time.sleep(60)"
    part = Part("slow", (sys.executable, "-c", code), (("WORD", "said"),))
    monkeypatch.setattr(gpu_session, "plan", lambda *_, **__: [part])

    assert main([*session[1], "--part-limit", "1"]) == 1

    with tarfile.open(session[0]) as tar:
        log = tar.extractfile("logs/slow.log")
        assert log is not None
        assert log.read().startswith(b"said\n")


def test_the_kinds_of_parts_can_be_chosen(tree: Path) -> None:
    names = [part.name for part in plan(Path("/r"), "c", kinds=("predict",), root=tree)]

    assert names == [f"predict{shim}-{s}" for s in ("table1", "table2") for shim in ("", "-shim")]


def test_suites_can_be_chosen_and_come_in_the_order_given(tree: Path) -> None:
    parts = plan(Path("/r"), "c", ("measure",), tree, ["table2", "table1"])

    assert [part.name for part in parts] == ["measure-table2", "measure-table1"]


def test_what_the_chosen_suites_call_is_calibrated_but_never_what_it_must_not_see(
    tree: Path,
) -> None:
    (tree / "suites" / "heldout.yaml").write_text("")
    named = sorted(path.stem for path in (tree / "suites").glob("*.yaml"))
    (chosen,) = plan(Path("/r"), "h200-141gb", ("calibrate",), tree, suites=named)
    (of_all,) = plan(Path("/r"), "h200-141gb", ("calibrate",), tree)

    asked = [value for option, value in pairwise(chosen.command) if option == "--suite"]
    assert (asked, "heldout" in named) == ([name for name in named if name != "heldout"], True)
    assert "--suite" not in of_all.command


def test_a_suite_that_is_not_there_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--suites", "tabel1"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no suite is called 'tabel1' (did you mean 'table1'")


def test_a_dry_run_prints_the_commands_and_asks_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_session, "gpu_identity", lambda: pytest.fail("asked for a GPU"))

    assert main(["--dry-run", "--parts", "tests", "--results", str(tmp_path)]) == 0

    assert capsys.readouterr().out == (
        f"tests: {sys.executable} -m pytest -m gpu --continue-on-collection-errors "
        "-W default tests\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_the_session_says_so_and_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> GpuIdentity:
        raise MembenchError("no CUDA GPU found: here")

    monkeypatch.setattr(gpu_session, "gpu_identity", none)

    assert main([]) == 2
    assert capsys.readouterr().err == "error: no CUDA GPU found: here\n"


def test_a_part_runs_in_the_source_tree_with_it_on_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "only_here.py").write_text("print('imported')")
    log = tmp_path / "log"

    outcome = run_part(python("p", "import os, only_here; print(os.getcwd())"), log, root=tmp_path)

    assert (outcome.name, outcome.exit_code) == ("p", 0)
    assert log.read_text() == f"imported\n{tmp_path.resolve()}\n"
    assert capsys.readouterr().out == log.read_text()


def test_what_a_part_says_on_stderr_is_logged_with_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"

    outcome = run_part(python("p", "import sys; sys.exit('broken')"), log)

    assert outcome.exit_code == 1
    assert log.read_text() == "broken\n"


def test_a_part_that_keeps_a_limit_is_told_nine_tenths_of_its_own() -> None:
    part = Part("measure-table1", ("run", "table1"), keeps_limit=True)

    assert part.within(590.0).command == ("run", "table1", "--time-limit", "531")
    assert part.within(0.5).command[-1] == "1"  # the least that the commands take
    assert Part("tests", ("pytest",)).within(590.0).command == ("pytest",)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('fine')", ""),
        ("import sys; print('one'); sys.exit('3 cases are left')", "exit code 1: 3 cases are left"),
        ("raise SystemExit(4)", "exit code 4"),
        (
            "import os, signal; print('x', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            "killed by SIGSEGV: x",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 5)", "killed by signal 39"),
        (
            "import time; print('begun', flush=True); time.sleep(60)",
            "ended at its limit of 2 s: KeyboardInterrupt",
        ),
    ],
)
def test_how_a_part_ended_is_said_with_its_last_line(
    tmp_path: Path, code: str, reason: str
) -> None:
    assert run_part(python("p", code), tmp_path / "log", limit_s=2.0).reason == reason


def test_a_part_past_its_limit_is_ended(tmp_path: Path) -> None:
    waiting = python("p", "import time; print('begun', flush=True); time.sleep(60)")

    outcome = run_part(waiting, tmp_path / "log", limit_s=1.0)

    assert outcome.exit_code == -2  # asked as Ctrl-C asks
    assert outcome.seconds < 30


def test_a_part_whose_log_cannot_be_written_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remembered(*positional: Any, **named: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*positional, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remembered)

    with pytest.raises(IsADirectoryError):
        run_part(python("p", "import time; time.sleep(60)"), tmp_path)
    assert [process.poll() for process in started] == [-9]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[str]]:
    """A session of three parts of which the second fails; returns its archive and arguments."""
    results = tmp_path / "results"
    record = f"p=pathlib.Path({str(results)!r}); p.mkdir(exist_ok=True); (p/'a.jsonl').touch()"
    parts = [
        python("first", "print('one')"),
        python("second", "raise SystemExit(3)"),
        python("third", f"import pathlib; {record}"),
    ]
    monkeypatch.setattr(gpu_session, "gpu_identity", lambda: IDENTITY)
    monkeypatch.setattr(gpu_session, "plan", lambda *_, **__: parts)
    archive = tmp_path / "out" / "session.tar.gz"
    return archive, ["--results", str(results), "--archive", str(archive)]


def test_a_part_that_fails_does_not_stop_the_others_and_is_not_forgotten(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    archive, arguments = session

    assert main(arguments) == 1

    printed = capsys.readouterr().out
    assert "h200-141gb: 2 of 3 parts passed" in printed
    assert "second: exit code 3, " in printed
    assert "first: ok, " in printed
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        member = tar.extractfile("logs/summary.json")
        assert member is not None
        summary = json.load(member)
    assert "results/a.jsonl" in names
    assert {"logs/first.log", "logs/second.log", "logs/third.log"} <= set(names)
    assert [o["exit_code"] for o in summary["outcomes"]] == [0, 3, 0]
    assert [o["reason"] for o in summary["outcomes"]] == ["", "exit code 3", ""]
    assert summary["planned"] == ["first", "second", "third"]


def test_a_session_whose_parts_all_pass_exits_0(
    session: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "plan", lambda *_, **__: [python("first", "")])

    assert main(session[1]) == 0


def test_the_archive_is_there_after_the_first_part_already(
    session: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, arguments = session
    seen: list[bool] = []

    def watched(part: Part, *_: object) -> Outcome:
        seen.append(archive.exists())
        return Outcome(part.name, 0, 0.0)

    monkeypatch.setattr(gpu_session, "run_part", watched)

    main(arguments)

    assert seen == [False, True, True]


def test_a_session_out_of_time_starts_nothing_more_and_has_not_passed(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*session[1], "--time-limit", "0"]) == 1

    assert "0 of 3 parts passed" in capsys.readouterr().out


def test_packing_again_replaces_the_archive_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    archive = tmp_path / "out" / "a.tar.gz"

    for number in (1, 2):
        pack(archive, tmp_path / "missing", logs, {"number": number})

    with tarfile.open(archive) as tar:
        member = tar.extractfile("logs/summary.json")
        assert member is not None
        assert json.load(member) == {"number": 2}
    assert [path.name for path in archive.parent.iterdir()] == ["a.tar.gz"]


def test_a_part_that_leaves_something_behind_is_not_waited_for(tmp_path: Path) -> None:
    code = "import os, time\nif os.fork() == 0: time.sleep(60)\nelse: print('done')"

    outcome = run_part(python("p", code), tmp_path / "log", limit_s=50)

    assert (outcome.exit_code, (tmp_path / "log").read_text()) == (0, "done\n")
    assert outcome.seconds < 30


def test_a_part_that_closes_its_output_still_has_its_limit(tmp_path: Path) -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep(60)"

    assert run_part(python("p", code), tmp_path / "log", limit_s=0.5).exit_code == -2


def test_an_archive_that_was_cut_off_is_named(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    archive, arguments = session
    main(arguments)
    archive.write_bytes(archive.read_bytes()[:-40])

    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{archive} is no archive of a session" in line


def test_an_archive_that_cannot_be_written_is_one_line_and_keeps_the_records(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")

    assert main(session[1]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write the archive {session[0]}: ")


def test_an_archive_within_the_results_is_misuse(
    session: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = session[1][1]

    assert main(["--results", results, "--archive", f"{results}/s.tar.gz"]) == 2
    assert "choose another place with --archive" in capsys.readouterr().err
