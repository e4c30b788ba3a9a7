"""``bench.predict`` from a user's own process: what it takes, what it gives, what it refuses."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from bench.errors import MembenchError
from bench.portable import pack, unpack
from bench.predict.cards import find_card
from bench.prediction import Prediction, predict, predict_case, technique_uses
from tests.bench import any_networks
from tests.bench.any_networks import Flexible

ROOT = Path(__file__).resolve().parents[2]
INPUT = "1x1x16x16x16"


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def make_empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


@pytest.fixture(scope="module")
def by_name() -> Prediction:
    return bench.predict(f"{any_networks.__name__}:Flexible", INPUT, loss="cross_entropy")


# -- the name -----------------------------------------------------------------------------------


def test_importing_bench_imports_no_torch_and_predict_is_there_in_either_order() -> None:
    script = (
        "import sys, bench; assert 'torch' not in sys.modules; assert callable(bench.predict); "
        "from bench.predict.cards import find_card; assert callable(bench.predict); "
        "assert bench.predict is sys.modules['bench.predict']; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    package: object = importlib.import_module("bench.predict")
    assert package is bench.predict


def test_the_package_calls_what_is_documented() -> None:
    assert inspect.signature(bench.predict) == inspect.signature(predict)
    assert bench.Prediction is Prediction
    with pytest.raises(AttributeError, match="no attribute 'predictt'"):
        bench.predictt  # noqa: B018


# -- what it gives ------------------------------------------------------------------------------


def test_a_prediction_has_the_figures_of_a_record(by_name: Prediction) -> None:
    """127 parameters: 1*4*27 + 4 and 4*3 + 3."""
    record = by_name.record
    assert by_name.parameters == record.parameters == 127
    assert by_name.status == record.status == "ok"
    assert by_name.reason == ""
    assert by_name.peak_allocated_bytes == record.peak_allocated_bytes
    assert by_name.needs_bytes == record.needs_bytes
    assert by_name.process_bytes == by_name.peak_reserved_bytes + by_name.card.context_bytes
    assert by_name.tracer == record.tracer
    assert by_name.tracer in ("cuda", "cuda-shim", "cpu")
    assert record.evidence == "predicted"
    assert by_name.notes == ()


def test_its_timeline_reaches_its_peak_exactly(by_name: Prediction) -> None:
    assert max(by_name.timeline().allocated_bytes()) == by_name.peak_allocated_bytes


def test_its_explanation_names_modules_lines_and_categories(by_name: Prediction) -> None:
    text = by_name.explain(top=3)
    assert "(predicted)" in text
    for named in ("by category", "activations", "by module", "first", "any_networks.py:"):
        assert named in text


def test_it_fits_cards_by_name_and_by_themselves(by_name: Prediction) -> None:
    from dataclasses import replace

    t4 = find_card("t4-16gb")
    needed = by_name.needs_bytes
    assert by_name.fits()
    assert by_name.fits("t4-16gb")
    assert by_name.fits(t4)
    card = by_name.card  # its workspaces, with other memory
    enough = replace(card, name="own-1gb", memory_bytes=card.context_bytes + needed)
    too_small = replace(enough, memory_bytes=enough.memory_bytes - 2 * 2**20)
    assert by_name.fits(enough)
    assert not by_name.fits(too_small)
    with pytest.raises(MembenchError, match="nope-1gb"):
        by_name.fits("nope-1gb")


def test_a_network_given_as_an_object_is_the_same_prediction(by_name: Prediction) -> None:
    """A partial of its class, and a module on meta whose weights do not exist."""
    with torch.device("meta"):
        module = Flexible()
    partial = functools.partial(Flexible, classes=3)
    for build in (partial, module):
        other = bench.predict(build, (1, 1, 16, 16, 16), loss=torch.nn.functional.cross_entropy)
        assert other.peak_allocated_bytes == by_name.peak_allocated_bytes
        assert other.peak_reserved_bytes == by_name.peak_reserved_bytes
        assert other.record.network.endswith("Flexible")


def test_a_step_that_does_not_fit_is_a_result_and_its_trace_ends_there(tmp_path: Path) -> None:
    """One activation of 4 x 1024^3 floats is 16 GiB, a T4 has less."""
    prediction = bench.predict(Flexible, "1x1x1024x1024x1024", card="t4-16gb", mode="infer")
    assert (prediction.status, prediction.fits()) == ("oom", False)
    assert "needs" in prediction.reason
    assert prediction.process_bytes is None
    assert prediction.needs_bytes >= 16 * 2**30
    assert prediction.fits("a100-80gb")
    prediction.save_trace(tmp_path / "oom.json")
    assert '"oom"' not in (tmp_path / "oom.json").read_text()  # counters and slices alone


def test_what_is_defined_in_the_running_script_is_found_in_its_file(tmp_path: Path) -> None:
    script = """
import bench
from tests.bench.any_networks import Flexible

class Mine(Flexible):
    pass

print("imported as", __name__)
if __name__ == "__main__":
    print(bench.predict(Mine, "1x1x8x8x8").parameters)
