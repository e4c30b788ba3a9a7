"""The cases that a suite makes: axes, includes, excludes, figures, volumes."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import bench
from bench.case import Case, PaperFigure, PaperTime, TechniqueUse
from bench.errors import MembenchError, SuiteError
from bench.suite import Suite, load_suite, shipped_suites
from memsave.networks import NETWORKS
from tests.bench.suite_files import GOOD, load, with_row

SUITES = Path(__file__).resolve().parents[2] / "suites"


def names(suite: Suite) -> list[str]:
    return [case.name for case in suite.cases()]


def test_a_matrix_gives_each_row_each_shape_in_the_order_of_the_file(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD)
    assert names(suite) == [
        "fcn/baseline/96x96x96/train",
        "fcn/baseline/64x64x45/train",
        "fcn/small/96x96x96/train",
        "fcn/small/64x64x45/train",
    ]
    assert [case.shape for case in suite.cases()] == [(96, 96, 96), (64, 64, 48)] * 2


def test_a_case_has_all_that_the_suite_says_of_it(tmp_path: Path) -> None:
    content = """\
title: All of it
time_limit_s: 30
cudnn_benchmark: true
training: {loss: dice, optimizer: {name: sgd, lr: 1e-3, momentum: 0.9}}
matrix:
  networks:
    - name: fcn
      variant: all
      norm: inplace_abn
      widths: [8, 16]
      precision: bf16
      batch: 3
      mode: infer
      techniques: [inplace_abn, {name: checkpoint, every: 2}]
      time_limit_s: 7.5
  shapes: [{shape: 300x90x41, crop: 256x256, pad: true}]
"""
    assert load(tmp_path, content).cases() == [
        Case(
            network="fcn",
            variant="all",
            requested_shape=(300, 90, 41),
            shape=(256, 90, 42),
            mode="infer",
            batch_size=3,
            precision="bf16",
            network_options={"norm": "inplace_abn", "widths": [8, 16]},
            techniques=(
                TechniqueUse(name="inplace_abn"),
                TechniqueUse(name="checkpoint", options={"every": 2}),
            ),
            loss="dice",
            optimizer="sgd",
            optimizer_options={"lr": 0.001, "momentum": 0.9},
            cudnn_benchmark=True,
            time_limit_s=7.5,
        )
    ]


def test_what_a_suite_does_not_say_is_what_the_readme_says(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD)
    case = suite.cases()[0]
    assert (case.mode, case.batch_size, case.precision, case.techniques) == ("train", 1, "fp32", ())
    assert (case.loss, case.optimizer, case.optimizer_options) == ("cross_entropy+dice", "adam", {})
    assert (case.time_limit_s, case.cudnn_benchmark, case.paper) == (600.0, False, None)
    assert (suite.time_limit_s, suite.cudnn_benchmark, suite.description) == (600.0, False, "")
    assert (suite.baseline, suite.citation, suite.unit) == (None, None, None)
    assert load(tmp_path, GOOD.replace("card: v100-32gb\n", "")).card is None


def test_a_suite_knows_its_file(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD + "baseline: baseline\n")
    assert (suite.name, suite.title, suite.card) == ("s", "Two rows", "v100-32gb")
    assert suite.baseline == "baseline"
    assert suite.source == tmp_path / "s.yaml"
    assert suite.digest == hashlib.sha256(suite.source.read_bytes()).hexdigest()[:16]


def test_an_axis_of_several_values_names_all_but_the_usual_one(tmp_path: Path) -> None:
    suite = load(
        tmp_path, with_row("precision: fp16") + "  batch: [1, 2]\n  precision: [fp32, bf16]\n"
    )
    assert [(c.variant, c.batch_size, c.precision) for c in suite.cases(glob="*/96x96x96/*")] == [
        ("baseline", 1, "fp32"),
        ("baseline+bf16", 1, "bf16"),
        ("baseline+batch2", 2, "fp32"),
        ("baseline+bf16+batch2", 2, "bf16"),
        ("small", 1, "fp16"),
        ("small+batch2", 2, "fp16"),
    ]


def test_an_axis_of_one_value_names_nothing(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD + "  batch: [2]\n  precision: [fp16]\n  mode: [infer]\n")
    case = suite.cases()[0]
    assert case.name == "fcn/baseline/96x96x96/infer"
    assert (case.batch_size, case.precision, case.mode) == (2, "fp16", "infer")


def test_an_entry_that_fixes_batch_or_mode_takes_no_part_in_the_axis(tmp_path: Path) -> None:
    row = with_row("batch: 4, mode: infer")
    suite = load(tmp_path, row + "  batch: [1, 2]\n  mode: [train, infer]\n")
    small = [case for case in suite.cases() if case.variant.startswith("small")]
    assert [(c.name, c.batch_size) for c in small] == [
        ("fcn/small/96x96x96/infer", 4),
        ("fcn/small/64x64x45/infer", 4),
    ]
    assert len(suite.cases()) == 2 * 4 + 2


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("{variant: small}", ["baseline/96", "baseline/64"]),
        ("{variant: small, shape: 64x64x45}", ["baseline/96", "baseline/64", "small/96"]),
        ("{variant: 's*'}", ["baseline/96", "baseline/64"]),
        ("{network: 'f?n', shape: '*x45', mode: train}", ["baseline/96", "small/96"]),
        ("{precision: fp16}", ["baseline/96", "baseline/64"]),
        ("{batch: 2}", ["baseline/96", "baseline/64"]),
        ("{batch: 1, variant: base*}", ["small/96", "small/64"]),
    ],
)
def test_exclude_leaves_out_what_matches_all_its_keys(
    tmp_path: Path, exclude: str, left: list[str]
) -> None:
    suite = load(tmp_path, with_row("precision: fp16, batch: 2") + f"exclude: [{exclude}]\n")
    assert [f"{c.variant}/{c.requested_shape[0]}" for c in suite.cases()] == left


def test_a_shape_that_one_network_cannot_pool_may_be_excluded_for_it(tmp_path: Path) -> None:
    """20 divides by 4, what three levels need, and not by 8."""
    content = with_row("levels: 3").replace("- 96x96x96", "- 20x20x20")
    suite = load(tmp_path, content + "exclude: [{variant: baseline, shape: 20x20x20}]\n")
    assert [case.shape for case in suite.cases()] == [(64, 64, 48), (20, 20, 20), (64, 64, 48)]


def test_include_adds_single_cases_after_the_matrix_and_after_exclude(tmp_path: Path) -> None:
    added = """\
