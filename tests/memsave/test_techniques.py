"""The table of techniques, their options, and the four places where one may act."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import nn

from memsave.blocks import NORMS
from memsave.errors import OptionError, UnknownNameError
from memsave.networks import FCN, build
from memsave.techniques import (
    TECHNIQUES,
    CheckpointOptions,
    NoOptions,
    Technique,
    _table,
    find_technique,
    parse_options,
)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_an_entry_says_what_it_is(name: str) -> None:
    technique = find_technique(name)
    assert technique.name == name
    assert technique.summary
    assert technique.source
    assert technique.formula
    assert bool(technique.within) is not technique.exact
    frozen = parse_options(technique, {})
    assert dataclasses.is_dataclass(frozen)


def test_what_a_technique_leaves_out_does_nothing() -> None:
    idle = Technique(name="idle", summary="nothing", exact=True, source="none")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    options = parse_options(idle, {})
    given = {"block": "ccblock"}
    assert options == NoOptions()
    assert idle.build(given, options) == given
    assert idle.build(given, options) is not given
    assert idle.module(model, options) is model
    assert idle.optimizer(optimizer, model, options) is optimizer
    with idle.step(model, options):
        assert torch.is_grad_enabled()


def test_two_of_one_name_are_refused() -> None:
    idle = Technique(name="idle", summary="nothing", exact=True, source="none")
    with pytest.raises(ValueError, match="two techniques of one name"):
        _table(idle, idle)


def test_inplace_abn_sets_the_norm_of_a_network() -> None:
    technique = find_technique("inplace_abn")
    assert not technique.exact
    options = technique.build({"widths": [4, 8]}, parse_options(technique, {}))
    assert options == {"widths": [4, 8], "norm": "inplace_abn"}
    assert options["norm"] in NORMS
    assert "InPlaceABN" in repr(build("fcn", options))


def _checkpointed(**options: Any) -> list[str]:
    technique = find_technique("checkpoint")
    model = FCN(widths=(4, 8, 8))
    assert technique.module(model, parse_options(technique, options)) is model
    names = model.checkpointable_blocks()
    return [n for n in names if type(model.get_submodule(n)).__name__ == "CheckpointedDoubleConv"]


def test_checkpoint_takes_every_block_unless_told() -> None:
    assert _checkpointed() == ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"]
    assert _checkpointed(every=2) == ["encoder.0", "encoder.2", "decoder.1"]
    assert _checkpointed(blocks=["decoder.1"]) == ["decoder.1"]


def test_checkpoint_refuses_blocks_that_are_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"checkpointable block 'decoder.2' .*'decoder.1'"):
        _checkpointed(blocks=["decoder.2"])
    technique = find_technique("checkpoint")
    with pytest.raises(OptionError, match="Linear names no checkpointable blocks"):
        technique.module(nn.Linear(1, 1), CheckpointOptions())


def test_checkpoint_steps_tells_a_recurrent_network_how_often() -> None:
    technique = find_technique("checkpoint_steps")
    assert technique.exact
    model = build("conv_lstm", {"widths": [2, 2]})
    assert technique.module(model, parse_options(technique, {"every": 4})) is model
    assert model.steps_per_checkpoint == 4
    technique.module(model, parse_options(technique, {}))
    assert model.steps_per_checkpoint == 1


def test_checkpoint_steps_refuses_networks_without_steps_and_steps_of_none() -> None:
    technique = find_technique("checkpoint_steps")
    with pytest.raises(OptionError, match=r"FCN takes no steps to checkpoint: use .* conv_lstm"):
        technique.module(FCN(widths=(4, 8)), parse_options(technique, {}))
    with pytest.raises(OptionError, match="every must be 1 or more steps, got 0"):
        parse_options(technique, {"every": 0})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"evry": 2}, UnknownNameError, "option of technique 'checkpoint' 'evry' .*'every'"),
        (
            {"every": "2"},
            OptionError,
            "'every' of technique 'checkpoint' must be of type int, got '2'",
        ),
        ({"every": True}, OptionError, "must be of type int, got True"),
        ({"every": 0}, OptionError, "every must be 1 or more, got 0"),
        ({"blocks": "encoder.0"}, OptionError, "must be a list, got 'encoder.0'"),
        ({"blocks": [1]}, OptionError, "must be of type str, got 1"),
        ({"blocks": ["encoder.0"], "every": 2}, OptionError, "blocks or every, not both"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_options(find_technique("checkpoint"), given)


@dataclasses.dataclass(frozen=True)
class _AllKinds:
    kind: Literal["int8", "fp8"] = "int8"
    share: float = 0.5
    limit: int | None = 3
    pinned: bool = False


def test_options_of_every_kind_are_read() -> None:
    technique = Technique(name="all", summary="x", exact=True, source="x", options=_AllKinds)
    given = {"kind": "fp8", "share": 1, "limit": None, "pinned": True}
    assert parse_options(technique, given) == _AllKinds("fp8", 1.0, None, True)
    assert type(parse_options(technique, given).share) is float
    assert parse_options(technique, {"limit": 4}).limit == 4
    with pytest.raises(OptionError, match="must be one of 'int8', 'fp8', got 'fp4'"):
        parse_options(technique, {"kind": "fp4"})
    with pytest.raises(OptionError, match=r"'share' .* must be of type float, got True"):
        parse_options(technique, {"share": True})
    with pytest.raises(OptionError, match=r"'pinned' .* must be of type bool, got 1"):
        parse_options(technique, {"pinned": 1})


def test_an_unknown_technique_is_refused_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown technique 'checkpoin' .*'checkpoint'"):
        find_technique("checkpoin")
