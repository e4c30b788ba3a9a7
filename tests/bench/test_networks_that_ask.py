"""Networks that ask CUDA or read values: a figure where there is one to give, else one clear line.

In a process of its own, as a worker is, since the shim must be loaded before torch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.imported_model import BUILT_ON_CPU
from bench.predict.read_answers import CAUSAL, NOT_PACKED
from bench.predict.shim import ShimUnavailable, build_shim

_SCRIPT = """
import json, sys
from bench.predict.tracing_process import become
become("cuda-shim")
from bench.predict.cuda_answers import answer_as, answer_users
answer_users()
import torch
from bench.case import TechniqueUse
from bench.named_case import named_case
from bench.predict.cards import find_card
from bench.predict.predictor import trace_case
from bench.serve import _answer
from tests.bench import networks_that_ask
answer_as(find_card("h200-141gb"))

def asked(request):
    uses = tuple(TechniqueUse(name=name) for name in request.pop("techniques", ()))
    reference = "tests.bench.networks_that_ask:" + request.pop("network")
    case = named_case(reference, techniques=uses, **request)
    trace, parameters = trace_case(case, "cuda")
    sizes = [e[2] for e in trace.events if e[0] == "alloc"]
    return {
        "status": "ok", "reason": "", "notes": trace.notes, "parameters": parameters,
        "weights": sum(s for s, c in zip(sizes, trace.categories) if c == "parameter"),
        "sizes": sizes, "estimated": sorted(trace.estimated),
    }

