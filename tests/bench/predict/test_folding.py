"""A folded trace is the whole one, event by event; what does not repeat itself is not folded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.case import Case, TechniqueUse
from bench.errors import MembenchError
from bench.imported import Imported
from bench.predict import folding, predictor
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.cards import find_card
from bench.predict.folding import NOT_FOLDED, Folded, fold_trace, run_lengths
from bench.predict.folding_cases import repeated_steps, with_steps
from bench.predict.predictor import predict, trace_case, trace_case_folded
from bench.predict.step_trace import Trace, releases_in_order
from bench.predict.tracer import Tracer
from memsave import checkpoint_steps


@pytest.fixture
def short_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold even where running the whole loop is as quick, so that comparing both is quick."""
    monkeypatch.setattr(folding, "_SHARE", 5)


def steps_every(every: int) -> tuple[TechniqueUse, ...]:
    return (TechniqueUse(name="checkpoint_steps", options={"every": every}),)


NESTED = (TechniqueUse(name="checkpoint_steps", options={"nested": True}),)


def lstm(slices: int, side: int = 8, widths: tuple[int, ...] = (2, 3), **changes: Any) -> Case:
    options = {"widths": list(widths)} | changes.pop("network_options", {})
    values: dict[str, Any] = {"loss": "binary_cross_entropy", "optimizer": "rmsprop"} | changes
    return Case(
        network="conv_lstm",
        variant="v",
        requested_shape=(side, side, slices),
        shape=(side, side, slices),
        network_options=options,
        **values,
    )


def folded(case: Case) -> Folded | None:
    repeated = repeated_steps(case)
    assert repeated is not None
    return fold_trace(lambda n: trace_case(with_steps(case, n), "cpu")[0], *repeated)


def assert_folds_exactly(case: Case, whole: Trace) -> None:
    found = folded(case)
    assert found is not None
    assert found.steps == case.shape[-1] > found.ran[-1]
    assert found.trace.events == whole.events
    assert found.trace.sites == whole.sites
    assert found.trace.categories == whole.categories
    assert found.trace == whole  # FLOPs too


# -- the network that folding is for --------------------------------------------------------------

CASES = {
    "plain": lstm(8),
    "plain, float16": lstm(8, precision="fp16", steps=1),
    "plain, two volumes, Adam": lstm(8, batch_size=2, optimizer="adam", widths=(2,)),
    "every step": lstm(8, techniques=steps_every(1), steps=1),
    "every 2nd step, one over": lstm(13, techniques=steps_every(2), widths=(3,)),
    "every 3rd step, bfloat16, two over": lstm(
        17, techniques=steps_every(3), precision="bf16", widths=(2,), steps=1
    ),
    "every 4th step, in-place ABN": lstm(
        20, techniques=steps_every(4), network_options={"norm": "inplace_abn"}, widths=(2,), steps=1
    ),
    "every 3rd step and blocks": lstm(
        18, techniques=(*steps_every(3), TechniqueUse(name="checkpoint")), widths=(2,), steps=1
    ),
    "frozen U-Net": lstm(8, network_options={"frozen_unet": True}, side=12),
    "one checkpoint around all": lstm(8, techniques=steps_every(20), widths=(2,), steps=1),
    "nested": lstm(
        12,
        techniques=(dataclasses.replace(NESTED[0], options={"nested": True, "segment": 2}),),
        widths=(2,),
        steps=1,
    ),
    "prediction": lstm(12, mode="infer"),
}


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize("name", CASES)
def test_the_folded_trace_is_the_whole_one_event_by_event(name: str) -> None:
    assert_folds_exactly(CASES[name], trace_case(CASES[name], "cpu")[0])


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1, 7])
def test_320_steps_folded_are_320_steps_run(every: int | None) -> None:
    """320 is 45 x 7 and 5 over."""
    techniques = () if every is None else steps_every(every)
    case = lstm(320, techniques=techniques, side=8, widths=(2, 2))
    assert_folds_exactly(case, trace_case(case, "cpu")[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_traces_of_one_case_are_the_same(precision: Any) -> None:
    """Not by chance: neither a set of modules nor autocast's table by address decides an order."""
    case = lstm(2, techniques=steps_every(1), precision=precision, widths=(2, 2), steps=1)
    kept = [torch.nn.Linear(1, 1) for _ in range(50)]  # so that addresses are others
    first = trace_case(case, "cpu")[0]
    del kept
    assert trace_case(case, "cpu")[0] == first


# -- any other loop -------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((state, x), dim=-1)
        z = self.gate(both).sigmoid()
        state = z * state + (1 - z) * self.candidate(both).tanh()
        return state, state


def plain_loop(cell: Cell, sequence: Tensor) -> Tensor:
    state, outputs = sequence.new_zeros(3, 4), []
    for t in range(len(sequence)):
        state, output = cell(state, sequence[t])
        outputs.append(output)
    return torch.stack(outputs)


def checkpointed_loop(cell: Cell, sequence: Tensor) -> Tensor:
    run = checkpoint_steps(cell, every=3)
    return torch.stack(run(sequence.new_zeros(3, 4), sequence.unbind(0))[1])


def growing_loop(cell: Cell, sequence: Tensor) -> Tensor:
    """Each step makes a longer result than the one before it: nothing repeats itself."""
    state = sequence.new_zeros(3, 4)
    outputs = sequence.new_zeros(0, 3, 4)
    for x in sequence:
        state, output = cell(state, x)
        outputs = torch.cat((outputs, output[None]))
    return outputs


def trace_of_loop(loop: Callable[[Cell, Tensor], Tensor], steps: int) -> Trace:
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer:
            cell = Cell()
            tracer.name_modules(cell)
            sequence = torch.randn(steps, 3, 2, requires_grad=True)  # its gradient grows with it
            tracer.phase("forward")
            loss = loop(cell, sequence).square().mean()
            tracer.phase("backward")
            torch.autograd.backward(loss)
            tracer.stop()
            tracer.trace.flops = tracer.flops.counted
    return tracer.trace


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize(
    ("loop", "steps", "period"),
    [(plain_loop, 20, 1), (checkpointed_loop, 22, 3), (checkpointed_loop, 24, 6)],
)
def test_anybodys_loop_folds(
    loop: Callable[[Cell, Tensor], Tensor], steps: int, period: int
) -> None:
    found = fold_trace(lambda n: trace_of_loop(loop, n), steps, period)
    assert found is not None
    assert found.trace == trace_of_loop(loop, steps)


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize(
    ("loop", "period"), [(growing_loop, 1), (checkpointed_loop, 2)], ids=["growing", "wrong period"]
)
def test_a_loop_that_does_not_repeat_itself_is_not_folded(
    loop: Callable[[Cell, Tensor], Tensor], period: int
) -> None:
    assert fold_trace(lambda n: trace_of_loop(loop, n), 20, period) is None


# -- when it is worth it, and what a record says --------------------------------------------------


def test_runs_are_a_period_apart_and_together_well_below_the_loop() -> None:
    assert run_lengths(320, 1) == [5, 6, 7, 8, 9, 10]  # a loop that does not fold costs 45 steps
    assert run_lengths(302, 4)[:3] == [10, 14, 18]
    assert run_lengths(320, 7)[:3] == [19, 26, 33]
    assert all((320 - n) % 7 == 0 for n in run_lengths(320, 7))
    assert run_lengths(30, 1) == [5, 6, 7]  # 18 steps
    assert run_lengths(29, 1) == []
    assert run_lengths(320, 100) == []
    assert run_lengths(1000, 32) == [72, 104, 136, 168]  # 480 steps; 200 more are above 600


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lstm(320), (320, 1)),
        (lstm(320, techniques=steps_every(4)), (320, 4)),
        (lstm(8, techniques=steps_every(8)), (8, 1)),
        (lstm(320, techniques=(TechniqueUse(name="checkpoint", options={"every": 2}),)), (320, 1)),
        (dataclasses.replace(lstm(320), network="fcn", network_options={}), None),
        (lstm(320, techniques=NESTED), (320, 16)),
        (lstm(20, techniques=(*NESTED, *steps_every(30))), (20, 4)),
        (dataclasses.replace(lstm(320), network="no such network"), None),
        (lstm(320, techniques=steps_every(0)), None),
    ],
)
def test_a_recurrent_network_repeats_itself_by_checkpoints(
    case: Case, expected: tuple[int, int] | None
) -> None:
    assert repeated_steps(case) == expected


