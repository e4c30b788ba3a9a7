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
from bench.flops import Flops
from bench.predict import folding, folding_periods, predictor
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.cards import find_card
from bench.predict.folding import NOT_FOLDED, Folded, fold_trace, run_lengths
from bench.predict.folding_cases import repeated_steps, with_steps
from bench.predict.folding_periods import Insertion, insertions, lengthen
from bench.predict.folding_tokens import NO_BYTES, Tokens, TokenTable
from bench.predict.predictor import predict, trace_case, trace_case_folded
from bench.predict.tracer import Site, Trace, Tracer, releases_in_order
from memsave import checkpoint_steps


@pytest.fixture
def short_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold even where running the whole loop is as quick, so that comparing both is quick."""
    monkeypatch.setattr(folding, "_SHARE", 0.2)


def steps_every(every: int) -> tuple[TechniqueUse, ...]:
    return (TechniqueUse(name="checkpoint_steps", options={"every": every}),)


def lstm(steps: int, side: int = 8, widths: tuple[int, ...] = (2, 3), **changes: Any) -> Case:
    options = {"widths": list(widths)} | changes.pop("network_options", {})
    values: dict[str, Any] = {"loss": "binary_cross_entropy", "optimizer": "rmsprop"} | changes
    return Case(
        network="conv_lstm",
        variant="v",
        requested_shape=(side, side, steps),
        shape=(side, side, steps),
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
    "plain": lstm(9),
    "plain, float16": lstm(9, precision="fp16"),
    "plain, two volumes, Adam": lstm(9, batch_size=2, optimizer="adam"),
    "every step": lstm(10, techniques=steps_every(1)),
    "every 2nd step, one over": lstm(13, techniques=steps_every(2), widths=(3,)),
    "every 3rd step, bfloat16, two over": lstm(17, techniques=steps_every(3), precision="bf16"),
    "every 4th step, in-place ABN": lstm(
        20, techniques=steps_every(4), network_options={"norm": "inplace_abn"}
    ),
    "every 3rd step and blocks": lstm(
        18, techniques=(*steps_every(3), TechniqueUse(name="checkpoint")), batch_size=2
    ),
    "frozen U-Net": lstm(9, network_options={"frozen_unet": True}, side=12),
    "one checkpoint around all": lstm(9, techniques=steps_every(20)),
    "prediction": lstm(12, mode="infer"),
}


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize("name", CASES)
def test_the_folded_trace_is_the_whole_one_event_by_event(name: str) -> None:
    assert_folds_exactly(CASES[name], trace_case(CASES[name], "cpu")[0])


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1, 7])
def test_320_steps_folded_are_320_steps_run(every: int | None) -> None:
    """320 is 45 x 7 and 5 over. The network of the paper's depth, narrow."""
    techniques = () if every is None else steps_every(every)
    case = lstm(320, techniques=techniques, side=16, widths=(2, 2, 2, 2, 2))
    assert_folds_exactly(case, trace_case(case, "cpu")[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_traces_of_one_case_are_the_same(precision: Any) -> None:
    """Not by chance: neither a set of modules nor autocast's table by address decides an order."""
    case = lstm(3, techniques=steps_every(2), precision=precision, widths=(2, 2, 2))
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


# -- the proof: one event, byte, site, category or FLOP amiss, and there is no fold ----------------

SITE = Site("cell", "op", "a.py:1")


def toy(steps: int, extra_bytes: Callable[[int], int] = lambda _: 0) -> Trace:
    """A buffer of all steps; per step one kept map; backward releases them newest first."""
    trace = Trace(events=[("phase", "forward"), ("cublas", 0, SITE)])

    def alloc(size: int) -> int:
        trace.events.append(("alloc", len(trace.sites), size, 0))
        trace.sites.append(SITE)
        trace.categories.append("activation")
        return len(trace.sites) - 1

    buffer = alloc(100 * steps + extra_bytes(steps))
    kept = []
    for _ in range(steps):
        kept.append(alloc(512))
        trace.events.append(("convolution", 2048, "half", SITE))
    trace.events.append(("phase", "backward"))
    for identity in reversed(kept):
        gradient = alloc(256)
        trace.events += [("free", identity), ("free", gradient)]
    trace.events.append(("free", buffer))
    trace.flops = Flops(3 * steps, 0, 9 * steps)
    return trace


def test_a_toy_loop_folds_and_says_from_what() -> None:
    found = fold_trace(toy, 100, 1)
    assert found is not None
    assert found.trace == toy(100)
    assert found.note == (
        "trace folded: of 100 repeated steps, runs of 5, 6 and 7 were traced and every further "
        "step found to add the same"
    )
    pairs = fold_trace(toy, 101, 2)
    assert pairs is not None
    assert pairs.trace == toy(101)
    assert "runs of 7, 9 and 11 were traced and every further 2 steps" in pairs.note


def drop_event(trace: Trace) -> None:
    del trace.events[-2]


def other_bytes(trace: Trace) -> None:
    trace.events[3] = ("alloc", 1, 513, 0)


def other_operands(trace: Trace) -> None:
    trace.events[4] = ("convolution", 2049, "half", SITE)


def other_site(trace: Trace) -> None:
    trace.sites[-1] = dataclasses.replace(SITE, source_line="a.py:2")


def other_category(trace: Trace) -> None:
    trace.categories[1] = "temporary"


def other_order(trace: Trace) -> None:
    trace.events[-3], trace.events[-2] = trace.events[-2], trace.events[-3]


def other_flops(trace: Trace) -> None:
    trace.flops = trace.flops._replace(total=trace.flops.total + 1)


@pytest.mark.parametrize(
    "change",
    [
        drop_event,
        other_bytes,
        other_operands,
        other_site,
        other_category,
        other_order,
        other_flops,
    ],
)
@pytest.mark.parametrize("changed_run", [5, 6, 7])
def test_one_thing_amiss_in_a_run_and_it_is_not_folded_from_it(
    changed_run: int, change: Callable[[Trace], None]
) -> None:
    def trace_of(steps: int) -> Trace:
        trace = toy(steps)
        if steps == changed_run:
            change(trace)
        return trace

    found = fold_trace(trace_of, 100, 1)
    assert found is not None  # from later runs
    assert changed_run not in found.ran[-3:]
    assert found.trace == toy(100)
    assert fold_trace(trace_of, 36, 1) is None  # where 18 steps are all that may be run


@pytest.mark.parametrize(
    "extra", [lambda n: n * n, lambda n: 512 * (n > 6)], ids=["square", "jump"]
)
def test_bytes_that_do_not_grow_in_proportion_are_not_folded(extra: Callable[[int], int]) -> None:
    found = fold_trace(lambda n: toy(n, extra), 40, 1)
    assert found is None


def test_a_period_that_repeats_wrongly_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what folding repeats lacks its last event."""

    def forgetful(*args: Any) -> Tokens:
        longer = lengthen(*args)
        return Tokens(longer.numbers[:-2] + longer.numbers[-1:], [*longer.bytes[:-2], NO_BYTES])

    assert fold_trace(toy, 40, 1) is not None
    monkeypatch.setattr(folding, "lengthen", forgetful)
    assert fold_trace(toy, 40, 1) is None


def test_tokens_that_release_what_is_not_alive_are_no_trace() -> None:
    table = TokenTable()
    encoded = table.encode(toy(2))
    encoded.numbers.append(encoded.numbers[-1])
    encoded.bytes.append(NO_BYTES)
    with pytest.raises(LookupError):
        table.decode(encoded)
    short, long = (table.encode(toy(n)) for n in (2, 3))
    short.numbers[-1:] = [*short.numbers[-1:], encoded.numbers[-1]]
    short.bytes.append(NO_BYTES)
    made = folding._lengthened(table, (toy(2), short), (toy(3), long), [], 1)
    assert made is None


def test_a_release_of_what_was_never_allocated_is_no_trace() -> None:
    table = TokenTable()
    trace = toy(1)
    trace.events.append(("free", 0))
    with pytest.raises(LookupError, match="0 is freed but not alive"):
        table.encode(trace)


# -- where a trace grows --------------------------------------------------------------------------


def tokens(text: str) -> Tokens:
    return Tokens([ord(c) for c in text], [NO_BYTES] * len(text))


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        ("ababx", "abababx", [Insertion(4, 2)]),
        ("abab", "ababab", [Insertion(4, 2)]),
        ("xababyccz", "xabababycccz", [Insertion(5, 2), Insertion(8, 1)]),
        ("aabaabx", "aabaabaabx", [Insertion(6, 3)]),  # not the a's
        ("abc", "abc", []),
        ("abc", "abxc", None),  # not there before
        ("ab", "abab c", None),
        ("abab", "ab", None),
        ("abcabcd", "abcabcabce", None),
    ],
)
def test_what_a_longer_trace_has_more_repeats_what_stands_before_it(
    short: str, long: str, expected: list[Insertion] | None
) -> None:
    found = insertions(tokens(short), tokens(long))
    assert found == expected
    if found is not None:
        assert lengthen(tokens(short), tokens(long), found, 1).numbers == tokens(long).numbers
        assert lengthen(tokens(short), tokens(long), found, 0).numbers == tokens(short).numbers


def test_a_search_that_leads_nowhere_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding_periods, "_MOST_LOOPS", 2)
    assert insertions(tokens("aabbccx"), tokens("aaabbbcccx")) is None


def test_bytes_grow_with_the_periods_and_repeats_have_those_of_what_they_repeat() -> None:
    short, long = Tokens([1, 2, 2, 3], [10, 5, 5, 7]), Tokens([1, 2, 2, 2, 3], [14, 6, 6, 6, 7])
    found = insertions(short, long)
    assert found == [Insertion(3, 1)]
    longer = lengthen(short, long, found, 3)
    assert longer == Tokens([1, 2, 2, 2, 2, 2, 3], [22, 8, 8, 8, 8, 8, 7])


# -- when it is worth it, and what a record says --------------------------------------------------


def test_runs_are_a_period_apart_and_together_half_of_the_loop_at_most() -> None:
    assert run_lengths(320, 1)[:3] == [5, 6, 7]
    assert run_lengths(302, 4)[:3] == [10, 14, 18]
    assert run_lengths(320, 7)[:3] == [19, 26, 33]
    assert all((320 - n) % 7 == 0 for n in run_lengths(320, 7))
    assert run_lengths(36, 1) == [5, 6, 7]  # 18 steps
    assert run_lengths(35, 1) == []
    assert run_lengths(320, 100) == []
    assert sum(run_lengths(1000, 8)) <= 500


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lstm(320), (320, 1)),
        (lstm(320, techniques=steps_every(4)), (320, 4)),
        (lstm(8, techniques=steps_every(8)), (8, 1)),
        (lstm(320, techniques=(TechniqueUse(name="checkpoint", options={"every": 2}),)), (320, 1)),
        (dataclasses.replace(lstm(320), network="fcn", network_options={}), None),
        (dataclasses.replace(lstm(320), network="no such network"), None),
        (lstm(320, techniques=steps_every(0)), None),
    ],
)
def test_a_recurrent_network_repeats_itself_by_checkpoints(
    case: Case, expected: tuple[int, int] | None
) -> None:
    assert repeated_steps(case) == expected


def test_a_prediction_says_that_it_was_folded_and_is_what_it_was() -> None:
    case, card = lstm(40, side=4, widths=(2,)), find_card("v100-32gb")
    readings = predict(case, card, "cpu", AllocatorSettings())
    (note,) = readings.pop("notes")
    assert note.startswith("trace folded: of 40 repeated steps, runs of 5, 6 and 7")
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
