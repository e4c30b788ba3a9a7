"""A network that is not memsave's: in a case, in a suite and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.cli import app
from bench.errors import MembenchError
from bench.imported import Imported, InputSpec, check_reference, label, parse_input, resolve
from bench.imported_model import BUILT_ON_CPU
from bench.imported_workload import output_sum
from bench.predict.predictor import trace_case
from bench.predict.step_trace import Trace
from bench.predict.tracer import TraceError
from tests.bench.suite_files import GOOD, load, refusal

NETWORKS = "tests.bench.any_networks"
ROOT = Path(__file__).resolve().parents[2]


def case_of(reference: str, *inputs: str, **values: Any) -> Case:
    ours = {f: values.pop(f) for f in ("arguments", "classes", "target") if f in values}
    reference = reference if ":" in reference else f"{NETWORKS}:{reference}"
    return Case(
        network=label(reference),
        variant="plain",
        requested_shape=(8, 8, 8),
        shape=(8, 8, 8),
        loss=values.pop("loss", "sum"),
        imported=Imported(reference=reference, inputs=inputs, **ours),
        **values,
    )


def traced(case: Case) -> Trace:
    return trace_case(case, "cpu")[0]


def held_bytes(trace: Trace, category: str) -> int:
    sizes = {event[1]: event[2] for event in trace.events if event[0] == "alloc"}
    return sum(size for i, size in sizes.items() if trace.categories[i] == category)


# -- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x1x8x8x8", InputSpec((1, 1, 8, 8, 8))),
        ("2x77:int64", InputSpec((2, 77), "int64")),
        ("4,float16", InputSpec((4,), "float16")),
    ],
)
def test_an_input_is_its_shape_and_type(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1xax8", "no shape"),
        ("", "no shape"),
        ("1x8:float33", "no type 'float33' (did you mean 'float32'"),
        ("1x0x8", "no elements"),
        ("99999999x99999999", "more than"),
    ],
)
def test_another_input_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(MembenchError, match="input ") as error:
        parse_input(text)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("nosuchpackage.net:Net", "no module 'nosuchpackage'"),
        (f"{NETWORKS}:Flexibel", "has no 'Flexibel' (did you mean 'Flexible'"),
        ("tests.bench.nosuch:Net", "no module tests.bench.nosuch"),
        ("nosuchfile.py:Net", "no file nosuchfile.py"),
        ("Net", "write package.module:factory"),
        ("a b:Net", "write package.module:factory"),
        ("json:", "write package.module:factory"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(reference: str, why: str) -> None:
    with pytest.raises(MembenchError) as error:
        resolve(reference)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_needs_another_one_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_network.py").write_text("import nosuchpackage\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(MembenchError, match="needs 'nosuchpackage'"):
        resolve("needy_network:Net")


def test_a_file_is_run_once_and_imports_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text("from beside_it import WIDTH\nclass Net:\n    width = WIDTH\n")
    found = resolve(f"{tmp_path}/net.py:Net")
    assert found.width == 5
    assert resolve(f"{tmp_path}/net.py:Net") is found
    assert label(f"{tmp_path}/net.py:Net") == "net.py:Net"


def test_looking_for_a_reference_runs_nothing_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("raise SystemExit('was run')\n")
    check_reference(f"{path}:Net")


# -- workloads ----------------------------------------------------------------------------------


def test_a_users_network_takes_exactly_the_bytes_of_its_parameters() -> None:
    """Flexible: 1*4*27 + 4 weights of the first, 4*3 + 3 of the last convolution, in float32."""
    trace = traced(case_of("Flexible"))
    assert held_bytes(trace, "parameter") == 4 * (1 * 4 * 27 + 4 + 4 * 3 + 3)
    assert {site.module for site in trace.sites} >= {"first", "last"}
    assert trace.notes == ()


def test_ours_by_import_and_by_name_are_the_same_events() -> None:
    """The image, the target, every activation and gradient: all that the steps themselves do."""
    named = Case(
        network="fcn",
        variant="plain",
        requested_shape=(8, 8, 8),
        shape=(8, 8, 8),
        network_options={"widths": [2, 4]},
        precision="bf16",
    )
    imported = case_of(
        "memsave.networks:FCN",
        arguments={"widths": [2, 4]},
        loss="cross_entropy+dice",
        precision="bf16",
    )
    ours, theirs = traced(named).events, traced(imported).events
    start = ("phase", "forward")
    ours, theirs = (e[e.index(start) :] for e in (ours, theirs))
    plain = [[e[2] if e[0] == "alloc" else e[0] for e in events] for events in (ours, theirs)]
    assert plain[0] == plain[1]


def test_a_weight_that_stands_twice_is_made_once_and_plain_tensors_are_made_too() -> None:
    trace = traced(case_of("Tied", "2x16"))
    assert held_bytes(trace, "parameter") == 4 * 16 * 16


def test_a_recurrent_layer_knows_its_weights_anew() -> None:
    trace = traced(case_of("Recurrent", "5x2x4"))
    assert held_bytes(trace, "parameter") == 4 * 2 * (4 * 4 * 4 + 4 * 4)
    assert any(site.module == "cell" for site in trace.sites)


def test_a_list_that_two_modules_hold_is_still_one() -> None:
    """What the one puts into it the other finds: the last convolution sees 4 channels, 8x8x8."""
    operators = [site.operator for site in traced(case_of("SharedList")).sites]
    assert operators.count("aten.convolution.default") == 2 * 2  # two steps


def test_names_that_a_module_imported_are_not_called_its_own() -> None:
    with pytest.raises(MembenchError) as error:
        resolve(f"{NETWORKS}:zzz")
    assert "'Flexible'" in str(error.value) or "Flexible, " in str(error.value)
    assert "Iterable" not in str(error.value)
    assert "nn" not in str(error.value).split("known: ")[1].split(")")[0].split(", ")


def test_several_inputs_have_the_types_that_they_are_given() -> None:
    """2x7 tokens in int64 and 2x7x5 weights in float16: 112 and 140 bytes."""
    trace = traced(case_of("TwoInputs", "2x7:int64", "2x7x5:float16"))
    assert held_bytes(trace, "input") == 2 * 7 * 8 + 2 * 7 * 5 * 2


@pytest.mark.parametrize("meta", [False, True], ids=["plain", "with a technique"])
def test_a_constructor_that_reads_values_is_built_on_the_cpu_and_noted(meta: bool) -> None:
    techniques = (TechniqueUse(name="checkpoint", options={"blocks": ["first"]}),) if meta else ()
    trace = traced(case_of("ReadsInConstructor", techniques=techniques))
    assert trace.notes == (BUILT_ON_CPU,)
    assert held_bytes(trace, "parameter") == 4 * (1 * 4 * 27 + 4 + 4 * 3 + 3)


def test_a_forward_that_reads_values_is_named_with_its_line() -> None:
    source = Path(__file__).with_name("any_networks.py").read_text().split("\n")
    line = next(n for n, text in enumerate(source, start=1) if "this line is named" in text)
    with pytest.raises(TraceError, match=f"any_networks.py:{line}: .*keep .item"):
        traced(case_of("ReadsInForward"))


@pytest.mark.parametrize(
    ("loss", "target_bytes"),
    [
        ("sum", 0),
        ("cross_entropy", 8 * 8**3),  # int64 class indices
        ("l2_dice", 8 * 8**3),
        ("binary_cross_entropy", 4 * 3 * 8**3),  # a mask of the output's 3 channels
        (f"{NETWORKS}:doubled_cross_entropy", 8 * 8**3),
        (f"{NETWORKS}:output_norm", 0),  # takes the output alone
        ("torch.nn:CrossEntropyLoss", 8 * 8**3),
    ],
)
def test_a_loss_gets_the_target_that_it_takes(loss: str, target_bytes: int) -> None:
    trace = traced(case_of("Flexible", loss=loss, classes=3))
    assert held_bytes(trace, "input") == 4 * 8**3 + target_bytes


def test_a_target_that_is_named_is_used() -> None:
    trace = traced(case_of("Flexible", loss="torch.nn:MSELoss", target="1x3x8x8x8"))
    assert held_bytes(trace, "input") == 4 * 8**3 + 4 * 3 * 8**3


def test_a_classifier_is_trained_towards_one_class_a_sample() -> None:
    assert traced(case_of("Classifier", loss="cross_entropy")).events


def test_every_tensor_of_an_output_is_in_its_sum() -> None:
    trace = traced(case_of("TwoOutputs"))
    gradients = [s for s in trace.sites if s.operator.startswith("aten.convolution_backward")]
    assert gradients


@pytest.mark.parametrize(
    ("network", "values", "why"),
    [
        ("Half", {"loss": "cross_entropy"}, "gives 1x3x8x8x4 for an input of 1x1x8x8x8"),
        ("TwoOutputs", {"loss": "dice"}, "gives a dict of 2, loss 'dice' takes one tensor"),
        ("Flexible", {"loss": "dice", "classes": 4}, "not 4 classes"),
        ("Flexible", {"loss": "dise"}, "unknown loss 'dise' (did you mean 'dice'"),
        ("Flexible", {"loss": f"{NETWORKS}:NETWORKS_"}, "has no 'NETWORKS_'"),
        ("Flexible", {"loss": "math:pi"}, "is a float: name a function"),
        ("Flexible", {"loss": "torch.nn:Identity"}, "not one number"),
        ("Flexible", {"optimizer": "adem"}, "unknown optimizer 'adem' (did you mean"),
        ("Flexible", {"optimizer": f"{NETWORKS}:huge"}, "huge"),
        ("ByKeyword", {}, "forward takes image by keyword alone, and inputs are given by position"),
        ("TwoInputs", {}, "cannot be called with 1 input: give one for each argument"),
        ("Lazy", {}, "LazyLinear has no weight before its first input"),
        (
            "Flexible",
            {"loss": f"{NETWORKS}:three_arguments"},
            "takes (output, target, variance), and is called with (output, target)",
        ),
        ("Flexible", {"loss": "torch.nn:GaussianNLLLoss"}, "takes (input, target, var), and is"),
        (
            "Flexible",
            {"loss": "torch.nn:AdaptiveLogSoftmaxWithLoss"},
            "is called with nothing, to be made",
        ),
        ("Flexible", {"optimizer": "torch.optim:LBFGS"}, "step(closure) cannot be called without"),
        ("no_module", {}, "gave a int, not a torch.nn.Module"),
        ("math:pi", {}, "is a float: name a function or class"),
        ("torch.nn:Identity", {}, "no parameter that is trained: use mode infer"),
        ("Flexible", {"techniques": (TechniqueUse(name="inplace_abn"),)}, "inplace_abn"),
    ],
)
def test_what_does_not_fit_together_is_said_in_one_line(
    network: str, values: dict[str, Any], why: str
) -> None:
    with pytest.raises((MembenchError, TypeError)) as error:
        traced(case_of(network, **values))
    assert why in str(error.value)


def test_an_output_without_gradients_cannot_be_trained() -> None:
    with pytest.raises(MembenchError, match="a tensor of 1x3x8x8x8, in which no tensor has a grad"):
        traced(case_of("Detached"))


@pytest.mark.parametrize("optimizer", [f"{NETWORKS}:make_adamw", "torch.optim:AdamW", "adamw"])
def test_an_optimizer_of_ones_own_has_the_temporaries_that_it_has_on_cuda(optimizer: str) -> None:
    """foreach, torch's choice on CUDA, under fake tensors too: as the one that a suite names."""
    ours = traced(case_of("Flexible", optimizer="adamw")).events
    theirs = traced(case_of("Flexible", optimizer=optimizer)).events
    assert [e[2] for e in theirs if e[0] == "alloc"] == [e[2] for e in ours if e[0] == "alloc"]


