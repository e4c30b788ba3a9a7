"""The table of networks."""

from __future__ import annotations

import pytest
import torch

from memsave.errors import UnknownNameError
from memsave.networks import FCN, NETWORKS, build, find_network


@pytest.mark.parametrize("name", NETWORKS)
def test_an_entry_says_what_its_network_does(name: str) -> None:
    spec = find_network(name)
    assert spec.name == name
    assert spec.summary
    assert spec.source
    sides = spec.divisor({})
    assert len(sides) == spec.spatial_dims
    with torch.device("meta"):
        logits = build(name)(torch.empty(1, spec.in_channels, *(2 * side for side in sides)))
    assert logits.shape == (1, spec.classes, *(2 * side for side in sides))


def test_build_passes_the_options_on() -> None:
    model = build("fcn", {"widths": [4, 8], "classes": 2})
    assert isinstance(model, FCN)
    assert model.widths == (4, 8)
    assert model.head.out_channels == 2


def test_an_unknown_network_is_refused_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown network 'fnc' .did you mean 'fcn'"):
        build("fnc")


def test_an_unknown_option_is_refused_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"option of network 'fcn' 'blocks' .*'block'"):
        build("fcn", {"blocks": "ccblock"})
