"""What ``plan`` and ``max-shape`` have in common: a folder of volumes, and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.network_options import parse_arguments
from bench.errors import MembenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.case import Case
    from bench.imported import InputSpec
    from bench.plan.folder import Folder

__all__ = [
    "DivisorOption",
    "SpacingOption",
    "VolumesOption",
    "case_at",
    "check_volumes",
    "image_divisor",
    "image_input",
    "network_divisor",
    "open_folder",
]

VolumesOption = Annotated[
    Path | None, typer.Option(help="Take the shapes from the NIfTI files of a folder.")
]
SpacingOption = Annotated[
    str | None,
    typer.Option(help="With --volumes: resample to this spacing in mm, as 1.62,1.62,3.22."),
]
DivisorOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of a network of your own: what its sides are multiples of; 16 if left out."
    ),
]

_DIVISOR = 16


def check_volumes(volumes: Path | None, spacing: str | None, others: dict[str, object]) -> None:
    """Refuse what cannot be given with --volumes, and --spacing without it.

    ``others``: options that also say a shape, by name, with what they were given.
    """
    if volumes is None:
        if spacing is not None:
            raise MembenchError("--spacing resamples volumes: give it together with --volumes")
        return
    given = [name for name, value in others.items() if value]
    if given:
        raise MembenchError(f"--volumes takes the shapes from its files: leave out {given[0]}")


def network_divisor(
    network: str, arguments: str, divisor: int | None, sides: int = 3
) -> tuple[int, ...]:
    """Return what each side must be a multiple of: known of memsave's networks, else as given.

    ``sides``: how many an image of the user's network has.
    Errors: MembenchError for a name or option that does not exist, and a divisor of no use.
    """
    from bench.imported import is_reference
    from memsave.errors import MemsaveError
    from memsave.networks import check_options, find_network

    if is_reference(network):
        return (divisor or _DIVISOR,) * sides
    options = parse_arguments(arguments)
    try:
        spec = find_network(network)
        check_options(network, options)
        known = tuple(spec.divisor(options))
    except MemsaveError as error:
        raise MembenchError(str(error)) from None
    if divisor is not None:
        multiples = "x".join(map(str, known))
        raise MembenchError(
            f"--divisor is for a network of your own: {network}'s sides are multiples of "
            f"{multiples}; leave it out"
        )
    return known


def image_input(network: str, inputs: Sequence[str], *, batch: int) -> InputSpec | None:
    """Return what ``--input`` says of a user's network: batch, channels, sides; None if nothing.

    Errors: MembenchError for a network of memsave's, more than one input, and two batch sizes.
    """
    from bench.imported import is_reference, parse_input

    if not inputs:
        return None
    if not is_reference(network):
        raise MembenchError(
            f"network {network!r} is memsave's, which knows its inputs: leave out --input"
        )
    if len(inputs) > 1:
        raise MembenchError(
            f"--input was given {len(inputs)} times: here one image changes its shape, give one"
        )
    spec = parse_input(inputs[0])
    if batch != 1 and spec.shape[0] != batch:
        raise MembenchError(
            f"--batch {batch} and --input {inputs[0]} are two batch sizes: leave out --batch"
        )
    return spec


def image_divisor(
    network: str, arguments: str, divisor: int | None, image: InputSpec | None
) -> tuple[int, ...]:
    """Return the divisors of the sides of a network's image, as many as ``--input`` has.

    Errors: MembenchError for an image of neither two nor three sides, and ``network_divisor``'s.
    """
    sides = 3 if image is None else len(image.shape) - 2
    if sides not in (2, 3):
        given = str(image).partition(":")[0]
        raise MembenchError(
            f"--input {given} is no image of two or three sides: write batch, channels and the "
            "proportions of the sides, as 1x4x128x128x128"
        )
    return network_divisor(network, arguments, divisor, sides)


def open_folder(
    network: str,
    arguments: str,
    volumes: Path,
    spacing: str | None,
    divisor: int | None,
    image: InputSpec | None,
) -> Folder:
    """Return the folder's shapes, padded for the network.

    ``image``: of a network of the user's own; its sides, which the volumes take the place of, may
    be left out. Errors: MembenchError for a folder, a file or a spacing of no use, a network in
    2D, and ``network_divisor``'s.
    """
    from bench.plan.folder import read_folder

    if image is not None and len(image.shape) == 2:
        image = None  # batch and channels: as many sides as a volume has
    divisors = image_divisor(network, arguments, divisor, image)
    return read_folder(volumes, spacing, divisors, network)


def case_at(network: str, shape: tuple[int, ...], image: InputSpec | None, **given: Any) -> Case:
    """Return the case of a network at one shape; ``given``: as ``named_case`` takes it."""
    from bench.imported import InputSpec
    from bench.named_case import named_case
    from bench.shapes import format_shape

    if image is None:
        return named_case(network, shape=format_shape(shape), **given)
    full = InputSpec((*image.shape[:2], *shape), image.dtype)
    return named_case(network, inputs=[str(full)], **given)
