"""``membench fidelity --trace``: predicted events beside recorded ones, and where the two part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.export.recording import record_run
from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf
from bench.predict.allocator import DEFAULT_POOL
from bench.predict.cards import find_card
from bench.predict.step_trace import Event, Site, Trace
from bench.predict.trace import RecordedSegment, TraceEvent
from bench.predict.trace import Trace as RecordedTrace
from bench.predict.trace_writer import write_reduced_trace
from bench.record import Record
from bench.trace_alignment import align
from bench.units import MIB
from tests.bench.test_fidelity import invoke, measured, results

FIRST, SECOND = Site("enc.0", "aten.a.default", "f.py:1"), Site("enc.1", "aten.b.default", "f.py:2")


def predicted_events(*events: Event) -> Trace:
    count = sum(event[0] == "alloc" for event in events)
    sites = [FIRST, *([SECOND] * (count - 1))]
    return Trace(events=list(events), sites=sites, categories=["temporary"] * count)


def recorded_events(*events: tuple[str, int, int]) -> RecordedTrace:
    return RecordedTrace(
        device=0,
        settings=AllocatorSettings(),
        segments=(),
        events=tuple(
            TraceEvent(kind, address, size, 0, DEFAULT_POOL, place)  # type: ignore[arg-type]
            for place, (kind, address, size) in enumerate(events)
        ),
        reserved_start_bytes=0,
        reserved_peak_bytes=0,
        reserved_end_bytes=0,
    )


SAME = (("alloc", 10, 1000), ("alloc", 20, 5000), ("free", 10, 1000), ("alloc", 10, 700))


def test_equal_events_agree_to_the_end_whatever_the_order_of_frees() -> None:
    ours = predicted_events(
        *(("alloc", 0, 1000, 0), ("phase", "forward"), ("alloc", 1, 5000, 0)),
        *(("alloc", 2, 700, 0), ("free", 1), ("free", 0), ("alloc", 3, 9, 0)),
    )
    began = (*SAME[:2], ("alloc", 30, 700))
    theirs = recorded_events(*began, ("free", 10, 1000), ("free", 20, 5000), ("alloc", 10, 9))

    found = align(ours, theirs)

    assert (found.events, found.agreeing, found.first) == (6, 6, None)


def test_the_first_operator_where_they_part_is_named() -> None:
    ours = predicted_events(
        *(("alloc", 0, 1000, 0), ("alloc", 1, 6000, 0), ("free", 0), ("alloc", 2, 700, 0))
    )

    found = align(ours, recorded_events(*SAME))

    assert found.agreeing == 1
    assert str(found.first) == (
        "aten.b.default in enc.1 (f.py:2): predicted an allocation of 6144 bytes, "
        "recorded an allocation of 5120 bytes, its event 1"
    )


def test_a_workspace_that_differs_is_named_and_the_tensors_are_followed_on() -> None:
    ours = predicted_events(
        *(("alloc", 0, 1000, 0), ("alloc", 1, 2048, 0), ("free", 1)),
        *(("alloc", 2, 5000, 0), ("free", 0), ("alloc", 3, 700, 0)),
    )
    theirs = recorded_events(SAME[0], ("alloc", 30, 4096), ("free", 30, 4096), *SAME[1:])

    found = align(ours, theirs)

    assert (found.agreeing, found.parting) == (4, None)
    assert (found.temporaries, found.temporaries_agreeing) == (1, 0)
    assert found.temporary is not None
    assert found.temporary.predicted == "a temporary of 2048 bytes"
    assert found.temporary.recorded == "one of 4096 bytes"


def test_a_trace_that_begins_at_a_later_phase_is_found_there() -> None:
    ours = predicted_events(
        *(("alloc", 0, 9000, 0), ("phase", "forward"), ("alloc", 1, 1000, 0)),
        *(("alloc", 2, 5000, 0), ("free", 0), ("free", 1), ("alloc", 3, 700, 0)),
    )
    theirs = recorded_events(*SAME[:2], ("free", 99, 0), *SAME[2:])

    found = align(ours, theirs)

    assert (found.agreeing, found.events, found.parting) == (5, 5, None)


def test_a_prediction_that_ends_early_says_so() -> None:
    found = align(predicted_events(("alloc", 0, 1000, 0)), recorded_events(*SAME))
    assert found.parting is not None
    assert found.parting.predicted == "nothing more"


def test_the_command_aligns_the_events_of_a_real_case_with_its_own_recording(
    tmp_path: Path,
) -> None:
    """What the simulator would have recorded agrees to the end; a record of half a size parts."""
    from bench.predicted_trace import predicted_trace

    record = measured(requested_shape=(16, 16, 16))
    trace = predicted_trace(record)
    entries = record_run(trace, find_card("v100-32gb").capacity_bytes, AllocatorSettings()).entries
    kinds = {"alloc": "alloc", "free_completed": "free"}
    rows = [(kinds[e.action], e.address, e.size) for e in entries if e.action in kinds]
    write_reduced_trace(tmp_path / "t.json.gz", recorded_events(*rows))
    folder = results(tmp_path, record)

    done = invoke(folder, "--trace", tmp_path / "t.json.gz", "--json")

    found = json.loads(done.stdout)
    assert found["agreeing"] == found["events"] > 500
    assert found["temporaries_agreeing"] == found["temporaries"] > 20
    place = next(n for n, row in enumerate(rows) if row[0] == "alloc" and row[2] > 10_000)
    rows[place] = ("alloc", rows[place][1], rows[place][2] // 2)
    write_reduced_trace(tmp_path / "t.json.gz", recorded_events(*rows))
    parted = invoke(folder, "--trace", tmp_path / "t.json.gz").stdout
    assert "tensors part at aten." in parted


# -- what is said to need nothing, and where a recording begins ----------------------------------


def sited_events(*events: Event) -> Trace:
    """Events of which each allocation has an operator of its own: ``aten.op0.default``, ..."""
    count = sum(event[0] == "alloc" for event in events)
    sites = [Site(f"layer{n}", f"aten.op{n}.default", "f.py:1") for n in range(count)]
    return Trace(events=list(events), sites=sites, categories=["temporary"] * count)


def test_a_workspace_predicted_to_be_nothing_is_no_event_but_names_who_took_one() -> None:
    """The card says 0 bytes; the recording has 32 MiB. Only the workspace differs."""
    ours = sited_events(
        *(("alloc", 0, 1000, 0), ("alloc", 1, 0, 0), ("free", 1), ("alloc", 2, 5000, 0)),
        *(("alloc", 3, 0, 0), ("free", 3), ("free", 0), ("alloc", 4, 700, 0)),
    )
    workspace = (("alloc", 30, 32 * MIB), ("free", 30, 32 * MIB))
    with_one = recorded_events(SAME[0], *workspace, *SAME[1:])

    assert align(ours, recorded_events(*SAME)).first is None
    found = align(ours, with_one)
    assert (found.agreeing, found.parting) == (4, None)
    assert str(found.temporary) == (
        "aten.op1.default in layer1 (f.py:1): predicted no temporary, "
        f"recorded one of {32 * MIB} bytes, its event 1"
    )


def test_frees_around_an_allocation_of_nothing_still_have_no_order() -> None:
    ours = sited_events(
        *(("alloc", 0, 1000, 0), ("alloc", 1, 5000, 0), ("free", 1), ("alloc", 2, 0, 0)),
        *(("free", 0), ("free", 2), ("alloc", 3, 700, 0)),
    )
    theirs = recorded_events(*SAME[:2], ("free", 10, 1000), ("free", 20, 5000), ("alloc", 10, 700))
    assert align(ours, theirs).first is None


def test_a_temporary_that_nothing_predicted_is_named_by_the_operator_after_it() -> None:
    ours = sited_events(("alloc", 0, 1000, 0), ("alloc", 1, 5000, 0), ("free", 0))
    theirs = recorded_events(SAME[0], ("alloc", 30, 4096), ("free", 30, 4096), *SAME[1:3])

    found = align(ours, theirs)

    assert found.temporary is not None
    assert (found.temporary.operator, found.temporary.predicted) == (
        "aten.op1.default",
        "no temporary",
    )
    assert found.parting is None


def optimizer_like_the_model() -> Trace:
    """The second phase allocates as the recording does; the first one parts at its first event."""
    return sited_events(
        *(("alloc", 0, 9000, 0), ("phase", "optimizer")),
        *(("alloc", 1, 1000, 0), ("alloc", 2, 5000, 0), ("alloc", 3, 700, 0)),
    )


def test_a_recording_that_begins_with_nothing_begins_where_the_prediction_does() -> None:
    """Adam's states are as large as the weights, in their order: no place to take for a start."""
    rows = (("alloc", 10, 1000), ("alloc", 20, 5000), ("alloc", 30, 700))

    found = align(optimizer_like_the_model(), recorded_events(*rows))

    assert found.agreeing == 0
    assert found.parting is not None
    assert found.parting.operator == "aten.op0.default"