exclude: [{variant: small}]
include:
  - {network: fcn, variant: small, shape: 96x96x96, block: sepconv, mode: infer, batch: 2}
  - {network: fcn, variant: half, shape: {shape: 9x9x9, pad: true}, precision: fp16, paper: "> 1.5"}
paper: {citation: c, unit: GiB}
"""
    *matrix, small, half = load(tmp_path, GOOD + added).cases()
    assert [case.variant for case in matrix] == ["baseline", "baseline"]
    assert small.name == "fcn/small/96x96x96/infer"
    assert (small.network_options, small.batch_size) == ({"block": "sepconv"}, 2)
    assert (half.requested_shape, half.shape, half.precision) == ((9, 9, 9), (16, 16, 16), "fp16")
    assert half.paper == PaperFigure(text="> 1.5 GiB", relation=">", bytes=1_610_612_736)


def test_a_suite_of_single_cases_needs_no_matrix(tmp_path: Path) -> None:
    content = "title: T\ninclude: [{network: fcn, variant: x, shape: 8x8x8}]\n"
    assert names(load(tmp_path, content)) == ["fcn/x/8x8x8/train"]


def test_figures_keep_what_is_printed_and_its_bytes(tmp_path: Path) -> None:
    """GB is 10^9 bytes; 20.0 keeps its zero; 4.1 is exact, as binary it would not be."""
    added = """\
paper:
  citation: Somebody et al.
  unit: GB
  figures:
    baseline: {96x96x96: 20.0, 64x64x45: "~ 4.1"}
    fcn/small: {96x96x96: "> 32"}
"""
    suite = load(tmp_path, GOOD + added)
    assert [case.paper for case in suite.cases()] == [
        PaperFigure(text="20.0 GB", relation="=", bytes=20_000_000_000),
        PaperFigure(text="~ 4.1 GB", relation="~", bytes=4_100_000_000),
        PaperFigure(text="> 32 GB", relation=">", bytes=32_000_000_000),
        None,
    ]
    assert (suite.citation, suite.unit) == ("Somebody et al.", "GB")


def test_figures_belong_to_the_papers_mode(tmp_path: Path) -> None:
    added = """\
  mode: [train, infer]
paper: {citation: c, unit: GB, mode: infer, figures: {small: {96x96x96: 2}}}
"""
    with_figure = [case for case in load(tmp_path, GOOD + added).cases() if case.paper]
    assert [case.name for case in with_figure] == ["fcn/small/96x96x96/infer"]


def test_a_paper_s_time_and_flops_stand_beside_its_memory_or_alone(tmp_path: Path) -> None:
    added = """\
include:
  - {network: fcn, variant: one, shape: 8x8x8, paper: {flops: 20339341715}}
