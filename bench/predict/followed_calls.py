"""Operators that a trace follows into their allocations, and what of them is an estimate.

Fake tensors know an operator's results alone. These take more beside, in an order that matters: a
function of ours runs in the operator's place, whose tensors are taken and dropped as CUDA's host
code takes and drops them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bench.predict.attention import ATTENTION_CALLS, CUDNN_ATTENTION, CUDNN_ESTIMATED
from bench.predict.grids import GRID_CALLS
from bench.predict.indexing import INDEX_CALLS
from bench.predict.layer_norms import LAYER_NORM_CALLS
from bench.predict.logit_losses import LOGIT_LOSS_CALLS
from bench.predict.recurrent_layers import CUDNN_CALLS, ESTIMATED
from bench.predict.rolls import ROLL_CALLS
from bench.predict.unfolding import UNFOLDING_CALLS
from bench.predict.upsampling import UPSAMPLING_CALLS

__all__ = ["FOLLOWED", "is_followed"]

FOLLOWED: Final[dict[Any, tuple[Callable[..., Any], tuple[str, ...]]]] = {
    **{
        packet: (call, (CUDNN_ESTIMATED,) if packet in CUDNN_ATTENTION else ())
        for packet, call in ATTENTION_CALLS.items()
    },
    **{packet: (call, (ESTIMATED,)) for packet, call in CUDNN_CALLS.items()},
    **{
        packet: (call, ())
        for calls in (
            *(LAYER_NORM_CALLS, ROLL_CALLS, INDEX_CALLS, LOGIT_LOSS_CALLS),
            *(GRID_CALLS, UNFOLDING_CALLS, UPSAMPLING_CALLS),
        )
        for packet, call in calls.items()
    },
}
"""Operator -> what runs in its place, and the parts of a prediction that are estimated."""


def is_followed(func: Any) -> bool:
    """Whether an overload is followed: one that writes into given results takes less of its own."""
    return func.overloadpacket in FOLLOWED and not any(a.is_out for a in func._schema.arguments)