def test_short_runs_keep_the_segments_of_the_whole_loop() -> None:
    """16 segments of 20, or 20 of 16, keep as few states; 16 it is, in runs of 40 steps too."""
    (use,) = with_steps(lstm(320, techniques=NESTED), 40).techniques
    assert use.options == {"nested": True, "segment": 16}
    (use,) = with_steps(lstm(320, techniques=steps_every(4)), 40).techniques
    assert use.options == {"every": 4}


def test_a_network_of_the_users_own_is_run_whole() -> None:
    case = dataclasses.replace(lstm(320), imported=Imported(reference="my_nets:Net"))
    assert repeated_steps(case) is None


def test_a_prediction_says_that_it_was_folded_and_is_what_it_was() -> None:
    case, card = lstm(36, side=4, widths=(2,), mode="infer"), find_card("v100-32gb")
    readings = predict(case, card, "cpu", AllocatorSettings())
    (note,) = readings.pop("notes")
    assert note.startswith("trace folded: of 36 repeated steps, runs of 5, 6 and 7")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(predictor, "repeated_steps", lambda _: None)
        whole = predict(case, card, "cpu", AllocatorSettings())
    assert whole.pop("notes") == ()
    assert readings == whole


def test_a_loop_that_is_short_is_run_whole_without_a_note() -> None:
    trace, parameters, notes = trace_case_folded(lstm(3, widths=(2,)), "cpu")
    assert (trace, parameters) == trace_case(lstm(3, widths=(2,)), "cpu")
    assert notes == ()


def test_a_loop_that_cannot_be_folded_is_run_whole_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = lstm(36, side=4, widths=(2,), mode="infer")
    monkeypatch.setattr(predictor, "fold_trace", lambda *_: None)
    trace, parameters, notes = trace_case_folded(case, "cpu")
    assert (trace, parameters) == trace_case(case, "cpu")
    assert notes == (NOT_FOLDED,)


def test_an_error_names_the_whole_case_and_not_a_short_run() -> None:
    case = lstm(40, side=7)
    with pytest.raises(
        (MembenchError, ValueError), match=r"multiples of \(2, 2, 1\), got \(7, 7, 40\)"
    ):
        trace_case_folded(case, "cpu")


def test_releases_at_one_moment_are_put_in_order_and_no_others() -> None:
    events: list[Any] = [("free", 9), ("phase", "x"), ("free", 3), ("free", 1), ("alloc", 4, 8, 0)]
    assert releases_in_order(events) == [
        ("free", 9),
        ("phase", "x"),
        ("free", 1),
        ("free", 3),
        ("alloc", 4, 8, 0),
    ]