paper:
  citation: c
  unit: GB
  note: Mind the unit.
  figures:
    baseline: {96x96x96: {memory: "~8", time_s: "< 105"}, 64x64x45: {time_s: 4.5}}
"""
    suite = load(tmp_path, GOOD + added)
    assert [(case.paper, case.paper_time, case.paper_flops) for case in suite.cases()] == [
        (
            PaperFigure(text="~8 GB", relation="~", bytes=8_000_000_000),
            PaperTime(text="< 105 s", relation="<", seconds=105.0),
            None,
        ),
        (None, PaperTime(text="4.5 s", relation="=", seconds=4.5), None),
        (None, None, None),
        (None, None, None),
        (None, None, 20_339_341_715),
    ]
    assert suite.paper_note == "Mind the unit."
    assert load(tmp_path, GOOD).paper_note == ""


def test_a_row_may_have_shapes_of_its_own(tmp_path: Path) -> None:
    """As a 2D network beside 3D ones has to; its mistakes are pointed at where they stand."""
    rows = GOOD.replace(
        "block: ccblock}", "block: ccblock, shapes: [8x8x8, {shape: 9x9x9, pad: true}]}"
    )
    assert names(load(tmp_path, rows)) == [
        *("fcn/baseline/96x96x96/train", "fcn/baseline/64x64x45/train"),
        *("fcn/small/8x8x8/train", "fcn/small/9x9x9/train"),
    ]
    with pytest.raises(
        SuiteError, match=r"line 6: matrix\.networks\[1\]\.shapes\[0\]: 4x8x8 cannot"
    ):
        load(tmp_path, rows.replace("8x8x8,", "4x8x8,"))


def test_a_row_with_shapes_of_its_own_takes_no_part_in_volumes(tmp_path: Path) -> None:
    rows = GOOD.replace("block: ccblock}", "block: ccblock, shapes: [8x8x8]}")
    volume(tmp_path / "v/head.nii.gz", (16, 16, 16))
    cases = load(tmp_path, rows).cases(volumes=tmp_path / "v")
    assert [case.name for case in cases] == ["fcn/baseline/16x16x16/train"]


def test_a_glob_matches_the_asked_and_the_padded_shape(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD)
    assert [c.variant for c in suite.cases(glob="*/64x64x45/train")] == ["baseline", "small"]
    assert suite.cases(glob="fcn/*/64x64x48/*") == suite.cases(glob="*x45/*")


def test_a_glob_that_matches_nothing_offers_near_names(tmp_path: Path) -> None:
    with pytest.raises(SuiteError) as error:
        load(tmp_path, GOOD).cases(glob="fcn/smal/96x96x96/train")
    assert str(error.value).startswith(
        "no case of suite s matches 'fcn/smal/96x96x96/train' "
        "(did you mean 'fcn/small/96x96x96/train'"
    )


def volume(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels, affine = np.zeros(shape, np.uint8), np.diag([2.0, 2.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]


def test_volumes_replace_the_shapes_and_equal_ones_are_one_case(tmp_path: Path) -> None:
    volume(tmp_path / "v/a.nii", (40, 30, 9))
    volume(tmp_path / "v/b.nii.gz", (20, 30, 9))
    volume(tmp_path / "v/c/a.nii", (40, 30, 9))
    added = """\