"""
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported", "as", "__main__", "127"]


def test_a_script_that_predicts_while_it_is_imported_is_told_what_to_do(tmp_path: Path) -> None:
    script = """
import bench
from tests.bench.any_networks import Flexible

class Mine(Flexible):
    pass

bench.predict(Mine, "1x1x8x8x8")
"""
    done = run(script, tmp_path)
    assert done.returncode == 1
    assert "put the call under if __name__ == '__main__':" in done.stderr


# -- what it refuses ----------------------------------------------------------------------------


def defined_inside() -> Any:
    def factory() -> torch.nn.Module:
        return Flexible()

    return factory


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"build": lambda: Flexible()}, "build cannot be sent .* a lambda"),
        ({"build": functools.partial(lambda n: n, 3)}, "a lambda"),
        ({"build": defined_inside()}, "defined inside of a function"),
        ({"build": 3}, "build is 3: give something that can be called"),
        ({"build": "Flexible"}, "write package.module:factory"),
        ({"build": "nosuchpackage:Net"}, "no module 'nosuchpackage'"),
        ({"loss": lambda y: y.sum()}, "loss cannot be sent"),
        ({"loss": "nosuchpackage:loss"}, "loss 'nosuchpackage:loss'"),
        ({"inputs": {"x": INPUT}}, "in the order of forward's arguments"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": 3}, "input 3 is no shape"),
        ({"inputs": [INPUT, "1xa"]}, "input '1xa' is no shape"),
        ({"techniques": "chekpoint"}, "unknown technique 'chekpoint'"),
        ({"techniques": [("checkpoint", {"evry": 2})]}, "unknown option"),
        ({"techniques": [3]}, "a technique is its name"),
        ({"mode": "test"}, "mode is 'test', not one of train, infer"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"steps": 0}, "steps is 0"),
        ({"card": "nope-1gb"}, "nope-1gb"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_cannot_be_predicted_is_refused_before_a_child_is_started(
    given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.prediction.Child", None)
    with pytest.raises(MembenchError, match=why):
        bench.predict(**{"build": Flexible, "inputs": INPUT, **given})


def test_what_the_users_code_raises_is_one_line_with_its_place() -> None:
    with pytest.raises(MembenchError, match=r"ValueError: the width must be even \(any_networks"):
        bench.predict(any_networks.failing, INPUT)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ((1, 1, 8), ("1x1x8:float32",)),
        ([1, 1, 8], ("1x1x8:float32",)),
        (((1, 8), "int64"), ("1x8:int64",)),
        (((1, 8), torch.float16), ("1x8:float16",)),
        ([(1, 8), (2, 3)], ("1x8:float32", "2x3:float32")),
        (["1x8", torch.empty(2, 3, dtype=torch.int32)], ("1x8:float32", "2x3:int32")),
        (torch.empty(4, 5, device="meta"), ("4x5:float32",)),
        (torch.Size((4, 5)), ("4x5:float32",)),
    ],
)
def test_inputs_may_be_written_in_several_ways(
    inputs: Any, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("bench.prediction.predict_case", lambda case, _card: seen.append(case))
    predict(Flexible, inputs)
    assert seen[0].imported.inputs == expected


def test_techniques_may_be_written_as_apply_takes_them() -> None:
    one = technique_uses([("checkpoint", {"every": 2})])
    assert technique_uses({"checkpoint": {"every": 2}}) == one
    assert technique_uses("checkpoint")[0].options == {}


def test_weights_are_sent_as_shapes_and_those_that_are_shared_stay_shared() -> None:
    """16 x 2^20 floats would be 85 MiB of text."""
    linear = torch.nn.Linear(4096, 4096)
    text = pack("build", [linear, linear.weight, torch.empty(2, 3).t()])
    assert len(text) < 20_000
    copy, weight, turned = unpack(text, make_empty)
    assert copy.weight is weight
    assert (weight.shape, weight.requires_grad) == ((4096, 4096), True)
    assert turned.stride() == (1, 3)


@pytest.mark.slow
def test_a_hundred_million_parameters_take_seconds_and_no_memory_for_weights() -> None:
    """The child's memory grows by less than 100 MiB over that of a network of 127 parameters.

    Its weights alone would be 400,056,240 bytes, 382 MiB.
    """
    bench.predict(Flexible, INPUT)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    prediction = bench.predict(any_networks.huge, "8x3162")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert prediction.parameters == 10 * (3162**2 + 3162)
    assert prediction.peak_allocated_bytes > 4 * 4 * prediction.parameters  # and Adam's two states
    assert after.ru_maxrss - before.ru_maxrss < 100 * 1024  # KiB
    assert took_s < 10  # processor time, which does not depend on what else runs here


def test_a_case_of_memsaves_is_predicted_too() -> None:
    from bench.named_case import named_case

    case = named_case("fcn", shape="16x16x13", arguments={"widths": [2, 4]})
    assert case.shape == (16, 16, 14)
    assert predict_case(case, "t4-16gb").record.network == "fcn"
