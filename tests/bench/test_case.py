"""A case as data: its names, its round trip and what its digest sees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.case import Case, PaperFigure, PaperTime, TechniqueUse, known_fields
from bench.imported import Imported
from tests.bench.records import make_case

FULL: dict[str, Any] = {
    "network": "fcn",
    "variant": "ccblock+checkpoint",
    "requested_shape": (256, 256, 234),
    "shape": (256, 256, 240),
    "mode": "infer",
    "batch_size": 2,
    "precision": "bf16",
    "network_options": {"block": "ccblock", "widths": [64, 128]},
    "techniques": (TechniqueUse(name="checkpoint", options={"every": 2}), TechniqueUse(name="x")),
    "loss": "dice",
    "optimizer": "sgd",
    "optimizer_options": {"lr": 0.01},
    "schedule": "poly",
    "schedule_options": {"epochs": 100},
    "steps": 3,
    "timed_steps": 4,
    "seed": 7,
    "cudnn_benchmark": True,
    "time_limit_s": 12.5,
    "volumes": ("head.nii.gz",),
    "paper": PaperFigure(text="> 32 GB", relation=">", bytes=32 * 10**9),
    "paper_time": PaperTime(text="< 45 s", relation="<", seconds=45.0),
    "paper_flops": 20_339_341_715,
    "baseline": "double_conv",
    "position": 5,
    "card": "t4-16gb",
    "imported": Imported(
        reference="package.module:Net",
        arguments={"width": 8},
        in_channels=2,
        classes=3,
        inputs=("1x2x8x8x8:float16",),
        target="1x8x8x8:int64",
        pickled={"loss": "gA=="},
    ),
}


def test_a_case_comes_back_from_its_definition_through_json() -> None:
    """Every field, each with a value that is not its default."""
    case = Case(**FULL)
    assert set(FULL) == set(Case.__slots__)
    assert Case.from_definition(json.loads(json.dumps(case.to_definition()))) == case
    assert Case.from_definition(make_case().to_definition()) == make_case()


def test_a_definition_is_json_data_and_nothing_else() -> None:
    """Lists for tuples: what is written equals what is read."""
    definition = Case(**FULL).to_definition()
    assert json.loads(json.dumps(definition)) == definition
    assert definition["requested_shape"] == [256, 256, 234]


def test_a_definition_of_a_later_version_is_read_by_what_is_known_of_it() -> None:
    case = Case(**FULL)
    definition = case.to_definition()
    definition["later"] = 1
    definition["paper"]["later"] = 1
    definition["techniques"][0]["later"] = 1
    assert Case.from_definition(definition) == case


def test_names_hold_the_requested_shape_and_globs_see_the_padded_one_too() -> None:
    case = make_case(requested_shape=(256, 256, 234), shape=(256, 256, 240))
    assert case.name == "fcn/baseline/256x256x234/train"
    assert case.aliases == ("fcn/baseline/256x256x234/train", "fcn/baseline/256x256x240/train")
    assert case.to_definition()["case"] == case.name


def test_a_shape_that_was_not_padded_has_one_name() -> None:
    assert make_case(mode="infer").aliases == ("fcn/baseline/96x96x96/infer",)


@pytest.mark.parametrize(
    "field",
    [
        {"precision": "fp16"},
        {"batch_size": 2},
        {"shape": (96, 96, 104)},
        {"network_options": {"block": "ccblock"}},
        {"techniques": (TechniqueUse(name="checkpoint"),)},
        {"techniques": (TechniqueUse(name="checkpoint", options={"every": 2}),)},
        {"optimizer_options": {"foreach": False}},
        {"steps": 3},
        {"seed": 1},
        {"cudnn_benchmark": True},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_shapes_the_figures(field: dict[str, Any]) -> None:
    assert make_case(**field).digest() != make_case().digest()


def test_the_digest_ignores_what_only_a_report_reads() -> None:
    """A corrected figure of the paper, or a case added before this one, makes no case anew."""
    paper = PaperFigure(text="3.7 GB", relation="=", bytes=3_700_000_000)
    other = make_case(paper=paper, position=9, volumes=("head.nii.gz",))
    assert other.digest() == make_case().digest()


def test_the_digest_ignores_the_schedule() -> None:
    """It sets numbers: no byte and no second of a step depend on it."""
    other = make_case(schedule="poly", schedule_options={"power": 2})
    assert other.digest() == make_case().digest()


def test_the_digest_is_equal_after_a_round_trip() -> None:
    case = Case(**FULL)
    again = Case.from_definition(json.loads(json.dumps(case.to_definition())))
    assert again.digest() == case.digest()


def test_known_fields_keeps_what_the_class_has() -> None:
    assert known_fields(TechniqueUse, {"name": "x", "later": 1}) == {"name": "x"}
