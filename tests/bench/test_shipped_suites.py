"""The suites of the other papers: what they ask for, and that it runs."""

from __future__ import annotations

import pytest

from bench.case import PaperTime
from bench.predict.cards import find_card
from bench.suite import load_suite, shipped_suites
from memsave.networks import NETWORKS
from memsave.techniques import TECHNIQUES

SUITES = sorted(shipped_suites())


def test_every_paper_has_its_suite() -> None:
    papers = {"table1", "cclstm", "flare21", "pocketnet_2d", "pocketnet_3d"}
    assert papers | {"scaling"} <= set(SUITES)


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


@pytest.mark.parametrize("slices", [302, 320, 400])
def test_the_volumes_of_the_c_lstm_paper_are_trained_plain_and_with_states_every_k_slices(
    slices: int,
) -> None:
    cases = load_suite("cclstm").cases(glob=f"*/512x512x{slices}/train")
    every = [[use.options["every"] for use in case.techniques] for case in cases]
    assert every == [[], [1], [2], [4], [8]]
    assert {case.optimizer for case in cases} == {"rmsprop"}
    assert {case.loss for case in cases} == {"binary_cross_entropy"}


def test_the_c_lstm_paper_s_figures_stand_beside_a_training_step_and_a_prediction() -> None:
    printed = {
        case.name: (case.paper and case.paper.text, case.paper_time)
        for case in load_suite("cclstm").cases()
        if case.paper or case.paper_time
    }
    under_105 = PaperTime(text="< 105 s", relation="<", seconds=105.0)
    under_45 = PaperTime(text="< 45 s", relation="<", seconds=45.0)
    assert printed == {
        "conv_lstm/checkpoint_4/512x512x320/train": ("~8 GB", under_105),
        "conv_lstm/plain/512x512x320/infer": (None, under_45),
    }
    assert "12 GB" in load_suite("cclstm").paper_note


def test_a_whole_volume_is_predicted_at_each_size_of_the_c_lstm_paper() -> None:
    cases = load_suite("cclstm").cases(glob="*/infer")
    assert sorted(case.shape for case in cases) == [(512, 512, n) for n in (302, 320, 400)]


def test_flare21_predicts_both_stages_at_their_fixed_shapes() -> None:
    shapes = {case.network: case.shape for case in load_suite("flare21").cases(glob="*/infer")}
    assert shapes == {"light_unet": (96, 96, 96), "dense_vnet": (96, 128, 192)}


def test_flare21_has_the_paper_s_memory_time_and_flops_beside_stage_two() -> None:
    (case,) = load_suite("flare21").cases(glob="dense_vnet/*/infer")
    assert case.paper is not None
    assert case.paper.text == "~2 GB"
    assert case.paper_time == PaperTime(text="~30 s", relation="~", seconds=30.0)
    assert case.paper_flops == 20_339_341_715
    assert "47,952,691,200" in load_suite("flare21").paper_note


def test_scaling_has_every_network_from_48_voxels_a_side_to_a_full_ct() -> None:
    cases = load_suite("scaling").cases()
    assert {case.network for case in cases} == set(NETWORKS)
    for network, spec in NETWORKS.items():
        sides = sorted(case.shape for case in cases if case.network == network)
        if network == "conv_lstm":  # grows by slices
            assert sides[0] == (512, 512, 8)
        else:
            assert sides[0] == (48,) * spec.spatial_dims
        assert sides[-1] == ((512, 512, 320) if spec.spatial_dims == 3 else (1024, 1024))


def test_scaling_has_each_network_plain_and_with_every_technique_that_is_exact_and_fits() -> None:
    """A PocketNet has no norm to recompute; states every k steps are for the recurrent one."""
    cases = load_suite("scaling").cases()
    exact = {name for name, technique in TECHNIQUES.items() if technique.exact}
    for network in NETWORKS:
        of_network = [case for case in cases if case.network == network]
        assert any(not case.techniques for case in of_network)
        used = {use.name for case in of_network for use in case.techniques}
        assert used <= exact
        assert "checkpoint" in used
        assert ("recomputed_norm_act" in used) == (not network.startswith("pocketnet"))
        assert ("checkpoint_steps" in used) == (network == "conv_lstm")


def test_scaling_has_all_twelve_pocketnets() -> None:
    cases = load_suite("scaling").cases()
    kinds = {
        (case.network, case.network_options["block"], case.network_options["widths"])
        for case in cases
        if case.network.startswith("pocketnet")
    }
    assert len(kinds) == 12
