"""The cards that membench predicts for: one JSON file each, and the user's own on top of them."""

from bench.predict.budget_card import budget_card
from bench.predict.card import (
    Card,
    ConvolutionKind,
    ConvolutionWorkspace,
    WorkspaceRule,
)
from bench.predict.card_files import all_cards, card_files, user_cards_folder
from bench.predict.card_names import card_name_for_gpu, find_card

__all__ = [
    "Card",
    "ConvolutionKind",
    "ConvolutionWorkspace",
    "WorkspaceRule",
    "all_cards",
    "budget_card",
    "card_files",
    "card_name_for_gpu",
    "find_card",
    "user_cards_folder",
]