def test_a_prediction_without_training_has_neither_gradients_nor_loss() -> None:
    trace = traced(case_of("Flexible", mode="infer", loss="cross_entropy"))
    assert held_bytes(trace, "gradient") == 0
    assert held_bytes(trace, "input") == 4 * 8**3


def test_what_a_constructor_holds_for_a_moment_is_traced_before_the_step() -> None:
    trace = traced(case_of("WorksOutATable", "1x1x8x8x8"))
    table = next(e[1] for e in trace.events if e[0] == "alloc" and e[2] == 4 * 512 * 512)
    events = [event[:2] for event in trace.events]
    assert events.index(("free", table)) < events.index(("phase", "forward"))


def test_what_a_factory_makes_elsewhere_is_moved_as_a_script_would() -> None:
    here, elsewhere = (case_of(name, "1x1x8x8x8") for name in ("Flexible", "made_on_meta"))
    assert held_bytes(traced(elsewhere), "parameter") == held_bytes(traced(here), "parameter") > 0
    workload = build_workload(elsewhere, lambda _phase: None, "cpu")
    workload.step(lambda _phase: None)
    assert all(weight.device.type == "cpu" for weight in workload.model.parameters())


def test_the_same_workload_runs_on_real_tensors() -> None:
    """What is predicted is what is measured: one code, on the CPU here."""
    case = case_of("Flexible", loss="cross_entropy", techniques=(
        TechniqueUse(name="checkpoint", options={"blocks": ["first"]}),))  # fmt: skip
    workload = build_workload(case, lambda _phase: None, "cpu")
    weight = next(workload.model.parameters())
    before = weight.detach().clone()
    workload.step(lambda _phase: None)
    assert not torch.equal(before, weight)


