"""What is predicted for this card against what it does: the project's promise, on small cases.

The card is calibrated first, on the calls of these cases, so that no prediction rests on an
estimate of a workspace.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.calibrate.calibrate import card_of, start_measuring
from bench.calibrate.gathering import gather
from bench.calibrate.section import load_section, save_card
from bench.calibrate.session import Session, jobs_left
from bench.case import Case
from bench.child import Child
from bench.predict.cards import Card
from bench.predict.shim import choose_tracer
from tests.gpu.cases import small_case

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "bottleneck": {"block": "bottleneck"},
    "inplace_abn": {"norm": "inplace_abn"},
    "ccblock": {"block": "ccblock", "norm": "inplace_abn"},
}


PRECISIONS: tuple[Any, ...] = ("fp32", "fp16")
CALIBRATION_LIMIT_S = 300.0


def variant_case(variant: str, precision: Any) -> Case:
    return small_case(96, network_options=VARIANTS[variant], precision=precision)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """Return this card with what the cases' calls were measured to take; benchmark is off."""
    greeted = Child("bench.calibrate.device_worker")
    greeted.finish()
    path = tmp_path_factory.mktemp("cards") / "this.json"
    section = load_section(path, greeted.hello)
    cases = [variant_case(v, p) for v in VARIANTS for p in PRECISIONS]
    wanted = gather([*cases, small_case(96, mode="infer")], share=0.0)
    jobs = [job for job in jobs_left(section, wanted, networks=()) if not job.benchmark]
    session = Session(section, start_measuring, save=lambda: None)
    assert session.run(jobs, CALIBRATION_LIMIT_S), f"{section.remaining} readings are left"
    return save_card(card_of(greeted.hello), section, path)


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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_predicted_peaks_are_the_measured_ones(
    card: Card, variant: str, precision: Any
) -> None:
    """Allocated within 1 %, reserved within 3 %, and never under by more than 2 %."""
    case = variant_case(variant, precision)

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
