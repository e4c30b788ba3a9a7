"""The folders that cards are read from: membench's own, and the user's on top of them.

A card of one's own is a file of the form of those in ``cards/``, ``<name>.json``, in the folder
``$MEMBENCH_CARDS``, else ``$XDG_CONFIG_HOME/membench/cards``, else ``~/.config/membench/cards``; it
takes the place of a shipped card of the same name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from bench.errors import MembenchError
from bench.predict.card import Card
from bench.predict.folders import expanded

__all__ = ["all_cards", "card_files", "user_cards_folder"]

_SHIPPED = Path(__file__).with_name("cards")


def user_cards_folder() -> Path:
    """Return the folder of the user's own cards, whether or not it exists."""
    if named := os.environ.get("MEMBENCH_CARDS"):
        return expanded("MEMBENCH_CARDS", named)
    if settings := os.environ.get("XDG_CONFIG_HOME"):
        return Path(settings) / "membench" / "cards"
    try:
        return Path.home() / ".config" / "membench" / "cards"
    except RuntimeError:  # a user without a home folder
        return Path("/nonexistent")


def card_files(folder: Path) -> list[Path]:
    """Return the card files of a folder; none in another user's, which cannot be searched."""
    try:
        return sorted(folder.glob("*.json"))
    except PermissionError:
        return []


def all_cards() -> dict[str, Card]:
    """Return every card by name, the user's in place of a shipped one of the same name.

    Raises MembenchError naming file and field when a user's card cannot be read.
    """
    cards = dict(_read_folder(_SHIPPED))
    cards.update(_read_folder(user_cards_folder()))
    return dict(sorted(cards.items()))


def _read_folder(folder: Path) -> Iterator[tuple[str, Card]]:
    for path in card_files(folder):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MembenchError(f"{path}: the card cannot be read: {error}") from None
        card = Card.from_dict(data, where=str(path))
        if card.name != path.stem:
            raise MembenchError(f"{path}: field 'name' is {card.name!r}; name the file after it")
        yield card.name, card
