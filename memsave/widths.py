"""Channels of each level of a network: a rule by name, or the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memsave.errors import OptionError, UnknownNameError

__all__ = ["WIDTHS", "doubling", "pocket", "positive", "resolve_widths"]

DEFAULT_BASE = 64
DEFAULT_LEVELS = 4


def doubling(base: int, levels: int) -> tuple[int, ...]:
    """Twice the channels with every level down: ``base``, ``2 base``, ``4 base``, ..."""
    return tuple(base * 2**level for level in range(levels))


def pocket(base: int, levels: int) -> tuple[int, ...]:
    """``base`` channels on every level. Source: PocketNet, Celaya et al. 2022, arXiv:2104.10745."""
    return (base,) * levels


# name in a suite file -> rule
WIDTHS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "doubling": doubling,
    "pocket": pocket,
}


def resolve_widths(
    widths: str | Sequence[int], base: int | None = None, levels: int | None = None
) -> tuple[int, ...]:
    """Return the channels of each level, from a rule's name or an explicit list.

    ``base`` (default 64) and ``levels`` (default 4) belong to the rules; beside a list they are
    refused unless they say the same as the list.

    Raises UnknownNameError for a rule that is not there, OptionError for numbers that cannot be.
    """
    if not isinstance(widths, str):
        return _explicit(widths, base, levels)
    if widths not in WIDTHS:
        raise UnknownNameError("widths", widths, WIDTHS)
    return WIDTHS[widths](
        positive("base_width", DEFAULT_BASE if base is None else base),
        positive("levels", DEFAULT_LEVELS if levels is None else levels),
    )


def positive(name: str, value: object) -> int:
    """Return ``value`` if it is an integer of 1 or more, or raise OptionError naming ``name``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} must be an integer of 1 or more, got {value!r}")
    return value


def _explicit(widths: object, base: int | None, levels: int | None) -> tuple[int, ...]:
    if not isinstance(widths, Sequence) or not widths:
        raise OptionError(f"widths must be a rule's name or a list of channels, got {widths!r}")
    channels = tuple(positive("each of widths", width) for width in widths)
    if levels not in (None, len(widths)):
        raise OptionError(f"levels is {levels}, but widths {list(channels)} has {len(channels)}")
    if base not in (None, channels[0]):
        raise OptionError(f"base_width is {base}, but widths {list(channels)} starts otherwise")
    return channels
