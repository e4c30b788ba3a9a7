"""Every test here starts with no card named, whatever an earlier one in its process traced for."""

from __future__ import annotations

import pytest

from bench.predict import traced_card
from bench.predict.card import DEFAULT_MULTIPROCESSORS


@pytest.fixture(autouse=True)
def _no_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed = ((9, 0), DEFAULT_MULTIPROCESSORS)
    monkeypatch.setattr(traced_card, "_told", [unnamed])
