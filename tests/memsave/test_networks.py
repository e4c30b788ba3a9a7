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
    divisor = spec.divisor({})
    assert len(divisor) == spec.spatial_dims
    shape = tuple(2 * (index + 1) * side for index, side in enumerate(divisor))  # all different
    with torch.device("meta"):
        model = build(name)
        output = model(torch.empty(spec.image_shape({}, 2, shape)))
    assert model.divisor == divisor
    assert output.shape == (2, spec.classes, *spec.input_sides(shape))
    target = spec.target_shape({}, 2, shape)
    assert target == (output.shape if spec.target == "mask" else (2, *output.shape[2:]))


@pytest.mark.parametrize("name", NETWORKS)
def test_options_for_channels_are_known_without_building(name: str) -> None:
    spec = find_network(name)
    options = {"in_channels": 2, spec.classes_option: 3}
    shape = tuple(2 * side for side in spec.divisor(options))
    with torch.device("meta"):
        output = build(name, options)(torch.empty(spec.image_shape(options, 1, shape)))
    assert spec.output_channels(options) == output.shape[1] == 3
    assert spec.target_shape(options, 1, shape) in (output.shape, (1, *output.shape[2:]))


def test_a_networks_sides_are_in_its_own_order() -> None:
    assert find_network("pocketnet_3d").image_shape({}, 4, (256, 128, 5)) == (4, 1, 5, 128, 256)
    assert find_network("pocketnet_3d").target_shape({}, 4, (256, 128, 5)) == (4, 5, 128, 256)
    assert find_network("conv_lstm").target_shape({}, 1, (32, 16, 5)) == (1, 1, 32, 16, 5)
    assert find_network("fcn").image_shape({}, 1, [32, 16, 8]) == (1, 1, 32, 16, 8)


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
