"""Learning-rate schedules: their numbers by the papers' formulas, and a suite that names one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError, SuiteError
from bench.schedules import SCHEDULES, check_schedule, find_schedule, make_schedule
from tests.bench.records import make_case
from tests.bench.suite_files import GOOD, load


def sgd(learning_rate: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=learning_rate)


def rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def test_poly_is_the_papers_formula_at_every_epoch() -> None:
    """Torch multiplies ratio by ratio: 600 roundings of 2^-53 are 1e-13, far below 1e-10."""
    optimizer = sgd(0.01)
    schedule = find_schedule("poly")(optimizer)
    for epoch in range(600):
        assert rate(optimizer) == pytest.approx(0.01 * (1 - epoch / 600) ** 0.9, rel=1e-10), epoch
        optimizer.step()
        schedule.step()
    assert rate(optimizer) == 0
    schedule.step()
    assert rate(optimizer) == 0


def test_poly_takes_its_epochs_and_power() -> None:
    optimizer = sgd(1.0)
    schedule = make_schedule(optimizer, "poly", {"epochs": 4, "power": 2})
    optimizer.step()
    schedule.step()
    assert rate(optimizer) == pytest.approx(0.75**2)


@pytest.mark.parametrize(
    ("name", "factor", "patience"), [("plateau", 0.3, 50), ("halve_on_plateau", 0.5, 10)]
)
def test_a_plateau_lowers_the_rate_after_more_epochs_than_its_patience(
    name: str, factor: float, patience: int
) -> None:
    optimizer = sgd(1.0)
    schedule: Any = make_schedule(optimizer, name)
    assert isinstance(schedule, ReduceLROnPlateau)
    schedule.step(2.0)
    schedule.step(1.0)  # it fell
    for _ in range(patience):
        schedule.step(1.0)
        assert rate(optimizer) == 1.0
    schedule.step(1.0)
    assert rate(optimizer) == pytest.approx(factor)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_called_by_its_name_in_the_table_and_its_options_fit(name: str) -> None:
    schedule = check_schedule(name, SCHEDULES[name].options)
    assert schedule.name == name
    assert schedule.summary
    assert schedule.source


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pol", {}, "unknown schedule 'pol' (did you mean 'poly'"),
        ("poly", {"epoch": 3}, "schedule poly has no option 'epoch' (did you mean 'epochs'"),
        ("poly", {"epochs": 0}, "schedule poly: epochs 0 will not do, it is a whole number, 1 or"),
        ("poly", {"epochs": 1.5}, "epochs 1.5 will not do"),
        ("poly", {"epochs": True}, "epochs True will not do"),
        ("poly", {"power": 0}, "power 0 will not do, it is a number above 0"),
        ("poly", {"power": "2"}, "power '2' will not do"),
        ("poly", {"power": float("nan")}, "power nan will not do"),
        ("plateau", {"factor": 1}, "factor 1 will not do, it is a number between 0 and 1"),
        ("plateau", {"patience": -1}, "patience -1 will not do, it is a whole number, 0 or more"),
    ],
)
def test_what_a_schedule_cannot_take_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MembenchError) as error:
        make_schedule(sgd(), name, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_patience_may_be_none_at_all() -> None:
    assert check_schedule("plateau", {"patience": 0, "factor": 0.999}).name == "plateau"


# -- in a case ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "requested_shape": (8, 8, 8),
    "network_options": {"widths": [2, 4]},
    "optimizer": "sgd",
    "optimizer_options": {"lr": 0.01},
}


def test_every_step_of_a_case_lowers_the_rate_as_its_schedule_says() -> None:
    case = make_case(**SMALL, schedule="poly", schedule_options={"epochs": 10})
    workload = build_workload(case, lambda _phase: None, "cpu")
    assert workload.optimizer is not None
    for step in range(3):
        assert rate(workload.optimizer) == pytest.approx(0.01 * (1 - step / 10) ** 0.9)
        workload.step(lambda _phase: None)


def test_a_case_without_a_schedule_keeps_its_rate() -> None:
    workload = build_workload(make_case(**SMALL), lambda _phase: None, "cpu")
    assert workload.optimizer is not None
    workload.step(lambda _phase: None)
    assert workload.schedule is None
    assert rate(workload.optimizer) == 0.01


def test_a_prediction_has_no_schedule() -> None:
    case = make_case(**SMALL, mode="infer", schedule="poly")
    assert build_workload(case, lambda _phase: None, "cpu").schedule is None


def test_a_first_update_that_fp16_skips_makes_torch_complain_of_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Warnings are errors in tests; torch warns of a schedule told before any update."""
    workload = build_workload(make_case(**SMALL, schedule="poly"), lambda _phase: None, "cpu")
    monkeypatch.setattr(workload.precision, "step", lambda _optimizer: None)
    workload.step(lambda _phase: None)
    assert workload.optimizer is not None
    assert rate(workload.optimizer) < 0.01


def test_a_schedule_that_follows_the_loss_is_no_schedule_of_a_case() -> None:
    with pytest.raises(MembenchError, match="'plateau' follows the loss, which a step does not"):
        build_workload(make_case(**SMALL, schedule="plateau"), lambda _phase: None, "cpu")


# -- in a suite ---------------------------------------------------------------------------------


def test_a_suite_names_a_schedule_with_its_options(tmp_path: Path) -> None:
    case = load(tmp_path, GOOD + "training: {schedule: {name: poly, epochs: 100}}\n").cases()[0]
    assert (case.schedule, case.schedule_options) == ("poly", {"epochs": 100})
    assert Case.from_definition(json.loads(json.dumps(case.to_definition()))) == case
    case = load(tmp_path, GOOD + "training: {schedule: poly}\n").cases()[0]
    assert (case.schedule, case.schedule_options) == ("poly", {})


def test_a_suite_has_no_schedule_unless_it_names_one(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).cases()[0].schedule is None


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("polly", "training.schedule.name: unknown schedule 'polly' (did you mean 'poly'?)"),
        ("{name: poly, epoch: 3}", "training.schedule.epoch: schedule poly has no option 'epoch'"),
        ("{name: poly, epochs: 0}", "training.schedule.epochs: schedule poly: epochs 0 will not"),
        ("plateau", "'plateau' follows the loss, which a benchmark's step does not read back"),
    ],
)
def test_a_mistake_in_a_schedule_names_its_line_and_key(
    schedule: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SuiteError) as error:
        load(tmp_path, GOOD + f"training: {{schedule: {schedule}}}\n")
    line = len(GOOD.splitlines()) + 1
    assert f"line {line}: " in str(error.value)
    assert message.replace(".name", "") in str(error.value).replace(".name", "")


def test_flare21_trains_with_focal_loss_sgd_and_poly() -> None:
    from bench.suite import load_suite

    for case in load_suite("flare21").cases(glob="*/train"):
        assert (case.loss, case.optimizer, case.optimizer_options) == ("focal", "sgd", {"lr": 0.01})
        assert case.schedule == "poly"
        assert SCHEDULES["poly"].options | case.schedule_options == {"epochs": 600, "power": 0.9}