volumes: {crop: 32x32}
exclude: [{variant: small, shape: 96*}]
include: [{network: fcn, variant: x, shape: 8x8x8}]
paper: {citation: c, unit: GB, figures: {baseline: {96x96x96: 1}}}
"""
    cases = load(tmp_path, GOOD + added).cases(volumes=tmp_path / "v")
    assert [(c.name, c.shape, c.volumes, c.paper) for c in cases] == [
        ("fcn/baseline/40x30x9/train", (32, 32, 16), ("a.nii", "c/a.nii"), None),
        ("fcn/baseline/20x30x9/train", (24, 32, 16), ("b.nii.gz",), None),
        ("fcn/small/40x30x9/train", (32, 32, 16), ("a.nii", "c/a.nii"), None),
        ("fcn/small/20x30x9/train", (24, 32, 16), ("b.nii.gz",), None),
    ]


def test_volumes_are_resampled_before_they_are_compared(tmp_path: Path) -> None:
    """2 mm to 1 mm doubles x and y; 41 and 40 slices of 4 mm to 8 mm: 20.5 to even, and 20."""
    volume(tmp_path / "v/a.nii", (10, 12, 41))
    volume(tmp_path / "v/b.nii", (10, 12, 40))
    cases = load(tmp_path, GOOD).cases(volumes=tmp_path / "v", spacing="1,1,8", glob="*/small/*")
    assert [(c.requested_shape, c.shape, c.volumes) for c in cases] == [
        ((20, 24, 20), (24, 24, 24), ("a.nii", "b.nii"))
    ]


def test_spacing_without_volumes_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MembenchError) as error:
        load(tmp_path, GOOD).cases(spacing="1,1,1")
    assert str(error.value) == "--spacing resamples volumes: give it together with --volumes"


def test_volumes_need_a_matrix_and_cases_left_in_it(tmp_path: Path) -> None:
    volume(tmp_path / "v/a.nii", (10, 12, 45))
    single = "title: T\ninclude: [{network: fcn, variant: x, shape: 8x8x8}]\n"
    with pytest.raises(SuiteError) as error:
        load(tmp_path, single).cases(volumes=tmp_path / "v")
    assert str(error.value) == "suite s has no matrix to run at the shapes of volumes"
    every = GOOD + "exclude: [{shape: '*x45'}]\n"
    with pytest.raises(SuiteError) as error:
        load(tmp_path, every).cases(volumes=tmp_path / "v")
    assert str(error.value) == f"suite s excludes every case at the shapes of {tmp_path / 'v'}"


def test_shipped_suites_lie_beside_the_package_in_a_source_tree() -> None:
    assert shipped_suites()["table1"] == SUITES / "table1.yaml"
    assert load_suite("table1").digest == load_suite(str(SUITES / "table1.yaml")).digest


def test_shipped_suites_lie_inside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench/suites").mkdir(parents=True)
    (tmp_path / "bench/suites/mine.yaml").write_text(GOOD)
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites/other.yaml").write_text(GOOD)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench/__init__.py"))
    assert shipped_suites() == {"mine": tmp_path / "bench/suites/mine.yaml"}
    assert load_suite("mine").name == "mine"


def test_a_file_goes_before_a_shipped_suite_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table1").write_text(GOOD)
    assert load_suite("table1").title == "Two rows"


def test_every_shipped_suite_and_the_readmes_example_load(tmp_path: Path) -> None:
    for path in shipped_suites().values():
        assert load_suite(str(path)).cases()
    example = (SUITES / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    suite = load(tmp_path, example)
    assert len(suite.cases()) == 3 * 2 * 2 - 2 + 1
    assert suite.baseline == "plain"


def test_asking_which_suites_there_are_needs_neither_torch_nor_volumes_code() -> None:
    code = (
        "import sys, bench.suite as s; s.shipped_suites(); s.suite_json_schema(); "
        "print([m for m in ('torch', 'nibabel', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_two_networks_may_share_a_variant_if_figures_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "twin", NETWORKS["fcn"])
    two = GOOD.replace(
        "{name: fcn, variant: small, block: ccblock}", "{name: twin, variant: baseline}"
    )
    paper = "paper: {citation: c, unit: GB, figures: {FIGURES}}\n"
    with pytest.raises(SuiteError) as error:
        load(tmp_path, two + paper.replace("FIGURES", "baseline: {96x96x96: 1}"))
    assert str(error.value).endswith(
        ", line 10: paper.figures.baseline: which network's figure is it? "
        "write 'fcn/baseline' or 'twin/baseline'"
    )
    suite = load(tmp_path, two + paper.replace("FIGURES", "twin/baseline: {96x96x96: 1}"))
    assert [c.name for c in suite.cases() if c.paper] == ["twin/baseline/96x96x96/train"]
    fewer = load(tmp_path, two + "exclude: [{network: 'tw*', shape: 96x96x96}]\n")
    assert [c.network for c in fewer.cases()] == ["fcn", "fcn", "twin"]


def test_a_network_for_slices_takes_two_sides_and_no_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = dataclasses.replace(NETWORKS["fcn"], spatial_dims=2, divisor=lambda _options: (8, 4))
    monkeypatch.setitem(NETWORKS, "flat", flat)
    content = "title: T\nmatrix: {networks: [{name: flat, variant: x}], shapes: [SHAPE]}\n"
    suite = load(tmp_path, content.replace("SHAPE", "{shape: 300x90, crop: 256x256, pad: true}"))
    assert [c.shape for c in suite.cases()] == [(256, 92)]
    volume(tmp_path / "v/a.nii", (10, 12, 45))
    with pytest.raises(SuiteError) as error:
        suite.cases(volumes=tmp_path / "v")
    assert str(error.value) == (
        f"suite s cannot run at the shapes of {tmp_path / 'v'}: 10x12x45 has 3 sides, flat takes 2"
    )
