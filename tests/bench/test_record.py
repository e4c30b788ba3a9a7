"""Records on disk: nothing finished is lost, nothing foreign is taken for a record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.errors import MembenchError
from bench.record import (
    Holder,
    Peaks,
    Record,
    append_record,
    last_records,
    read_records,
    results_file,
)
from tests.bench.records import GIB, make_record


def full_record(**overrides: Any) -> Record:
    """Return a record in which no field is empty."""
    values: dict[str, Any] = {
        "techniques": ("checkpoint", "inplace_abn"),
        "uncalibrated": ("context",),
        "phases": {"forward": Peaks(peak_allocated_bytes=GIB), "backward": Peaks()},
        "peak_holders": (
            Holder(
                module="encoder.0",
                operator="aten.convolution",
                source_line="blocks.py:12",
                category="activation",
                bytes=3,
            ),
        ),
        "step_times_s": (0.1, 0.30000000000000004),
        "capped_to": "rtx4090-24gb",
        "volumes": ("head.nii.gz",),
        "environment": {"notes": ("one", "two"), "seed": 3, "gpu": "Tëst “GPU”"},
    }
    return make_record(**{**values, **overrides})


def test_a_record_comes_back_from_its_line_as_it_was() -> None:
    record = full_record()
    assert Record.from_dict(json.loads(record.to_json())) == record


def test_a_record_is_one_line_of_ascii() -> None:
    line = full_record(status="failed", reason="first\nsecond", process_bytes=None).to_json()
    assert "\n" not in line
    assert line.isascii()


def test_fields_of_a_later_version_are_ignored_at_every_depth() -> None:
    record = full_record()
    data = json.loads(record.to_json())
    for place in (data, data["environment"], data["parts"], data["phases"]["forward"]):
        place["later"] = {"x": 1}
    data["peak_holders"][0]["later"] = 1
    assert Record.from_dict(data) == record


def test_fields_that_an_earlier_version_lacked_have_their_defaults() -> None:
    data = json.loads(make_record().to_json())
    for name in ("parts", "uncalibrated", "phases", "peak_holders", "step_times_s", "volumes"):
        del data[name]
    record = Record.from_dict(data)
    assert (record.uncalibrated, record.phases, record.volumes) == ((), {}, ())
    assert record.parts.context_bytes is None


@pytest.mark.parametrize("status", ["oom", "failed", "timeout", "skipped"])
def test_every_status_but_ok_needs_a_reason(status: str) -> None:
    with pytest.raises(ValueError, match="reason ''"):
        make_record(status=status, reason="")


def test_an_ok_record_has_no_reason() -> None:
    with pytest.raises(ValueError, match="reason 'why'"):
        make_record(reason="why")


def test_an_ok_record_has_the_bytes_of_the_process() -> None:
    with pytest.raises(ValueError, match="process_bytes"):
        make_record(process_bytes=None)


@pytest.mark.parametrize(("field", "value"), [("status", "fine"), ("evidence", "guessed")])
def test_a_word_that_is_not_one_of_the_record_s_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        make_record(**{"reason": "why", field: value})


def test_results_lie_by_card_suite_and_evidence() -> None:
    path = results_file(Path("results"), "v100-32gb", "table1", "predicted")
    assert path == Path("results/v100-32gb/table1.predicted.jsonl")


def test_appended_records_are_read_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = [full_record(variant=f"v{i}") for i in range(3)]
    for record in records:
        append_record(path, record)
    assert list(read_records(path)) == records
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - closed by append_record
    monkeypatch.setattr(Path, "open", lambda *_: full)
    with pytest.raises(MembenchError) as error:
        append_record(path, make_record())
    assert f"to {path}: No space left on device; " in str(error.value)
    assert "--resume" in str(error.value)


@pytest.mark.parametrize("settings_line", ["{", '{"ca', '{"case":"fcn'])
def test_a_line_cut_right_after_its_start_is_left_out(tmp_path: Path, settings_line: str) -> None:
    path = tmp_path / "r.jsonl"
    append_record(path, make_record())
    with path.open("a") as file:
        file.write(settings_line)
    assert list(read_records(path)) == [make_record()]


_LINE = full_record(reason='a \\ "quoted" é reason', status="oom", process_bytes=None).to_json()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=1, max_value=len(_LINE) - 1))
def test_wherever_a_line_is_cut_off_the_other_records_are_read(tmp_path: Path, cut: int) -> None:
    """Cut at any byte, then appended to: the cut line costs itself and nothing else."""
    path = tmp_path / "r.jsonl"
    path.write_text(make_record().to_json() + "\n" + _LINE[:cut])
    assert list(read_records(path)) == [make_record()]
    append_record(path, make_record(variant="later"))
    assert list(read_records(path)) == [make_record(), make_record(variant="later")]


def test_a_line_that_lacks_only_its_end_of_line_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(make_record().to_json())
    append_record(path, make_record(variant="later"))
    assert [record.variant for record in read_records(path)] == ["baseline", "later"]


def test_empty_lines_and_an_empty_file_hold_no_records(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("")
    assert list(read_records(path)) == []
    path.write_text("\n  \n" + make_record().to_json() + "\n\n")
    assert list(read_records(path)) == [make_record()]


def _without(name: str) -> str:
    data = json.loads(make_record().to_json())
    del data[name]
    return json.dumps(data)


def _with(**fields: Any) -> str:
    return json.dumps({**json.loads(make_record().to_json()), **fields})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("what is this", "Expecting value"),
        ('what is {"case":', "Expecting value"),
        (make_record().to_json().replace(':"fcn"', ":fcn"), "Expecting value"),
        (make_record().to_json()[:-2] + "x}", "Expecting"),
        ("[]", "no case, network"),
        ("17", "not iterable"),
        ("{}", "no case, network"),
        (_without("shape"), "no shape"),
        (_without("environment"), "no environment"),
        (_with(environment=None), "NoneType"),
        (_with(process_bytes="3 GiB"), "process_bytes is '3 GiB'"),
        (_with(peak_reserved_bytes=1.5), "peak_reserved_bytes is 1.5"),
        (_with(capacity_bytes=True), "capacity_bytes is True"),
        (_with(parts={"context_bytes": "x"}), "context_bytes is 'x'"),
        (_with(shape=["a"]), "shape is 'a'"),
        (_with(status="fine", reason="why"), "status 'fine'"),
        (_with(reason="why"), "status 'ok' with reason 'why'"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_its_file(
    tmp_path: Path, line: str, why: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{make_record().to_json()}\n{line}\n{make_record().to_json()}\n")
    with pytest.raises(MembenchError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}, line 2: not a record: ")
    assert why in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MembenchError, match=r"absent\.jsonl"):
        list(read_records(tmp_path / "absent.jsonl"))
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(MembenchError, match=r"cannot read results .*b\.jsonl"):
        list(read_records(binary))


def test_the_last_record_of_a_case_counts_in_the_place_of_the_first() -> None:
    first, other = make_record(needs_bytes=1), make_record(variant="other")
    again = make_record(needs_bytes=2)
    assert last_records([first, other, again]) == [again, other]


@pytest.mark.parametrize(
    "difference",
    [
        {"evidence": "measured"},
        {"card": "h200-141gb"},
        {"capped_to": "rtx4090-24gb"},
        {"environment": {"suite": "other"}},
    ],
    ids=str,
)
def test_what_was_made_otherwise_is_a_case_of_its_own(difference: dict[str, Any]) -> None:
    records = [make_record(), make_record(**difference)]
    assert last_records(records) == records


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_record().case = "other"  # type: ignore[misc]
