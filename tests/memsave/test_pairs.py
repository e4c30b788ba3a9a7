"""Every pair of techniques is tested together or refused with a reason, in both orders."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from bench.errors import MembenchError
from memsave.errors import OptionError
from memsave.technique_pairs import CONFLICTS, check_pairs
from memsave.techniques import TECHNIQUES, find_technique, parse_options
from tests.memsave.pairs import (
    COMPRESSED,
    IN_PLACE,
    NOTES,
    OPTIONS,
    ROUNDING,
    Refused,
    Step,
    Together,
    all_pairs,
    decision,
    run,
)
from tests.memsave.pairs_table import PATH, table


def _run(names: tuple[str, ...], pair: tuple[str, ...]) -> Step:
    """Run ``names`` on the network of ``pair``, which is trained with both, one or neither."""
    recurrent = "checkpoint_steps" in pair
    plain = "batch_norm" if recurrent else "batch_norm_leaky_relu"
    norms = [IN_PLACE[name] for name in pair if name in IN_PLACE]
    return run(names, recurrent=recurrent, norm=norms[0] if norms and not recurrent else plain)


def _assert_equal(actual: Step, expected: Step) -> None:
    tensors = [(*step.gradients, step.buffers) for step in (actual, expected)]
    for ours, theirs in zip(*tensors, strict=True):
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))


def test_every_technique_has_been_decided_upon() -> None:
    """A new one needs options with which it acts on a small network, or a reason to be refused."""
    assert list(OPTIONS) == list(TECHNIQUES)


def test_the_tables_name_techniques_that_there_are() -> None:
    for pair in (*CONFLICTS, *NOTES):
        assert len(pair) == 2
        assert pair <= set(TECHNIQUES)
        assert pair in map(frozenset, all_pairs())


def test_the_committed_table_is_what_the_tests_say() -> None:
    """Otherwise: ``python -m tests.memsave.pairs_table``."""
    assert PATH.read_text() == table()


@pytest.mark.parametrize(("first", "second"), all_pairs())
def test_a_pair_keeps_its_gradients_or_is_refused(first: str, second: str) -> None:
    decided = decision(first, second)
    for names in ((first, second), (second, first)):
        if isinstance(decided, Refused):
            with pytest.raises((MembenchError, OptionError), match=re.escape(decided.message)):
                _run(names, names)
        else:
            _assert_as_decided(names, decided)


def _assert_as_decided(names: tuple[str, str], decided: Together) -> None:
    actual, expected = _run(names, names), _run(decided.reference, names)
    assert actual.acted == set(names)
    if decided.band == 0:
        _assert_equal(actual, expected)
    elif decided.band == COMPRESSED:
        # Steps after the first have other weights already; not 0, or nothing was compressed.
        assert 0 < actual.distance(expected, step=0) <= decided.band
    else:
        assert max(actual.distance(expected, step) for step in (0, 1)) <= decided.band


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_only_bf16_is_left_to_in_place_norms(name: str, format: str) -> None:
    """What the table notes of these pairs."""
    technique = find_technique("compress_activations")
    options = parse_options(technique, {"format": format})
    with pytest.raises(OptionError, match="is an in-place norm, which inverts what is kept"):
        technique.module(memsave.FCN(widths=(4, 8), norm=name), options)


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_in_place_norm_alone_has_the_plain_norm_s_gradients(name: str) -> None:
    """What pairs with one are held to: without it, an error of both would go unseen."""
    plain = run((), recurrent=False, norm=IN_PLACE[name], eps=True)
    actual = run((name,), recurrent=False, norm=IN_PLACE[name])
    assert max(actual.distance(plain, step) for step in (0, 1)) <= ROUNDING


def test_compression_alone_is_within_its_band() -> None:
    actual, plain = (
        _run(names, ("compress_activations",)) for names in (("compress_activations",), ())
    )
    assert 0 < actual.distance(plain, step=0) <= COMPRESSED


def _chosen(*uses: tuple[str, dict[str, Any]]) -> list[Any]:
    techniques = [(find_technique(name), options) for name, options in uses]
    return [(technique, parse_options(technique, options)) for technique, options in techniques]


def test_blocks_may_be_recomputed_whole_and_others_in_part() -> None:
    chosen = _chosen(
        ("checkpoint", {"blocks": ["encoder.1"]}),
        ("checkpoint_selective", {"blocks": ["encoder.10", "decoder.1"]}),
    )
    check_pairs(chosen)
    check_pairs(chosen[::-1])


@pytest.mark.parametrize(
    ("whole", "in_part"),
    [({"blocks": ["a.b"]}, {"blocks": ["c", "a.b"]}), ({"blocks": ["a.b"]}, {"blocks": ["a"]}),
     ({"blocks": ["a"]}, {"blocks": ["a.b"]}), ({"every": 2}, {"blocks": ["a"]}),
     ({"blocks": ["a"]}, {})],
)  # fmt: skip
def test_one_block_may_not_be_recomputed_whole_and_in_part(
    whole: dict[str, Any], in_part: dict[str, Any]
) -> None:
    chosen = _chosen(("checkpoint", whole), ("checkpoint_selective", in_part))
    for order in (chosen, chosen[::-1]):
        with pytest.raises(OptionError, match="give each its own blocks"):
            check_pairs(order)


def test_a_technique_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="'offload' is named twice: name it once"):
        check_pairs(_chosen(("offload", {}), ("checkpoint", {}), ("offload", {})))


def test_apply_refuses_a_pair_and_leaves_the_model() -> None:
    model = memsave.FCN(widths=(4, 8))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(OptionError, match="'checkpoint' and 'checkpoint_budget' cannot be used to"):
        memsave.apply(model, ["checkpoint", "checkpoint_budget"])
    assert [type(module) for module in model.modules()] == classes


def test_apply_lets_norm_techniques_share_the_norms() -> None:
    """In a model that is there, each in-place norm takes its own kind."""
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.LeakyReLU(0.01),
        nn.Conv3d(4, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(0.01),
        nn.Conv3d(4, 2, 1),
    )  # fmt: skip
    applied = memsave.apply(
        model, ["inplace_abn", "inplace_group_norm"], example_inputs=torch.randn(1, 1, 8, 8, 8)
    )
    assert [change.technique for change in applied.replaced] == [
        "inplace_abn",
        "inplace_group_norm",
    ]