# -- MONAI --------------------------------------------------------------------------------------

_DYNUNET = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 8],
}


def test_nnunets_network_keeps_less_with_a_technique_applied() -> None:
    pytest.importorskip("monai")
    reference, values = "monai.networks.nets:DynUNet", {"arguments": _DYNUNET, "classes": 3}
    plain = traced(case_of(reference, loss="cross_entropy", **values))
    uses = (TechniqueUse(name="inplace_instance_norm"),)
    in_place = traced(case_of(reference, loss="cross_entropy", techniques=uses, **values))
    assert held_bytes(in_place, "parameter") == held_bytes(plain, "parameter")
    assert held_bytes(in_place, "activation") < 0.7 * held_bytes(plain, "activation")


@pytest.mark.slow
def test_a_transformer_whose_constructor_reads_values_is_traced() -> None:
    pytest.importorskip("monai")
    arguments = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "depths": [1, 1, 1, 1]}
    case = case_of("monai.networks.nets:SwinUNETR", "1x1x64x64x64", arguments=arguments)
    assert traced(case).notes == (BUILT_ON_CPU,)


# -- suites -------------------------------------------------------------------------------------

ROW = f"network: {{import: '{NETWORKS}:Flexible', arguments: {{width: 2}}, classes: 3}}"
FCN_ROW = "name: fcn, variant: small, block: ccblock"


