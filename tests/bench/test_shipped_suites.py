"""The suites of the other papers: what they ask for, and that it runs."""

from __future__ import annotations

import pytest

from bench.predict.cards import find_card
from bench.suite import load_suite, shipped_suites

SUITES = sorted(shipped_suites())


def test_every_paper_has_its_suite() -> None:
    assert {"table1", "cclstm", "flare21", "pocketnet_2d", "pocketnet_3d"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_shipped_suite_loads_and_names_a_card_that_is_there(name: str) -> None:
    suite = load_suite(name)
    names = [case.name for case in suite.cases()]
    assert len(names) == len(set(names)) > 0
    assert suite.card is not None
    assert find_card(suite.card).name == suite.card


@pytest.mark.parametrize("name", ["pocketnet_2d", "pocketnet_3d"])
def test_pocketnets_twelve_cases_compare_full_and_pocket_widths(name: str) -> None:
    cases = load_suite(name).cases()
    blocks = ("unet", "resnet", "densenet")
    expected = {f"{block}{width}" for block in blocks for width in ("", "+pocket")}
    assert {case.variant for case in cases} == expected
    assert len(cases) == 2 * len(expected)  # train and infer
    assert {case.loss for case in cases} == {"l2_dice"}
    assert {case.batch_size for case in cases} == ({16} if name == "pocketnet_2d" else {4})


def test_the_volume_of_the_c_lstm_paper_is_trained_with_states_every_k_slices() -> None:
    cases = load_suite("cclstm").cases(glob="*/512x512x320/train")
    every = [use.options["every"] for case in cases for use in case.techniques]
    assert sorted(every) == [1, 2, 4, 8]
    assert {case.optimizer for case in cases} == {"rmsprop"}
    assert {case.loss for case in cases} == {"binary_cross_entropy"}


def test_flare21_predicts_both_stages_at_their_fixed_shapes() -> None:
    shapes = {case.network: case.shape for case in load_suite("flare21").cases(glob="*/infer")}
    assert shapes == {"light_unet": (96, 96, 96), "dense_vnet": (96, 128, 192)}
