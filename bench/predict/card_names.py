"""Cards by name, ``<model>-<memory>gb``: as a person writes it, and as a GPU's driver says it."""

from __future__ import annotations

import re

from bench.errors import MembenchError, nearest
from bench.predict.budget_card import named_budget
from bench.predict.card import Card
from bench.predict.card_files import all_cards
from bench.units import GIB

__all__ = ["card_name_for_gpu", "find_card"]

# Words of a driver's name that do not tell models apart: makers, brands, sockets, kinds of memory.
_NO_MODEL = re.compile(
    r"nvidia|tesla|geforce|gpu|generation|graphics|pcie?|nvl|sxm\d*|hbm\d\w*|\d+gb"
)
_MARKETED_GIB = (
    *(1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80),
    *(94, 96, 128, 141, 144, 180, 192, 288),
)
# Cards report less than they are sold with: ECC takes a sixteenth, the driver some, so 22.0 GiB of
# an L4's 24. By more than an eighth no card does.
_LEAST_REPORTED = 0.875
# Cards of one model differ in memory by more, drivers and ECC by less.
_SAME_CARD = 0.1


def find_card(name: str) -> Card:
    """Return the card called ``name``, or raise MembenchError with the nearest names.

    ``budget-20gb`` is a budget of 20 GiB, see ``budget_card``, unless a card is called so.
    """
    cards = all_cards()
    if name in cards:
        return cards[name]
    budget = named_budget(name)
    if budget is None:
        raise MembenchError(f"no card is called {name!r}{nearest(name, cards)}")
    return budget


def card_name_for_gpu(model_name: str, memory_bytes: int) -> str:
    """Return the name of the card that a real GPU is: ``"NVIDIA H200"`` is ``"h200-141gb"``.

    ``memory_bytes`` may be CUDA's total or NVML's. A GPU that is no known card gets a name by the
    same rule, its memory that of the next size on sale.
    """
    model = _model(model_name)
    distances = {
        name: abs(card.memory_bytes - memory_bytes) / card.memory_bytes
        for name, card in all_cards().items()
        if name.rpartition("-")[0] == model
    }
    if distances:
        nearest_card = min(distances, key=distances.__getitem__)
        if distances[nearest_card] <= _SAME_CARD:
            return nearest_card
    return f"{model}-{_marketed_gib(memory_bytes)}gb"


def _model(model_name: str) -> str:
    name = re.sub(r"\(.*?\)", " ", model_name.lower())  # "TITAN X (Pascal)"
    name, slice_of, _ = name.partition(" mig ")  # "A100-SXM4-40GB MIG 1g.5gb": not a whole card
    words = [w for w in re.findall(r"[a-z0-9]+", name) if not _NO_MODEL.fullmatch(w)]
    return ("".join(words) or "gpu") + slice_of.strip()


def _marketed_gib(memory_bytes: int) -> int:
    reported = memory_bytes / GIB
    for size in _MARKETED_GIB:
        if _LEAST_REPORTED * size <= reported <= size:
            return size
    return max(1, round(reported))