def with_network(row: str) -> str:
    """The good suite with another second row, at line 6."""
    return GOOD.replace(FCN_ROW, f"variant: mine, {row}")


def test_a_suite_takes_any_network_beside_ours(tmp_path: Path) -> None:
    single = f"include:\n  - {{variant: alone, {ROW}, shape: 8x8}}\n"
    cases = load(tmp_path, with_network(ROW + ", techniques: [checkpoint]") + single).cases()
    mine = [case for case in cases if case.imported is not None]
    assert [case.name for case in mine] == [
        f"{NETWORKS}:Flexible/mine/96x96x96/train",
        f"{NETWORKS}:Flexible/mine/64x64x45/train",
        f"{NETWORKS}:Flexible/alone/8x8/train",
    ]
    assert mine[0].imported == Imported(
        reference=f"{NETWORKS}:Flexible", arguments={"width": 2}, classes=3
    )
    assert {case.loss for case in mine} == {"sum"}
    assert Case.from_definition(json.loads(json.dumps(mine[0].to_definition()))) == mine[0]


def test_a_network_of_ones_own_is_padded_to_its_divisor_and_called_by_its_name(
    tmp_path: Path,
) -> None:
    row = f"name: mine, network: {{import: '{NETWORKS}:Flexible', divisor: 16}}"
    cases = load(tmp_path, with_network(row)).cases(glob="mine/*")
    assert [(case.name, case.shape) for case in cases] == [
        ("mine/mine/96x96x96/train", (96, 96, 96)),
        ("mine/mine/64x64x45/train", (64, 64, 48)),
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("network: {import: 'nosuchpackage:Net'}", "matrix.networks[1].network.import: network "),
        ("network: {import: 'Net'}", "write package.module:factory"),
        ("network: {import: 'json:loads', argument: {}}", "unknown key (did you mean 'arguments'"),
        (ROW + ", widths: [2]", "stand under network: {arguments: ...}"),
        ("network: {arguments: {}}", "'import' is missing"),
        ("network: fcn", "should be a mapping"),
        ("network: {name: fcn}", "network: is for one of your own"),
        ("block: ccblock", "'name' is missing"),
        (ROW + ", techniques: [chekpoint]", "unknown technique 'chekpoint'"),
        (
            ROW + ", precision: fp16, techniques: [optimizer_in_backward]",
            "'optimizer_in_backward' cannot be used at precision fp16: take fp32 or bf16",
        ),
        (ROW + ", training: {loss: 'nosuchpackage:loss'}", "loss 'nosuchpackage:loss'"),
        (ROW + ", training: {optimizer: 'nosuchpackage:make'}", "optimizer 'nosuchpackage:make'"),
        ("name: fcn, training: {loss: sum}", "is for networks of your own"),
    ],
)
def test_a_mistake_in_such_a_row_is_pointed_at(tmp_path: Path, row: str, why: str) -> None:
    message = refusal(tmp_path, with_network(row))
    assert message.startswith("line 6: ")
    assert why in message