answers = {name: _answer(request, asked) for name, request in json.load(sys.stdin).items()}
from_torch = {"__name__": "torch.somewhere", "torch": torch}
answers["truth"] = {
    "user": torch.cuda.is_available(),
    "torch": eval("torch.cuda.is_available()", from_torch),
}
answers["averaged"] = networks_that_ask.AVERAGED
print("ANSWERS" + json.dumps(answers))
"""
_ROWS: dict[str, Any] = {"inputs": ["2x16"]}
_TOKENS: dict[str, Any] = {"inputs": ["2x6x16"]}
_REFUSED = {
    "stream": "leave out torch.cuda.Stream",
    "event": "streams, events and graphs of torch.cuda are not followed",
    "current stream": "torch.cuda.current_stream is not known while a step is predicted",
    "peak": "torch.cuda.max_memory_allocated is not known while a step is predicted",
    "generator": "draw from torch's default one",
    "numpy": ".numpy() cannot be followed",
    "format": "a number of a tensor's cannot be printed",
}
_REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"network": "Plain", **_ROWS},
    "asks": {"network": "Asks", **_ROWS},
    "moved": {"network": "on_gpu", **_ROWS},
    "parts": {"network": "MovesInConstructor", **_ROWS},
    "parts, built for real": {
        "network": "MovesInConstructor",
        "arguments": {"reads": True},
        **_ROWS,
    },
    "parts, with a technique": {
        "network": "MovesInConstructor",
        "techniques": ["optimizer_in_backward"],
        **_ROWS,
    },
    "bfloat16": {"network": "in_bfloat16", "inputs": ["2x16x4"]},
    "bfloat16, as it wants": {"network": "in_bfloat16", "inputs": ["2x16x4:bfloat16"]},
    "kept": {"network": "KEPT", **_ROWS},
    "kept, again": {"network": "kept", **_ROWS},
    "scaled": {"network": "Scaled", **_ROWS},
    "scaled, again": {"network": "Scaled", **_ROWS},
    "nested": {"network": "Nested", **_ROWS},
    "causal encoder": {"network": "Masked", **_TOKENS},
    "open encoder": {"network": "Masked", "arguments": {"causal": False}, **_TOKENS},
    "decoder": {"network": "Masked", "arguments": {"kind": "decoder"}, **_TOKENS},
    "both": {"network": "Masked", "arguments": {"kind": "both"}, "precision": "bf16", **_TOKENS},
    "padded": {
        "network": "Masked",
        "arguments": {"causal": False, "padded": True},
        "mode": "infer",
        **_TOKENS,
    },
    "average": {"network": "Averaged", **_ROWS},
    "own average": {"network": "Averaged", "arguments": {"own": True}, "steps": 3, **_ROWS},
    "bug": {"network": "Asking", "arguments": {"what": "bug"}, **_ROWS},
    **{w: {"network": "Asking", "arguments": {"what": w}, **_ROWS} for w in _REFUSED},
}


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    try:
        build_shim()
    except ShimUnavailable as why:
        pytest.skip(str(why))
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(
        command, input=json.dumps(_REQUESTS), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.partition("ANSWERS")[2])
    return answers


def _line_of(text: str) -> int:
    source = Path(__file__).with_name("networks_that_ask.py").read_text().split("\n")
    return next(n for n, line in enumerate(source, start=1) if text in line)


def test_a_network_that_asks_about_its_gpu_is_answered_as_on_the_card(
    answers: dict[str, Any],
) -> None:
    assert answers["asks"]["reason"] == ""
    assert answers["asks"]["parameters"] == 16 * 16 + 16


def test_a_network_that_is_moved_by_its_factory_needs_what_it_needs_anyway(
    answers: dict[str, Any],
) -> None:
    """Without a note: its weights were never made."""
    assert answers["moved"] == answers["plain"]
    assert answers["plain"]["weights"] == 4 * (16 * 16 + 16)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("parts", []),
        ("parts, built for real", [BUILT_ON_CPU]),
        ("parts, with a technique", []),
    ],
)
def test_parts_that_a_constructor_moves_are_made_once_each(
    answers: dict[str, Any], name: str, notes: list[str]
) -> None:
    """Two layers that share a weight: 256 numbers, and two biases of 16."""
    assert answers[name]["reason"] == ""
    assert answers[name]["notes"] == notes
    assert answers[name]["parameters"] == 16 * 16 + 2 * 16


def test_a_network_all_in_bfloat16_is_told_which_inputs_to_give(answers: dict[str, Any]) -> None:
    assert "--input 2x16x4:bfloat16" in answers["bfloat16"]["reason"]
    assert answers["bfloat16, as it wants"]["weights"] == 2 * (16 * 16 + 16)
    assert answers["bfloat16, as it wants"]["notes"] == []


@pytest.mark.parametrize("name", ["kept", "kept, again"])
def test_a_network_that_a_module_keeps_is_new_in_each_case(
    answers: dict[str, Any], name: str
) -> None:
    assert answers[name] == answers["plain"]


@pytest.mark.parametrize("name", ["scaled", "scaled, again"])
def test_a_modules_own_tensor_lies_on_the_cpu_in_each_case(
    answers: dict[str, Any], name: str
) -> None:
    """Its copy, 64 bytes, is made anew in each of the two steps, and the product of 2x16."""
    sizes, plain = sorted(answers[name]["sizes"]), sorted(answers["plain"]["sizes"])
    assert answers[name]["reason"] == ""
    assert sizes.count(64) >= plain.count(64) + 2
    assert sizes.count(2 * 16 * 4) > plain.count(2 * 16 * 4)


def test_tensors_deep_in_containers_are_on_the_device_too(answers: dict[str, Any]) -> None:
    assert answers["nested"]["reason"] == ""


@pytest.mark.parametrize("name", ["causal encoder", "decoder", "both"])
def test_a_causal_mask_is_taken_for_one_and_noted(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["status"] == "ok", answers[name]["reason"]
    assert answers[name]["notes"] == [CAUSAL]


def test_an_encoder_without_a_mask_is_not_asked(answers: dict[str, Any]) -> None:
    assert answers["open encoder"]["notes"] == []


def test_a_padded_batch_stays_as_it_is_and_is_noted(answers: dict[str, Any]) -> None:
    assert answers["padded"]["reason"] == ""
    assert answers["padded"]["notes"] == [NOT_PACKED]


def test_an_average_of_the_weights_begins_with_a_copy(answers: dict[str, Any]) -> None:
    """Three steps: the first copies weight and bias, the other two average both."""
    assert answers["average"]["reason"] == ""
    assert answers["own average"]["reason"] == ""
    assert answers["averaged"] == 2 * ["(16, 16)", "(16,)"]


@pytest.mark.parametrize("what", _REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_line_and_what_to_do(
    answers: dict[str, Any], what: str
) -> None:
    answer = answers[what]
    assert answer["status"] == "failed"
    line = _line_of(f'case "{what}":') + 1
    assert re.match(rf"\S*networks_that_ask.py:{line}: ", answer["reason"]), answer["reason"]
    assert _REFUSED[what] in answer["reason"]


def test_a_bug_of_the_networks_own_keeps_its_own_words(answers: dict[str, Any]) -> None:
    assert "shape '[7, 7]' is invalid" in answers["bug"]["reason"]


def test_others_than_users_hear_the_truth_about_the_gpu(answers: dict[str, Any]) -> None:
    """What asks from the script is a user's, what asks from torch's own modules is not."""
    assert answers["truth"] == {"user": True, "torch": False}
