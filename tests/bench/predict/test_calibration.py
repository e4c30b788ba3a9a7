"""What a calibration answers: measured calls exactly, others from those like them, and says so."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bench.errors import MembenchError
from bench.predict.calibration import Calibration, Versions, read_calibration
from bench.predict.cards import Card, find_card
from bench.predict.library_calls import ConvolutionCall, OperatorCall, dtype_bytes
from bench.predict.step_trace import Site, Trace
from bench.predict.trace_data import decode_trace, encode_trace
from bench.predict.workspaces import fill_workspaces, uncalibrated_parts
from tests.bench.calibration_fixtures import convolution

SITE = Site("m", "op", "f.py:1")


def row(call: ConvolutionCall, workspace: int, benchmark: bool = False) -> dict[str, Any]:
    taken = {"workspace_bytes": workspace, "first_bytes": 2 * workspace}
    return {**call.to_dict(), "benchmark": benchmark, **taken}


def section(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "torch": "2.11.0+cu130",
        "context": {"networks_bytes": {}},
        "convolutions": list(rows),
        "operators": [],
        **changes,
    }


def calibration(*rows: dict[str, Any], **changes: Any) -> Calibration:
    found = read_calibration(section(*rows, **changes), "h200-141gb")
    assert found is not None
    return found


def card(*rows: dict[str, Any], **changes: Any) -> Card:
    return dataclasses.replace(find_card("h200-141gb"), calibration=section(*rows, **changes))


def event(call: ConvolutionCall) -> tuple[Any, ...]:
    return ("convolution", call.operand_bytes, "float32", call, SITE)


def test_a_measured_call_takes_what_it_took() -> None:
    found = calibration(row(convolution(8), 1000), row(convolution(16), 7)).convolution
    reading = found(convolution(8), False)
    assert reading is not None
    assert (reading.workspace_bytes, reading.first_bytes, reading.basis) == (1000, 2000, "measured")


def test_a_call_between_two_measured_ones_lies_between_them() -> None:
    """Voxels 8, 27 and 64: (27 - 8) / (64 - 8) = 19/56 of the way from 560 to 5600 bytes."""
    found = calibration(row(convolution(2), 560), row(convolution(4), 5600))

    reading = found.convolution(convolution(3), False)

    assert reading is not None
    assert reading.basis == "interpolated"
    assert reading.workspace_bytes == 560 + 5040 * 19 // 56
    assert reading.first_bytes == 2 * reading.workspace_bytes


@pytest.mark.parametrize(("side", "wanted"), [(8, 8 * 5600), (1, 560 // 8)])
def test_a_call_outside_takes_the_nearest_ones_share_of_its_operands(
    side: int, wanted: int
) -> None:
    found = calibration(row(convolution(2), 560), row(convolution(4), 5600))

    reading = found.convolution(convolution(side), False)

    assert reading is not None
    assert (reading.workspace_bytes, reading.basis) == (wanted, "extrapolated")


def test_calls_of_other_directions_types_or_settings_tell_nothing() -> None:
    found = calibration(row(convolution(8), 1000))
    for other in (
        convolution(8, dtype="float16"),
        convolution(8, direction="weight_gradient"),
        convolution(8, transposed=True),
    ):
        assert found.convolution(other, False) is None
    assert found.convolution(convolution(8), True) is None


def test_alike_calls_go_before_those_of_another_layout_or_kernel() -> None:
    pointwise = convolution(8, weight=(4, 4, 1, 1, 1))
    last = convolution(8, channels_last=True)
    both = calibration(row(pointwise, 5), row(convolution(16), 8000))
    assert _bytes(both, convolution(8)) == 1000
    assert _bytes(calibration(row(last, 77)), convolution(8)) == 77


def _bytes(found: Calibration, call: ConvolutionCall) -> int:
    reading = found.convolution(call, False)
    assert reading is not None
    return reading.workspace_bytes


def operator(side: int, name: str = "aten.gelu.default") -> OperatorCall:
    return OperatorCall(name, json.dumps([[{"tensor": [side], "dtype": "float32"}], {}]))


def test_an_operator_takes_what_was_measured_or_the_nearest_ones_share() -> None:
    rows = [{**operator(side)._asdict(), "temporary_bytes": side} for side in (16, 1024)]
    found = calibration(
        operators=[*rows, {**operator(4, "aten.b.c")._asdict(), "temporary_bytes": 0}]
    )

    assert found.operator(operator(16)) == (16, "measured")
    assert found.operator(operator(2048)) == (2048, "extrapolated")
    assert found.operator(operator(16, "aten.other.default")) == (0, "extrapolated")
    assert found.watched == {"aten.gelu.default"}


def test_an_operators_temporary_is_there_for_the_length_of_the_call() -> None:
    rows = [{**operator(16)._asdict(), "temporary_bytes": 640}]
    bare = Trace(
        events=[("operator", operator(16), SITE), ("operator", operator(5, "a.b.c"), SITE)]
    )

    assert fill_workspaces(bare, card(operators=rows)).events == [("alloc", 0, 640, 0), ("free", 0)]
    assert fill_workspaces(bare, find_card("h200-141gb")).events == []


def test_what_a_prediction_rests_on_is_named_by_kind() -> None:
    small, mid, big = convolution(2), convolution(3), convolution(4)
    calibrated = card(row(small, 560), row(big, 5600))
    odd = convolution(3, dtype="float16")

    def named(*calls: ConvolutionCall) -> tuple[str, ...]:
        return uncalibrated_parts([event(call) for call in calls], False, calibrated)

    assert named(small, big) == ()
    assert named(small, mid) == ("convolution workspace (interpolated)",)
    assert named(convolution(64), mid) == (
        "convolution workspace (interpolated)",
        "convolution workspace (extrapolated)",
    )
    assert named(odd) == ("convolution workspace",)
    old = ("convolution", 8, "half", SITE)  # without its call
    assert uncalibrated_parts([old], False, calibrated) == ("convolution workspace",)
    assert uncalibrated_parts([], False, find_card("t4-16gb")) == ("context",)


def test_a_card_that_knows_nothing_like_the_call_gives_its_estimate() -> None:
    h200 = card(row(convolution(8), 5))
    half = convolution(8, dtype="float16")
    bare = Trace(events=[("convolution", 1000, "half", half, SITE)])
    (_, _, size, _), _ = fill_workspaces(bare, h200).events
    assert size == h200.convolution_workspace_bytes("half", 1000)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 99}, "schema_version 99, this membench reads 1"),
        ({"convolutions": [{"benchmark": True}]}, "cannot be read: no direction"),
        ({"convolutions": [{**row(convolution(8), 1), "dtype": "int3"}]}, "'int3' is not known"),
        ({"convolutions": [{**row(convolution(8), 1), "input": [1, 2.5]}]}, "not a list of whole"),
        ({"convolutions": [{**row(convolution(8), 1), "groups": 0}]}, "is no convolution's"),
        ({"context": None}, "cannot be read"),
        ({"operators": [{}]}, "no 'operator'"),
    ],
)
def test_a_calibration_that_cannot_be_read_names_the_card(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(MembenchError) as raised:
        read_calibration(section(**changes), "h200-141gb")
    assert said in str(raised.value)
    assert "h200-141gb" in str(raised.value)


def test_a_card_without_the_section_is_not_calibrated() -> None:
    assert read_calibration(None, "h200-141gb") is None


def test_versions_that_differ_are_named_and_builds_do_not_count() -> None:
    versions = Versions(torch="2.11.0+cu130", cudnn="91002", driver="580")
    assert versions.differences("2.11.0+cpu", "91002", None) == []
    assert versions.differences("2.13.0+cpu", "9", "590") == [
        *("torch 2.11.0, here 2.13.0", "cuDNN 91002, here 9", "driver 580, here 590")
    ]


def test_calls_survive_the_way_to_another_process() -> None:
    trace = Trace(events=[event(convolution(8)), ("operator", operator(4), SITE)])
    back = decode_trace(json.loads(json.dumps(encode_trace(trace))))
    assert back.events == trace.events
    assert isinstance(back.events[0][3], ConvolutionCall)


def test_bytes_of_operands_are_those_of_their_types() -> None:
    call = convolution(2, channels=3, dtype="bfloat16")
    assert call.operand_bytes == 2 * 3 * 8 * 2
    assert call.tensor_bytes == call.operand_bytes + 27 * 9 * 2
    assert [dtype_bytes(t) for t in ("bool", "int16", "int64", "float32", "complex64")] == [
        *(1, 2, 8, 4, 8)
    ]
    nested = OperatorCall("aten.cat.default", '[[[{"tensor": [3], "dtype": "int32"}]], {}]')
    assert nested.operand_bytes == 12
