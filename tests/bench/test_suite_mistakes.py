"""Each mistake in a suite file: one line that names the file, the line and the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import SuiteError
from bench.suite import load_suite
from tests.bench.suite_files import GOOD, load, refusal, with_row, with_shape


def test_the_suite_that_the_mistakes_are_put_into_is_good(tmp_path: Path) -> None:
    assert len(load(tmp_path, GOOD).cases()) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Two rows\n", "", "line 1: 'title' is missing"),
        ("title: Two rows", "titel: x", "line 1: 'title' is missing (and 1 more)"),
        ("title: Two rows", "title: 5", "line 1: title: should be text, got 5"),
        ("title: Two rows", "title: ''", "line 1: title: should not be empty"),
        ("card: v", "crad: v", "line 2: crad: unknown key (did you mean 'card'?)"),
        (
            "card: v100-32gb",
            "time_limit_s: 0",
            "line 2: time_limit_s: should be greater than 0, got 0",
        ),
        (
            "card: v100-32gb",
            "time_limit_s: .inf",
            "line 2: time_limit_s: should be a valid number, got '.inf'",
        ),
        (
            "card: v100-32gb",
            "cudnn_benchmark: no",
            "line 2: cudnn_benchmark: should be a valid boolean, got 'no'",
        ),
        (
            "card: v100-32gb",
            "baseline: baselin",
            "line 2: baseline: no case has variant 'baselin' (did you mean 'baseline'?)",
        ),
        (
            "card: v100-32gb",
            "volumes: {crop: 256}",
            "line 2: volumes.crop: should be text, got 256",
        ),
        (
            "card: v100-32gb",
            "volumes: {crop: 256x0}",
            "line 2: volumes.crop: side 0 of '256x0' is not positive",
        ),
        (
            "matrix:",
            "matrix: 5\nx:",
            "line 3: matrix: should be a mapping (key: value), got 5 (and 1 more)",
        ),
        ("  shapes:", "  shaps:", "line 3: matrix: 'shapes' is missing (and 1 more)"),
        ("variant: small, ", "", "line 6: matrix.networks[1]: 'variant' is missing"),
        (
            "variant: small",
            "variant: a/b",
            (
                "line 6: matrix.networks[1].variant: a variant has letters, digits and . _ + - "
                "only, got 'a/b'"
            ),
        ),
        (
            "variant: small",
            "variant: 16",
            "line 6: matrix.networks[1].variant: should be text, got 16",
        ),
        (
            "name: fcn, variant: small",
            "name: fnc, variant: small",
            "line 6: matrix.networks[1].name: unknown network 'fnc' (did you mean 'fcn'?)",
        ),
        (
            "variant: small",
            "variant: baseline",
            (
                "line 6: matrix.networks[1]: case fcn/baseline/96x96x96/train is made here and "
                "already by matrix.networks[0] (line 5)"
            ),
        ),
        (
            "{shape: 64x64x45, pad: true}",
            "{shape: 96x96x96, pad: true}",
            (
                "line 9: matrix.shapes[1]: case fcn/baseline/96x96x96/train is made here and "
                "already by matrix.shapes[0] (line 8)"
            ),
        ),
    ],
)
def test_a_wrong_key_or_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refusal(tmp_path, GOOD.replace(old, new)) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("block: ccblok", ".block: unknown block 'ccblok' (did you mean 'ccblock'?)"),
        ("blok: ccblock", ".blok: unknown key, no option of fcn (did you mean 'block'?)"),
        (
            "presicion: fp16",
            ".presicion: unknown key, no option of fcn (did you mean 'precision'?)",
        ),
        ("precision: fp61", ".precision: 'fp61' is not 'fp32', 'fp16' or 'bf16'"),
        ("mode: tarin", ".mode: 'tarin' is not 'train' or 'infer'"),
        ("batch: 0", ".batch: should be greater than 0, got 0"),
        ("norm: grop", ".norm: unknown norm 'grop' ("),
        ("levels: 0", ".levels: levels must be an integer of 1 or more, got 0"),
        ("widths: [8, x]", ".widths: each of widths must be an integer of 1 or more, got 'x'"),
        ("time_limit_s: -1", ".time_limit_s: should be greater than 0, got -1"),
        ("techniques: checkpoint", ".techniques: should be a list ([a, b]), got 'checkpoint'"),
        ("techniques: [5]", ".techniques[0]: should be a mapping (key: value), got 5"),
        ("techniques: [{every: 2}]", ".techniques[0]: 'name' is missing"),
        (
            "techniques: [checkpont]",
            ".techniques[0]: unknown technique 'checkpont' (did you mean 'checkpoint'",
        ),
        (
            "techniques: [inplace_abn, {name: checkpont}]",
            ".techniques[1].name: unknown technique 'checkpont' (did you mean 'checkpoint'",
        ),
        (
            "techniques: [{name: checkpoint, evry: 2}]",
            (
                ".techniques[0].evry: unknown option of technique 'checkpoint' 'evry' "
                "(did you mean 'every'?)"
            ),
        ),
        (
            "techniques: [{name: checkpoint, every: 0}]",
            ".techniques[0].every: every must be 1 or more, got 0",
        ),
        (
            "techniques: [{name: checkpoint, blocks: [encoder.9]}]",
            (
                ".techniques[0].blocks: unknown checkpointable block 'encoder.9' "
                "(did you mean 'encoder.3' or 'encoder.2' or 'encoder.1'?)"
            ),
        ),
        (
            "training: {loss: dise}",
            ".training.loss: unknown loss 'dise' (did you mean 'dice'",
        ),
    ],
)
def test_a_wrong_option_of_a_row(tmp_path: Path, options: str, message: str) -> None:
    """Where names are offered, the nearest comes first; how many there are is not ours to say."""
    told = refusal(tmp_path, with_row(options))
    assert told.startswith(f"line 6: matrix.networks[1]{message}")
    assert message.endswith(("'", "(")) or told.endswith(message)


def test_a_misspelt_card_is_told_with_near_names(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD.replace("v100-32gb", "v100-33gb")).startswith(
        "line 2: card: no card is called 'v100-33gb' (did you mean 'v100-32gb'"
    )


def test_a_network_that_torch_cannot_make_is_told_at_its_row(tmp_path: Path) -> None:
    assert refusal(tmp_path, with_row("levels: 100")).startswith(
        "line 6: matrix.networks[1]: cannot be built so: "
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("0x96x96", ": side 0 of '0x96x96' is not positive"),
        ("-96x96x96", ": side -96 of '-96x96x96' is not positive"),
        ("axbxc", ": side 'a' of 'axbxc' is not a whole number; write 256x256 or 256x256x256"),
        ("96x96x96x96", ": '96x96x96x96' has 4 side(s), not 2 or 3; write 256x256 or 256x256x256"),
        ("96x96", ": 96x96 has 2 sides, fcn takes 3"),
        ("96", ": a shape is 96x96x96 or {shape: 96x96x90, pad: true}, got 96"),
        ("[8, 8, 8]", ": a shape is 96x96x96 or {shape: 96x96x90, pad: true}, got [8, 8, 8]"),
        (
            "100x96x5",
            (
                ": 100x96x5 cannot be pooled by fcn, whose sides are multiples of 8: "
                "x 100 (use 96 or 104), slices 5 (use 8); or give the shape pad: true"
            ),
        ),
        (
            "{shape: 300x300x96, crop: 250x256}",
            (
                ": 250x256x96 cannot be pooled by fcn, whose sides are multiples of 8: "
                "x 250 (use 248 or 256); or give the shape pad: true"
            ),
        ),
        ("{shape: 96x96x96, pda: true}", ".pda: unknown key (did you mean 'pad'?)"),
        ("{shape: 96x96x96, pad: 1}", ".pad: should be a valid boolean, got 1"),
        ("{shape: 96x96x96, crop: 1x2x3}", ".crop: '1x2x3' has 3 side(s), not 2; write 256x256"),
        ("{pad: true}", ": 'shape' is missing"),
    ],
)
def test_a_wrong_shape(tmp_path: Path, shape: str, message: str) -> None:
    assert refusal(tmp_path, with_shape(shape)) == f"line 8: matrix.shapes[0]{message}"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("  batch: 2", "line 10: matrix.batch: should be a list ([a, b]), got 2"),
        ("  batch: []", "line 10: matrix.batch: should not be empty"),
        ("  batch: ['1']", "line 10: matrix.batch[0]: should be a valid integer, got '1'"),
        ("  batch: [true]", "line 10: matrix.batch[0]: should be a valid integer, got True"),
        ("  batch: [1, 1]", "line 10: matrix.batch: a value stands here twice: [1, 1]"),
        (
            "  precision: [fp8]",
            "line 10: matrix.precision[0]: 'fp8' is not 'fp32', 'fp16' or 'bf16'",
        ),
        ("training: 3", "line 10: training: should be a mapping (key: value), got 3"),
        (
            "training: {optimizer: adm}",
            (
                "line 10: training.optimizer: unknown optimizer 'adm' "
                "(did you mean 'adam' or 'adamw'?)"
            ),
        ),
        (
            "training:\n  optimizer: {name: adam, rl: 1}",
            "line 11: training.optimizer.rl: unknown key, no option of adam (did you mean 'lr'?)",
        ),
        (
            "training: {optimizer: {name: adam, lr: fast}}",
            "line 10: training.optimizer.lr: 'fast' will not do; the usual value is 0.001",
        ),
        (
            "training: {optimizer: {name: adam, lr: -1}}",
            "line 10: training.optimizer.lr: -1 will not do; the usual value is 0.001",
        ),
        (
            "training: {optimizer: {name: adam, betas: [0.9]}}",
            "line 10: training.optimizer.betas: [0.9] will not do; the usual value is (0.9, 0.999)",
        ),
        (
            "training: {optimizer: {name: adam, fused: 1}}",
            "line 10: training.optimizer.fused: 1 will not do; the usual value is None",
        ),
        ("exclude:\n  - {variant: smal}", "line 11: exclude[0]: leaves out no case of the matrix"),
        (
            "exclude:\n  - {}",
            "line 11: exclude[0]: say what to leave out: network, variant, shape, mode, ...",
        ),
        ("exclude:\n  - {variant: '*'}", "line 10: exclude: leaves out every case of the suite"),
        (
            "exclude:\n  - {varient: small}",
            "line 11: exclude[0].varient: unknown key (did you mean 'variant'?)",
        ),
        (
            "include:\n  - {network: fcn, variant: small, shape: 96x96x96}",
            (
                "line 11: include[0]: case fcn/small/96x96x96/train is made here and already by "
                "matrix.networks[1] (line 6)"
            ),
        ),
        (
            "include:\n  - network: fnc\n    variant: x\n    shape: 8x8x8",
            "line 11: include[0].network: unknown network 'fnc' (did you mean 'fcn'?)",
        ),
        (
            "include:\n  - network: fcn\n    variant: x\n    shape: 9x8x8",
            (
                "line 13: include[0].shape: 9x8x8 cannot be pooled by fcn, whose sides are "
                "multiples of 8: x 9 (use 8 or 16); or give the shape pad: true"
            ),
        ),
        (
            "include:\n  - {network: fcn, variant: x, shape: 8x8x8, paper: 3.7}",
            "line 11: include[0].paper: a figure needs the suite's paper: citation and unit",
        ),
    ],
)
def test_a_wrong_part_beside_the_rows(tmp_path: Path, added: str, message: str) -> None:
    assert refusal(tmp_path, GOOD + added) == message


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (
            "basline: {96x96x96: 3}",
            "basline: no case of mode train has variant 'basline' (did you mean 'baseline'?)",
        ),
        (
            "baseline: {96x96x95: 3}",
            (
                "baseline.96x96x95: no case of 'baseline' has this shape "
                "(did you mean '96x96x96' or '64x64x45'?)"
            ),
        ),
        (
            "baseline: {64x64x48: 3}",
            (
                "baseline.64x64x48: no case of 'baseline' has this shape "
                "(did you mean '64x64x45' or '96x96x96'?)"
            ),
        ),
        (
            "baseline: {96x96x96: '< 3'}",
            "baseline.96x96x96: a paper's figure is 3.7, '> 32' or '~30.2', got '< 3'",
        ),
        (
            "baseline: {96x96x96: '~0.0'}",
            "baseline.96x96x96: a paper's figure is 3.7, '> 32' or '~30.2', got '~0.0'",
        ),
        (
            "baseline: {96x96x96: true}",
            "baseline.96x96x96: a paper's figure is 3.7, '> 32' or '~30.2', got True",
        ),
        (
            "baseline: {96x96x96: {time_s: fast}}",
            "baseline.96x96x96.time_s: a paper's time is 12, '< 105', '> 60' or '~30', got 'fast'",
        ),
        (
            "baseline: {96x96x96: {}}",
            "baseline.96x96x96: say what the paper prints: memory, time_s or flops",
        ),
        ("baseline: 3", "baseline: should be a mapping (key: value), got 3"),
    ],
)
def test_a_figure_that_fits_no_case(tmp_path: Path, figures: str, message: str) -> None:
    paper = f"paper:\n  citation: c\n  unit: GB\n  figures:\n    {figures}\n"
    assert refusal(tmp_path, GOOD + paper) == f"line 14: paper.figures.{message}"


def test_a_figure_of_a_case_that_was_excluded_fits_no_case(tmp_path: Path) -> None:
    added = """\
