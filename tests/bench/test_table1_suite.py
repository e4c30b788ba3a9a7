"""suites/table1.yaml against the paper's Table 1, figure by figure."""

from __future__ import annotations

import pytest

from bench.case import Case, TechniqueUse
from bench.suite import load_suite
from memsave.networks import build

PATCH, LARGE, FULL = "96x96x96", "256x256x152", "256x256x234"
SHAPES = (PATCH, LARGE, "256x256x45", "256x256x128", FULL)

# Table 1 as printed, in GB: 96x96x96, 256x256x152, 256x256xfull
PRINTED = {
    "baseline": ("3.7", "28.4", "> 32"),
    "bottleneck": ("3.1", "28.3", "> 32"),
    "sepconv": ("3.2", "30.1", "> 32"),
    "ccblock": ("3.0", "27.2", "> 32"),
    "ccblock+inplace_abn": ("2.3", "20.0", "~30.2"),
    "ccblock+inplace_abn+mp": ("1.6", "11.7", "~17.6"),
}
OURS = "ccblock+inplace_abn+mp+checkpoint"
POCKET = ("pocket", "ccblock+inplace_abn+mp+pocket")  # beside the paper, without its figures


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in load_suite("table1").cases()}


def test_its_cases_are_the_papers_rows_and_three_of_ours_at_five_shapes(
    cases: dict[str, Case],
) -> None:
    assert list(cases) == [
        f"fcn/{variant}/{shape}/train" for variant in (*PRINTED, OURS, *POCKET) for shape in SHAPES
    ]


def test_its_figures_are_the_papers_as_printed(cases: dict[str, Case]) -> None:
    figures = {name: case.paper.text for name, case in cases.items() if case.paper}
    assert figures == {
        f"fcn/{variant}/{shape}/train": f"{text} GB"
        for variant, texts in PRINTED.items()
        for shape, text in zip((PATCH, LARGE, FULL), texts, strict=True)
    }
    assert len(figures) == 18


def test_its_figures_are_in_bytes_of_ten_to_the_nine(cases: dict[str, Case]) -> None:
    paper = cases[f"fcn/baseline/{LARGE}/train"].paper
    assert paper is not None
    assert (paper.relation, paper.bytes) == ("=", 28_400_000_000)
    paper = cases[f"fcn/ccblock+inplace_abn/{FULL}/train"].paper
    assert paper is not None
    assert (paper.relation, paper.bytes) == ("~", 30_200_000_000)


def test_its_full_volumes_are_padded_to_what_the_network_pools(cases: dict[str, Case]) -> None:
    shapes = [case.shape for case in cases.values() if case.variant == "baseline"]
    assert shapes == [
        *((96, 96, 96), (256, 256, 152)),
        *((256, 256, 48), (256, 256, 128), (256, 256, 240)),
    ]


def test_its_rows_differ_as_the_papers_do(cases: dict[str, Case]) -> None:
    rows = {c.variant: (c.network_options, c.precision, c.techniques) for c in cases.values()}
    in_place = {"block": "ccblock", "norm": "inplace_abn"}
    assert rows == {
        "baseline": ({}, "fp32", ()),
        "bottleneck": ({"block": "bottleneck"}, "fp32", ()),
        "sepconv": ({"block": "sepconv"}, "fp32", ()),
        "ccblock": ({"block": "ccblock"}, "fp32", ()),
        "ccblock+inplace_abn": (in_place, "fp32", ()),
        "ccblock+inplace_abn+mp": (in_place, "fp16", ()),
        OURS: (in_place, "fp16", (TechniqueUse(name="checkpoint"),)),
        "pocket": ({"widths": "pocket"}, "fp32", ()),
        "ccblock+inplace_abn+mp+pocket": ({**in_place, "widths": "pocket"}, "fp16", ()),
    }


def test_pocket_widths_have_the_parameters_of_64_channels_on_every_level(
    cases: dict[str, Case],
) -> None:
    """The baseline by hand: every block goes through half its 64 channels, from 1 in the first;
    two norms of two a channel; a decoder has a biased 1x1x1 before it; the head gives 3 classes."""

    def block(channels: int) -> int:
        return 27 * (channels * 32 + 32 * 64) + 2 * (32 + 64)

    encoder = block(1) + 3 * block(64)
    decoder = 3 * (64 * 64 + 64 + block(64))
    expected = encoder + decoder + 64 * 3 + 3
    assert expected == 733_731
    counted = {
        variant: sum(
            p.numel()
            for p in build(
                "fcn", cases[f"fcn/{variant}/{PATCH}/train"].network_options
            ).parameters()
        )
        for variant in POCKET
    }
    assert counted == {POCKET[0]: expected, POCKET[1]: 354_579}


def test_its_training_is_the_papers(cases: dict[str, Case]) -> None:
    assert {
        (c.loss, c.optimizer, c.optimizer_options["lr"], c.batch_size, c.mode, c.cudnn_benchmark)
        for c in cases.values()
    } == {("cross_entropy+dice", "adam", 4e-4, 1, "train", False)}


def test_it_is_meant_for_the_papers_card() -> None:
    suite = load_suite("table1")
    assert (suite.name, suite.card, suite.baseline, suite.unit) == (
        *("table1", "v100-32gb", "baseline", "GB"),
    )
    assert suite.citation is not None
    assert "Table 1" in suite.citation
