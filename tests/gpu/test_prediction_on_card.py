"""What is predicted for this card against what it does: the project's promise, on small cases."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import Case
from bench.child import Child
from bench.errors import MembenchError
from bench.gpu import gpu_identity
from bench.predict.cards import Card, find_card
from bench.predict.shim import choose_tracer
from tests.gpu.cases import small_case

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "bottleneck": {"block": "bottleneck"},
    "inplace_abn": {"norm": "inplace_abn"},
    "ccblock": {"block": "ccblock", "norm": "inplace_abn"},
}


@pytest.fixture(scope="module")
def card() -> Card:
    name = gpu_identity().card
    try:
        return find_card(name)
    except MembenchError:
        pytest.skip(f"no card file for {name}")


def answer(module: str, environment: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
    child = Child(module, environment)
    try:
        return child.ask(request, limit_s=300)
    finally:
        child.close()


def predicted(case: Case, card: Card) -> dict[str, Any]:
    tracer, _ = choose_tracer()
    request = {
        "case": case.to_definition(),
        "card": card.to_dict(),
        "allocator_settings": "",
    }
    return answer("bench.predict.worker", {"MEMBENCH_WORKER_TRACER": tracer}, request)


def measured(case: Case) -> dict[str, Any]:
    environment = {"PYTORCH_ALLOC_CONF": ""}
    return answer("bench.measure_worker", environment, {"case": case.to_definition()})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_predicted_peaks_are_the_measured_ones(
    card: Card, variant: str, precision: Any
) -> None:
    """Allocated within 1 %, reserved within 3 %, and never under by more than 2 %."""
    case = small_case(96, network_options=VARIANTS[variant], precision=precision)

    ours, theirs = predicted(case, card), measured(case)

    assert (ours["status"], theirs["status"]) == ("ok", "ok")
    assert ours["parameters"] == theirs["parameters"]
    allocated = ours["peak_allocated_bytes"] / theirs["peak_allocated_bytes"]
    reserved = ours["peak_reserved_bytes"] / theirs["peak_reserved_bytes"]
    assert abs(allocated - 1) <= 0.01, f"allocated {allocated:.4f}, reserved {reserved:.4f}"
    assert -0.02 <= reserved - 1 <= 0.03, f"allocated {allocated:.4f}, reserved {reserved:.4f}"


def test_the_model_phase_holds_no_workspace_and_is_predicted_to_the_byte(card: Card) -> None:
    case = small_case(96)

    ours, theirs = predicted(case, card), measured(case)

    assert ours["phases"]["model"] == theirs["phases"]["model"]


def test_prediction_of_a_volume_keeps_no_activations(card: Card) -> None:
    case = small_case(96, mode="infer")

    ours, theirs = predicted(case, card), measured(case)

    ratio = ours["peak_allocated_bytes"] / theirs["peak_allocated_bytes"]
    assert abs(ratio - 1) <= 0.01, f"allocated {ratio:.4f}"