exclude: [{variant: small, shape: 96x96x96}]
paper:
  citation: c
  unit: GB
  figures:
    small: {96x96x96: 3}
"""
    assert refusal(tmp_path, GOOD + added) == (
        "line 15: paper.figures.small.96x96x96: no case of 'small' has this shape "
        "(did you mean '64x64x45'?)"
    )


def test_a_unit_is_one_that_has_one_meaning(tmp_path: Path) -> None:
    added = "paper: {citation: c, unit: MB, figures: {}}"
    assert refusal(tmp_path, GOOD + added) == "line 10: paper.unit: 'MB' is not 'GB' or 'GiB'"


def test_of_several_mistakes_the_first_by_line_is_told_and_the_others_counted(
    tmp_path: Path,
) -> None:
    content = (
        with_shape("0x1x1").replace("precision: fp32", "").replace("card: v100-32gb", "crad: x")
    )
    assert refusal(tmp_path, content + "trainign: {}\n") == (
        "line 2: crad: unknown key (did you mean 'card'?) (and 2 more)"
    )


def test_names_are_told_by_line_whatever_checks_them(tmp_path: Path) -> None:
    content = with_row("block: ccblok").replace("v100-32gb", "v100") + "training: {loss: x}\n"
    assert refusal(tmp_path, content).startswith("line 2: card: ")
    assert refusal(tmp_path, content).endswith(" (and 2 more)")


def test_one_wrong_shape_under_many_rows_is_one_mistake(tmp_path: Path) -> None:
    assert "more" not in refusal(tmp_path, with_shape("9x8x8"))


def test_a_suite_without_cases_is_told(tmp_path: Path) -> None:
    assert refusal(tmp_path, "title: T\n") == (
        "line 1: the suite has no cases: give a matrix, or include single cases"
    )


def test_a_matrix_beyond_any_table_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """2 rows x 2 shapes x 2501 batch sizes."""
    content = GOOD + f"  batch: {list(range(1, 2502))}\n"
    assert refusal(tmp_path, content) == "line 3: matrix: 10004 cases are over the limit of 10000"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabel1", "no suite file or shipped suite is called 'tabel1' (did you mean 'table1'?)"),
        (
            "suites/tabel1.yaml",
            (
                "no suite file or shipped suite is called 'suites/tabel1.yaml' "
                "(did you mean 'table1'?)"
            ),
        ),
        (".", "cannot read suite .: Is a directory"),
    ],
)
def test_a_suite_that_is_not_there_is_told_with_near_names(name: str, message: str) -> None:
    with pytest.raises(SuiteError) as error:
        load_suite(name)
    assert str(error.value) == message


def test_a_suite_that_no_file_system_can_name_is_told() -> None:
    with pytest.raises(SuiteError) as error:
        load_suite("a" * 300)
    assert "\n" not in str(error.value)


def test_a_loss_that_does_not_fit_what_a_network_is_trained_towards(tmp_path: Path) -> None:
    told = refusal(tmp_path, with_row("training: {loss: binary_cross_entropy}"))
    assert told.startswith(
        "line 6: matrix.networks[1].training.loss: loss 'binary_cross_entropy' takes mask"
    )
