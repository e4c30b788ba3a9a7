"""A case made from words, as a command line gives them: any network, any input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.case import Case, Mode, Precision, TechniqueUse
from bench.errors import MembenchError
from bench.imported import Imported, check_reference, is_reference, label, parse_input
from bench.shapes import Shape, format_shape, pad_to, parse_shape

__all__ = ["named_case"]


def named_case(
    network: str,
    *,
    shape: str | None = None,
    inputs: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    loss: str | None = None,
    optimizer: str = "adam",
    precision: Precision = "fp32",
    techniques: Sequence[TechniqueUse] = (),
    mode: Mode = "train",
    steps: int = 2,
    batch_size: int = 1,
    target: str | None = None,
    classes: int | None = None,
) -> Case:
    """Return the case of a network of memsave's, by name, or of one that can be imported.

    One of memsave's takes ``shape``, ``"256x256x234"`` (x, y, slices), which is padded up to what
    it pools. Any other, ``"package.module:factory"``, takes ``inputs``, or a shape of its one
    image, as it stands. ``arguments`` are the options of the one, the arguments of the other.

    Errors: MembenchError for names that do not exist and shapes that do not suit.
    """
    if loss is not None and is_reference(loss):
        check_reference(loss, "loss")
    if is_reference(optimizer):
        check_reference(optimizer, "optimizer")
    given: dict[str, Any] = {
        "variant": "+".join(use.name for use in techniques) or "baseline",
        "mode": mode,
        "precision": precision,
        "techniques": tuple(techniques),
        "optimizer": optimizer,
        "steps": steps,
    }
    if is_reference(network):
        sides, size, specs = _image(network, shape, inputs, batch_size)
        return Case(
            network=label(network),
            requested_shape=sides,
            shape=sides,
            batch_size=size,
            loss=loss or "sum",
            imported=Imported(
                reference=network,
                arguments=dict(arguments or {}),
                classes=classes,
                inputs=specs,
                target=target,
            ),
            **given,
        )
    if inputs or target or classes is not None:
        raise MembenchError(
            f"network {network!r} is memsave's, which knows its inputs: give --shape alone"
        )
    return _of_memsave(network, shape, dict(arguments or {}), loss, batch_size, given)


def _image(
    network: str, shape: str | None, inputs: Sequence[str], batch_size: int
) -> tuple[Shape, int, tuple[str, ...]]:
    """Return the sides, the batch size, and the inputs where they are not one plain image."""
    check_reference(network)
    if bool(inputs) == (shape is not None):
        raise MembenchError(
            f"network {network!r} needs its input: give --input 1x1x128x128x128 (batch, channels, "
            "sides), or --shape with the sides alone"
        )
    if shape is not None:
        return parse_shape(shape), batch_size, ()
    specs = tuple(parse_input(text) for text in inputs)
    return specs[0].shape[2:], specs[0].shape[0], tuple(map(str, specs))


def _of_memsave(
    network: str,
    shape: str | None,
    options: dict[str, Any],
    loss: str | None,
    batch_size: int,
    given: dict[str, Any],
) -> Case:
    from bench.losses import check_loss
    from memsave.errors import MemsaveError
    from memsave.networks import check_options, find_network

    try:
        spec = find_network(network)
        check_options(network, options)
        divisor = spec.divisor(options)
    except MemsaveError as error:
        hint = "" if network.isidentifier() else "; a network of your own is package.module:factory"
        raise MembenchError(f"{error}{hint}") from None
    if shape is None:
        raise MembenchError(f"network {network!r} needs --shape, as 256x256x152: x, y, slices")
    sides = parse_shape(shape)
    if len(sides) != spec.spatial_dims:
        raise MembenchError(
            f"{format_shape(sides)} has {len(sides)} sides, {network} takes {spec.spatial_dims}"
        )
    check_loss(loss or spec.loss, spec.target)
    return Case(
        network=network,
        requested_shape=sides,
        shape=pad_to(sides, divisor),
        batch_size=batch_size,
        network_options=options,
        loss=loss or spec.loss,
        **given,
    )