def test_a_recording_that_begins_with_memory_held_may_begin_at_any_phase() -> None:
    rows = (("alloc", 10, 1000), ("alloc", 20, 5000), ("alloc", 30, 700))
    held = RecordedSegment(address=0, size=2 * MIB, stream=0, small=True)
    theirs = dataclasses.replace(recorded_events(*rows), segments=(held,))

    assert align(optimizer_like_the_model(), theirs).agreeing == 3


def test_settings_that_round_sizes_up_round_the_predicted_ones_too() -> None:
    """In halves of a power of two, 5000 bytes take 4096 + 2048 on either side."""
    settings = parse_alloc_conf("roundup_power2_divisions:2")
    theirs = dataclasses.replace(recorded_events(("alloc", 10, 6144)), settings=settings)
    assert align(sited_events(("alloc", 0, 5000, 0)), theirs).first is None


# -- the command ----------------------------------------------------------------------------------


def of_case(path: Path, record: Record, *rows: tuple[str, int, int]) -> Path:
    """Write a trace that says which case it is of, as those that a session records do."""
    about = {"definition": record.definition}
    write_reduced_trace(path, recorded_events(*rows or SAME), about)
    return path


def test_a_trace_of_several_cases_is_misuse(tmp_path: Path) -> None:
    write_reduced_trace(tmp_path / "t.json.gz", recorded_events(*SAME))
    folder = results(tmp_path, measured(), measured(variant="b"))
    done = invoke(folder, "--trace", tmp_path / "t.json.gz")
    assert done.exit_code == 2
    assert "--trace is of one case, name it with --case" in done.stderr


