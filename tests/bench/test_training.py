"""The training loop: the benchmark's own step, with readings, schedules and an end at NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.errors import MembenchError
from bench.training import Batch, DivergedError, Reading, train, train_case
from bench.workload import Workload

SIDES = (8, 8, 8)


def case(**changes: object) -> Case:
    """Return the smallest FCN that pools: two levels of 4 and 8 channels."""
    values: dict[str, object] = {
        "network": "fcn",
        "variant": "tiny",
        "requested_shape": SIDES,
        "shape": SIDES,
        "network_options": {"widths": [4, 8]},
    }
    return Case(**(values | changes))  # type: ignore[arg-type]


def built(**changes: object) -> Workload:
    return build_workload(case(**changes), lambda _phase: None, "cpu")


def batches(seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        image = torch.randn(1, 1, *SIDES, generator=generator)
        yield image, (image[:, 0] > 0).long() + (image[:, 0] > 1).long()


def losses(readings: list[Reading]) -> list[float]:
    return [reading.loss for reading in readings]


def test_the_loop_is_what_one_writes_by_hand() -> None:
    """Same losses as the five lines of any training script, to the bit."""
    workload = built()
    by_hand = []
    model, optimizer, loss_of = workload.model, workload.optimizer, workload.loss
    assert optimizer is not None
    assert loss_of is not None
    for _, (image, target) in zip(range(4), batches(), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model(image), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        by_hand.append(loss.item())
    assert losses(list(train(built(), batches(), steps=4))) == by_hand


def test_the_loss_falls_on_data_that_can_be_learnt() -> None:
    found = losses(train_case(case(optimizer_options={"lr": 1e-2}), batches(), steps=40))
    assert sum(found[-5:]) < 0.85 * sum(found[:5])  # untrained, it stays within 3 %


def test_checkpointing_repeats_the_plain_curve_to_the_bit() -> None:
    techniques = (TechniqueUse(name="checkpoint"),)
    plain = losses(train_case(case(), batches(), steps=8))
    assert losses(train_case(case(techniques=techniques), batches(), steps=8)) == plain
    assert losses(train_case(case(seed=1), batches(), steps=8)) != plain


def test_readings_count_steps_and_carry_the_rate_of_their_own_update() -> None:
    workload = built(optimizer_options={"lr": 1.0e-3})
    assert workload.optimizer is not None
    schedule = StepLR(workload.optimizer, step_size=1, gamma=0.5)
    found = list(train(workload, batches(), steps=5, schedule=schedule, steps_per_epoch=2))
    assert [r.step for r in found] == [1, 2, 3, 4, 5]
    assert [r.learning_rate for r in found] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]
    assert not any(r.skipped for r in found)


def test_a_plateau_is_told_the_mean_loss_of_each_whole_epoch() -> None:
    told: list[float] = []

    class Listening(ReduceLROnPlateau):
        def step(self, metrics: float, epoch: int | None = None) -> None:  # type: ignore[override]
            told.append(metrics)
            super().step(metrics, epoch)

    found = train_case(case(), batches(), steps=5, schedule=Listening, steps_per_epoch=2)
    expected = [sum(losses(found)[:2]) / 2, sum(losses(found)[2:4]) / 2]
    assert told == pytest.approx(expected, rel=1e-12)  # sums of two floats in float64


def test_a_plateau_lowers_the_rate_once_the_loss_stands_still() -> None:
    """Rate 0.3 of before after more than ``patience`` epochs that are no better: here at once."""
    constant = [next(batches())] * 6
    workload = built(optimizer="sgd", optimizer_options={"lr": 0.0})
    assert workload.optimizer is not None
    for group in workload.optimizer.param_groups:
        group["lr"] = 1e-30  # too small to change a weight, so the loss stands still
    schedule = ReduceLROnPlateau(workload.optimizer, factor=0.3, patience=1, eps=0.0)
    rates = [r.learning_rate for r in train(workload, constant, steps=6, schedule=schedule)]
    assert rates == pytest.approx([1e-30, 1e-30, 1e-30, 3e-31, 3e-31, 9e-32], rel=1e-9)


def test_the_case_s_own_schedule_counts_epochs_too_and_stands_there_afterwards() -> None:
    workload = built(schedule="poly", schedule_options={"epochs": 2, "power": 1.0})
    own = workload.schedule
    rates = [r.learning_rate for r in train(workload, batches(), steps=4, steps_per_epoch=2)]
    assert rates == pytest.approx([4e-4, 4e-4, 2e-4, 2e-4])
    assert workload.schedule is own


def test_scores_are_taken_in_eval_mode_every_so_often_and_at_the_end() -> None:
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> list[float]:
        modes.append(model.training or torch.is_grad_enabled())
        return [1.0, 0.5]

    workload = built()
    frozen = next(m for m in workload.model.modules() if isinstance(m, nn.BatchNorm3d)).eval()
    found = list(train(workload, batches(), steps=5, evaluate=evaluate, evaluate_every=2))
    assert [r.step for r in found if r.scores == (1.0, 0.5)] == [2, 4, 5]
    assert modes == [False] * 3
    assert workload.model.training
    assert not frozen.training  # what its user froze stays frozen


def test_evaluating_changes_nothing_of_the_curve() -> None:
    plain = losses(train_case(case(), batches(), steps=4))
    image, _ = next(batches(1))
    scored = train_case(
        case(), batches(), steps=4, evaluate=lambda m: [float(m(image).sum())], evaluate_every=1
    )
    assert losses(scored) == plain


def test_the_workload_s_own_batch_and_loss_stand_there_again() -> None:
    workload = built()
    before = (workload.images, workload.target, workload.loss)
    for _ in train(workload, batches(), steps=3):
        break
    assert all(a is b for a, b in zip(before, _own(workload), strict=True))
    list(train(workload, batches(), steps=2))
    assert all(a is b for a, b in zip(before, _own(workload), strict=True))


def _own(workload: Workload) -> tuple[object, ...]:
    return (workload.images, workload.target, workload.loss)


def test_the_seed_of_a_training_is_that_of_dropout() -> None:
    """DenseVNet drops out at random; the batches are equal and the weights are."""
    sides = (16, 16, 16)
    image = torch.randn(1, 1, *sides, generator=torch.Generator().manual_seed(0))
    same = [(image, torch.zeros(1, *sides, dtype=torch.int64))] * 2
    tiny = case(network="dense_vnet", network_options={}, shape=sides, loss="focal")

    def run(seed: int) -> list[float]:
        workload = build_workload(tiny, lambda _phase: None, "cpu")
        return losses(list(train(workload, same, steps=2, seed=seed)))

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training_and_says_where(bad: float) -> None:
    good = [next(batches())] * 2
    image, target = good[0]
    spoilt = [*good, (image * bad, target), *good]
    with pytest.raises(DivergedError, match=r"loss of step 3 is nan at learning rate 0\.0004"):
        list(train(built(), spoilt, steps=5))


def test_weights_that_are_no_numbers_are_seen_after_the_last_step() -> None:
    """A finite loss whose gradient is not: the next loss, which nobody takes, would be NaN."""
    workload = built()

    def loss(output: Tensor, _target: Tensor) -> Tensor:
        return torch.sqrt((output * 0).sum())  # 0, with gradient 0 * infinity

    workload.loss = loss
    with pytest.raises(DivergedError, match=r"after step 1 \S+ is not finite"):
        list(train(workload, batches(), steps=1))


def test_too_few_batches_are_an_error_not_a_short_training() -> None:
    with pytest.raises(MembenchError, match="3 steps were asked for, but there are 2 batches"):
        list(train(built(), [next(batches())] * 2, steps=3))


@pytest.mark.parametrize("name", ["steps", "steps_per_epoch", "evaluate_every"])
def test_numbers_below_one_are_refused_at_once(name: str) -> None:
    values = {"steps": 1, "steps_per_epoch": 1, "evaluate_every": 1} | {name: 0}
    with pytest.raises(MembenchError, match=f"{name} must be 1 or more, got 0"):
        train(built(), batches(), **values)  # type: ignore[arg-type]


def test_a_case_that_predicts_cannot_be_trained() -> None:
    with pytest.raises(MembenchError, match="does not train"):
        train(built(mode="infer"), batches(), steps=1)


def test_bf16_trains_in_autocast_near_the_fp32_curve() -> None:
    """bf16 has 8 bits: 2^-8 of a loss of about 2 is 0.008, and steps add up; 0.05 leaves room."""
    plain = losses(train_case(case(), batches(), steps=5))
    half = losses(train_case(case(precision="bf16"), batches(), steps=5))
    assert half != plain
    assert half == pytest.approx(plain, abs=0.05)


def test_fp16_skips_overflowing_updates_says_so_and_the_schedule_waits() -> None:
    """A scale of 2^40 overflows fp16 gradients; halved at each step that is skipped."""
    workload = built(precision="fp16")
    scaler = workload.precision.scaler
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    assert workload.optimizer is not None
    schedule = StepLR(workload.optimizer, step_size=1, gamma=0.5)
    weights = [p.detach().clone() for p in workload.model.parameters()]
    found = list(train(workload, batches(), steps=2, schedule=schedule))
    assert [r.skipped for r in found] == [True, True]
    assert [r.learning_rate for r in found] == [4e-4, 4e-4]  # not told before the first update
    after = workload.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
