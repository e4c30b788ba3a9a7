"""The tracer with the shim against its fallback, both in the worker that predictions run in.

The shim is right where it traces what CUDA would run: cuDNN's batch norm, CUDA's autocast lists,
checkpointing under autocast. The fallback traces the CPU's operators; the differences asserted
here are those that a record marked ``tracer: cpu`` may have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.case import Case, TechniqueUse
from bench.child import Child
from bench.predict.cards import find_card
from bench.predict.shim import ShimUnavailable, build_shim

SIDE = 64
ACTIVATION = 64 * SIDE**3 * 4  # bytes of the finest level's 64 channels in float32
ABN = {"block": "ccblock", "norm": "inplace_abn"}
CHECKPOINT = (TechniqueUse(name="checkpoint"),)


@pytest.fixture(scope="module")
def shim() -> Iterator[Child]:
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"no CUDA shim here: {error}")
    child = Child("bench.predict.worker", {"MEMBENCH_WORKER_TRACER": "cuda-shim"})
    yield child
    child.finish()


@pytest.fixture(scope="module")
def fallback() -> Iterator[Child]:
    child = Child("bench.predict.worker", {"MEMBENCH_WORKER_TRACER": "cpu"})
    yield child
    child.finish()


def predicted(child: Child, side: int = SIDE, **changes: Any) -> dict[str, Any]:
    shape = (side, side, side)
    case = Case(network="fcn", variant="v", requested_shape=shape, shape=shape, **changes)
    request = {
        "case": case.to_definition(),
        "card": find_card("v100-32gb").to_dict(),
        "allocator_settings": "",
    }
    reply = child.ask(request, limit_s=120)
    assert reply["status"] == "ok", reply["reason"]
    return reply


def peak(child: Child, **changes: Any) -> int:
    return int(predicted(child, **changes)["peak_requested_bytes"])


def operators(reply: dict[str, Any]) -> set[str]:
    return {holder["operator"] for holder in reply["peak_holders"]}


def test_the_shim_traces_cudnns_batch_norm_and_the_fallback_the_native_one(
    shim: Child, fallback: Child
) -> None:
    assert "aten.cudnn_batch_norm.default" in operators(predicted(shim))
    assert "aten.native_batch_norm.default" in operators(predicted(fallback))


def test_in_float32_both_agree_but_for_adams_step_counters(shim: Child, fallback: Child) -> None:
    """Adam counts its steps on the CPU: 4 bytes for each of 50 parameters, seen only there."""
    assert peak(fallback) - peak(shim) == 50 * 4


def test_in_half_precision_the_fallback_takes_more(shim: Child, fallback: Child) -> None:
    """The CPU's autocast runs fewer operators in half precision: 7.6 % more with batch norm,
    25 % more with in-place ABN, at 64x64x64."""
    plain = peak(fallback, precision="fp16") / peak(shim, precision="fp16")
    in_place = peak(fallback, precision="fp16", network_options=ABN) / peak(
        shim, precision="fp16", network_options=ABN
    )
    assert plain == pytest.approx(1.076, abs=0.005)
    assert in_place == pytest.approx(1.25, abs=0.02)


def test_mixed_precision_is_not_traced_as_float32(shim: Child) -> None:
    """With two levels of 64 channels and more in half the bytes, much more is saved than this."""
    assert peak(shim) - peak(shim, precision="fp16") > 2 * ACTIVATION


def test_both_half_types_take_the_same_but_for_the_loss_scale(shim: Child) -> None:
    """fp16 keeps the scale and its growth tracker, and reads one flag for infinities."""
    assert 0 <= peak(shim, precision="fp16") - peak(shim, precision="bf16") <= 16


def test_a_checkpoint_recomputes_under_autocast(shim: Child) -> None:
    for precision in ("fp32", "fp16"):
        saved = peak(shim, precision=precision) - peak(
            shim, precision=precision, techniques=CHECKPOINT
        )
        assert saved > ACTIVATION / 2


def test_in_place_abn_saves_at_least_a_level_of_activations(shim: Child) -> None:
    ccblock = peak(shim, network_options={"block": "ccblock"})
    assert ccblock - peak(shim, network_options=ABN) > 2 * ACTIVATION


def test_an_optimizers_path_is_what_cuda_takes(shim: Child) -> None:
    """foreach has a temporary of the size of the model; fused has none, but keeps its 50 step
    counters on the device. At 16x16x16 the peak lies in the optimizer's phase."""
    phases = [
        predicted(shim, side=16, optimizer_options=options)["phases"]["optimizer"]
        for options in ({"foreach": True}, {"fused": True})
    ]
    difference = phases[0]["peak_requested_bytes"] - phases[1]["peak_requested_bytes"]
    assert difference == 9_522_787 * 4 - 50 * 4