def test_a_suite_of_a_network_that_is_not_installed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "monai", raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "monai" else found(name)
    )
    row = "network: {import: 'monai.networks.nets:UNet'}"
    assert "no module 'monai', here or installed; install it" in refusal(
        tmp_path, with_network(row)
    )


# -- the command line ---------------------------------------------------------------------------


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_predict_prints_a_record_of_a_network_in_the_directory_one_runs_in(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(f"from {NETWORKS} import Flexible\n")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "predict", "--network", "mynet:Flexible", "--input",
         "1x1x16x16x16", "--loss", "cross_entropy", "--json", "--card", "t4-16gb",
         "--arguments", '{"width": 2}', "--trace", "mine.pickle"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["network"], record["card"], record["status"]) == (
        "mynet:Flexible",
        "t4-16gb",
        "ok",
    )
    assert record["parameters"] == 1 * 2 * 27 + 2 + 2 * 3 + 3
    assert record["evidence"] == "predicted"
    assert (tmp_path / "mine.pickle").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--network", "nosuchpackage:Net", "--input", "1x1x8"), "no module 'nosuchpackage'"),
        (("--network", "json:loads"), "needs its input"),
        (("--network", "json:loads", "--input", "1x1", "--shape", "8x8"), "needs its input"),
        (("--network", "fmn", "--shape", "8x8x8"), "unknown network 'fmn' (did you mean 'fcn'"),
        (("--network", "fcn"), "needs --shape"),
        (("--network", "fcn", "--shape", "8x8"), "has 2 sides, fcn takes 3"),
        (("--network", "fcn", "--input", "1x1x8x8x8"), "give --shape alone"),
        (("--network", "fcn", "--shape", "8x8x8", "--arguments", "[]"), "no JSON object"),
        (("--network", "fcn", "--shape", "8x8x8", "--arguments", "{"), "is no JSON"),
        (("--network", "fcn", "--shape", "8x8x8", "--techniques", "nope"), "unknown technique"),
        (("--network", "fcn", "--shape", "8x8x8", "--techniques", "[nope"), "is no JSON"),
        (("--network", "fcn", "--shape", "8x8x8", "--loss", "nope"), "unknown loss"),
        (("--network", "fcn", "--shape", "8x8x8", "--card", "nope-1gb"), "nope-1gb"),
        (("--network", "fcn", "--shape", "8x8x8", "--trace", "x.txt"), "FILE.pickle"),
    ],
)
def test_misuse_of_predict_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], why: str
) -> None:
    code, out, error = invoke("predict", *arguments)
    assert (code, out) == (2, "")
    assert why in error
    assert len(error.splitlines()) == 1


@dataclass(slots=True)
class _Slots:
    first: torch.Tensor
    name: str


def test_the_sum_loss_looks_into_a_dataclass_with_slots() -> None:
    numbers = torch.ones(3, requires_grad=True)
    assert output_sum(_Slots(numbers, "one")).item() == 3.0