def test_a_trace_that_says_its_case_is_compared_with_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def predicted(record: Record) -> Trace:
        asked.append(record.case)
        return predicted_events(("alloc", 0, 1000, 0))

    monkeypatch.setattr("bench.predicted_trace.predicted_trace", predicted)
    small, large = measured(), measured(variant="b", requested_shape=(128, 128, 128))
    folder = results(tmp_path, large, small)

    done = invoke(folder, "--trace", of_case(tmp_path / "t.json.gz", large), "--json")

    assert asked == [large.case]
    assert json.loads(done.stdout)["agreeing"] == 1


def test_a_trace_of_another_case_is_misuse_and_says_which(tmp_path: Path) -> None:
    other = measured(variant="b", requested_shape=(128, 128, 128))
    trace = of_case(tmp_path / "t.json.gz", other)

    done = invoke(results(tmp_path, measured()), "--trace", trace)

    assert done.exit_code == 2
    assert f"is of {other.case}, of which there is no such measured record" in done.stderr
    assert measured().case in done.stderr


def test_a_trace_with_a_definition_of_another_form_is_misuse(tmp_path: Path) -> None:
    write_reduced_trace(
        tmp_path / "t.json.gz", recorded_events(*SAME), {"definition": {"network": 3}}
    )
    done = invoke(results(tmp_path, measured()), "--trace", tmp_path / "t.json.gz")
    assert done.exit_code == 2
    assert "t.json.gz: " in done.stderr


def test_a_record_that_cannot_be_read_is_not_the_traces(tmp_path: Path) -> None:
    broken = dataclasses.replace(measured(), definition={"network": "none such"})
    trace = of_case(tmp_path / "t.json.gz", measured())
    done = invoke(results(tmp_path, broken), "--trace", trace)
    assert done.exit_code == 2
    assert "no such measured record" in done.stderr


def test_events_that_do_not_agree_at_all_may_be_of_another_case_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(_: Record) -> Trace:
        return predicted_events(("alloc", 0, 7000, 0))

    monkeypatch.setattr("bench.predicted_trace.predicted_trace", predicted)
    write_reduced_trace(tmp_path / "t.json.gz", recorded_events(*SAME))

    done = invoke(results(tmp_path, measured()), "--trace", tmp_path / "t.json.gz")

    assert "tensors part at aten.a.default in enc.0" in done.stdout
    assert "nothing agrees: is the trace of another case?" in done.stderr
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("option", "value"), [("--output", "reports"), ("--keep", "kept"), ("--time-limit", "9")]
)
def test_options_of_a_comparison_are_refused_beside_a_trace(
    tmp_path: Path, option: str, value: str
) -> None:
    trace = of_case(tmp_path / "t.json.gz", measured())
    done = invoke(results(tmp_path, measured()), "--trace", trace, option, value)
    assert done.exit_code == 2
    assert f"leave out {option}" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read trace"),
        (b"", "it is empty"),
        (b'{"a": 1}', "it has neither"),
        (b"[]", "it holds a list"),
        (b"\x1f\x8b\x08\x00cut", "its gzip data is damaged"),
        (b'{"events": []}', "its list of events is empty"),
        (b"hello", "is not a memory trace"),
    ],
)
def test_a_file_that_is_no_trace_exits_with_2_and_one_line(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    folder = results(tmp_path, measured())
    done = invoke(folder, "--trace", tmp_path / "t")
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
