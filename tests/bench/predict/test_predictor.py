"""From a case to its predicted readings, on the CPU tracer: the arithmetic is the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.case import Case, TechniqueUse
from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.cards import find_card
from bench.predict.predictor import peak_holders, predict, trace_case
from bench.predict.step_trace import Site, Trace
from bench.predict.workspaces import fill_workspaces, uncalibrated_parts
from bench.record import SMALL_HOLDERS, Category

MIB = 2**20
SETTINGS = AllocatorSettings()


def fcn(**changes: Any) -> Case:
    shape = (16, 16, 24)
    values: dict[str, Any] = {"network_options": {"widths": [4, 8]}} | changes
    return Case(network="fcn", variant="small", requested_shape=shape, shape=shape, **values)


def test_a_prediction_adds_up() -> None:
    card = find_card("v100-32gb")
    readings = predict(fcn(), card, "cpu", SETTINGS)
    parts = readings["parts"]
    assert readings["status"] == "ok"
    assert sum(parts.values()) == readings["process_bytes"]
    assert parts["context_bytes"] == card.context_bytes
    assert readings["process_bytes"] == readings["peak_reserved_bytes"] + card.context_bytes
    assert (
        readings["peak_requested_bytes"]
        <= readings["peak_allocated_bytes"]
        <= readings["peak_active_bytes"]
        <= readings["peak_reserved_bytes"]
    )
    assert sum(h["bytes"] for h in readings["peak_holders"]) <= readings["peak_allocated_bytes"]
    assert list(readings["phases"]) == ["model", "forward", "backward", "optimizer"]
    assert readings["capacity_bytes"] == card.memory_bytes - card.context_bytes


def test_the_parameters_are_counted_and_held() -> None:
    case = fcn()
    trace, parameters = trace_case(case, "cpu")
    owned = [
        e[2] for e in trace.events if e[0] == "alloc" and trace.categories[e[1]] == "parameter"
    ]
    buffers = sum(2 * 4 * c + 8 for c in (2, 4, 4, 8, 2, 4))  # mean, variance; the batches counted
    assert sum(owned) == 4 * parameters + buffers


def test_adam_holds_two_moments_and_gradients_are_freed_after_the_step() -> None:
    trace, parameters = trace_case(fcn(), "cpu")
    live: dict[int, int] = {}
    for event in trace.events:
        if event[0] == "alloc":
            live[event[1]] = event[2]
        elif event[0] == "free":
            live.pop(event[1])
    by_category: dict[str, int] = {}
    for identity, size in live.items():
        category = trace.categories[identity]
        by_category[category] = by_category.get(category, 0) + size
    steps = 4 * 22  # the CPU tracer also sees Adam's step counter of each of the 22 parameters
    assert by_category["optimizer_state"] == 2 * 4 * parameters + steps
    assert "gradient" not in by_category


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"techniques": (TechniqueUse(name="checkpoint"),)},
        {"network_options": {"widths": [4, 8], "norm": "inplace_abn"}},
    ],
    ids=str,
)
def test_when_the_optimizer_begins_each_parameters_gradient_is_called_one(
    changes: dict[str, Any],
) -> None:
    """Known as gradients only then, but called so in backward too: a category is the storage's."""
    trace, parameters = trace_case(fcn(**changes), "cpu")
    starts = [i for i, e in enumerate(trace.events) if e == ("phase", "optimizer")]
    assert len(starts) == 2
    for start in starts:
        live = {e[1]: e[2] for e in trace.events[:start] if e[0] == "alloc"}
        for event in trace.events[:start]:
            if event[0] == "free":
                del live[event[1]]
        gradients = sum(n for i, n in live.items() if trace.categories[i] == "gradient")
        assert gradients == 4 * parameters


def test_prediction_without_gradients_has_one_phase_besides_the_model() -> None:
    card = find_card("v100-32gb")
    infer = predict(fcn(mode="infer"), card, "cpu", SETTINGS)
    train = predict(fcn(), card, "cpu", SETTINGS)
    assert list(infer["phases"]) == ["model", "forward"]
    assert infer["peak_allocated_bytes"] < train["peak_allocated_bytes"]


def test_a_card_that_is_too_small_is_out_of_memory_with_what_it_would_need() -> None:
    card = find_card("v100-32gb")
    needed = predict(fcn(), card, "cpu", SETTINGS)["needs_bytes"]
    fits = dataclasses.replace(card, memory_bytes=card.context_bytes + needed)
    tight = dataclasses.replace(fits, memory_bytes=fits.memory_bytes - 2 * MIB)
    assert predict(fcn(), fits, "cpu", SETTINGS)["status"] == "ok"
    readings = predict(fcn(), tight, "cpu", SETTINGS)
    assert readings["status"] == "oom"
    assert readings["needs_bytes"] == needed
    assert readings["process_bytes"] is None
    assert readings["peak_allocated_bytes"] > 0
    assert "v100-32gb has" in readings["reason"]


def test_a_larger_batch_and_a_second_step_cost_what_they_should() -> None:
    """One step has no optimizer state while the activations live; the second one does."""
    card = find_card("v100-32gb")
    one = predict(fcn(steps=1), card, "cpu", SETTINGS)
    two = predict(fcn(steps=2), card, "cpu", SETTINGS)
    batch = predict(fcn(batch_size=2), card, "cpu", SETTINGS)
    assert one["peak_requested_bytes"] < two["peak_requested_bytes"] < batch["peak_requested_bytes"]
    state = 2 * 4 * one["parameters"]
    assert two["peak_requested_bytes"] - one["peak_requested_bytes"] >= state


def test_checkpointing_a_block_saves_activations() -> None:
    card = find_card("v100-32gb")
    plain = predict(fcn(), card, "cpu", SETTINGS)
    less = predict(fcn(techniques=(TechniqueUse(name="checkpoint"),)), card, "cpu", SETTINGS)
    assert less["parameters"] == plain["parameters"]
    assert less["peak_requested_bytes"] < plain["peak_requested_bytes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm' (did you mean 'adam'"),
        ({"loss": "dise"}, "unknown loss 'dise' (did you mean 'dice'"),
        ({"network_options": {"block": "bottlenek"}}, "bottleneck"),
        ({"network_options": {"blok": "bottleneck"}}, "block"),
        ({"techniques": (TechniqueUse(name="chekpoint"),)}, "checkpoint"),
    ],
)
def test_a_case_that_names_what_does_not_exist_is_an_error(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MembenchError) as raised:
        trace_case(fcn(**changes), "cpu")
    assert message in str(raised.value)


SITE = Site("m", "op", "f.py:1")


def test_a_convolution_takes_its_workspace_for_the_length_of_the_call_only() -> None:
    card = find_card("v100-32gb")
    bare = Trace(events=[("alloc", 0, 100, 0), ("convolution", 5000, "half", SITE), ("free", 0)])
    bare.sites.append(SITE)
    bare.categories.append("activation")
    filled = fill_workspaces(bare, card)
    size = card.convolution_workspace_bytes("half", 5000)
    assert filled.events == [("alloc", 0, 100, 0), ("alloc", 1, size, 0), ("free", 1), ("free", 0)]
    assert filled.categories == ["activation", "workspace"]
    assert len(bare.sites) == 1  # the trace can be filled in for another card


@pytest.mark.parametrize(("card", "size"), [("v100-32gb", 8_519_680), ("h200-141gb", 33_554_432)])
def test_cublas_keeps_a_workspace_of_known_size(card: str, size: int) -> None:
    filled = fill_workspaces(Trace(events=[("cublas", 0, SITE)]), find_card(card))
    assert filled.events == [("alloc", 0, size, 0)]


def test_mixed_precision_traced_on_the_cpu_says_so() -> None:
    card = find_card("v100-32gb")
    said = "mixed precision (traced as the CPU runs it)"
    assert said in predict(fcn(precision="bf16"), card, "cpu", SETTINGS)["uncalibrated"]
    assert said not in predict(fcn(), card, "cpu", SETTINGS)["uncalibrated"]


def test_what_rests_on_an_estimate_is_named() -> None:
    convolution = [("convolution", 1, "half", SITE)]
    assert uncalibrated_parts([], False) == ("context",)
    assert uncalibrated_parts(convolution, False) == ("context", "convolution workspace")
    assert uncalibrated_parts(convolution, True)[1].endswith("(cudnn.benchmark on)")


def test_peak_holders_add_up_equal_allocations_and_small_ones_by_category() -> None:
    big, small = Site("big", "op", "f.py:1"), Site("small", "op", "f.py:2")
    trace = Trace(
        events=[
            ("alloc", 0, 3 * MIB, 0),
            ("alloc", 1, 2 * MIB, 0),
            ("alloc", 2, 10, 0),
            ("alloc", 3, 20, 0),
            ("alloc", 4, 9 * MIB, 0),
            ("free", 4),
            ("alloc", 5, 10 * MIB, 0),
        ],
        sites=[big, big, small, small, big, big],
        categories=["activation", "activation", "gradient", "gradient", "temporary", "temporary"],
    )
    held = peak_holders(trace, 5)
    assert [(h.module, h.operator, h.category, h.bytes) for h in held] == [
        ("big", "op", "activation", 5 * MIB),
        ("", SMALL_HOLDERS, "gradient", 30),
    ]


def test_what_a_step_keeps_is_named_from_four_kib_on_and_weights_from_a_thousandth() -> None:
    """All but the workspace are 8,024,238 bytes, so a thousandth is 8,024."""
    sizes = [8_000_000, 4_096, 4_095, 8_024, 8_023, 2**30]
    categories: list[Category] = [
        *("activation", "activation", "temporary", "parameter", "gradient", "workspace")
    ]
    trace = Trace(
        events=[("alloc", n, size, 0) for n, size in enumerate(sizes)],
        sites=[Site(f"m{n}", "op", "f.py:1") for n in range(len(sizes))],
        categories=categories,
    )
    held = {h.module: h.bytes for h in peak_holders(trace, 5) if h.operator != SMALL_HOLDERS}
    assert held == {"m0": 8_000_000, "m1": 4_096, "m3": 8_024, "m5": 2**30}
