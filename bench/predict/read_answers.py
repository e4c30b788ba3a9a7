"""The few reads of values whose answer is known although a predicted step has no values.

torch itself looks into tensors here and there, to choose how it goes on. GradScaler asks whether
to skip the step, an encoder whether its mask is the causal one or its padding stands at the end,
``AveragedModel`` whether it has averaged before.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch

from bench.predict.source_lines import torchs_frames
from bench.predict.step_trace import Trace

__all__ = ["CAUSAL", "NOT_PACKED", "PACKS_PADDING", "answered_read"]

CAUSAL = (
    "an attention mask was taken to be the causal one, as torch reads its values to find out; "
    "is_causal=True or False says it"
)
NOT_PACKED = (
    "a padded batch was taken as it stands; torch packs it where the padding is at the end, which "
    "enable_nested_tensor=False rules out"
)
_aten = torch.ops.aten
# Whether a batch's padding stands at its end, so that it is packed; it has no fake kernel.
PACKS_PADDING = _aten._nested_tensor_from_mask_left_aligned.default


def answered_read(func: Any, trace: Trace) -> float | bool | None:
    """Return what ``func`` would read where that is known, None where it is not.

    What was assumed is noted in ``trace``.
    """
    if func is PACKS_PADDING:
        _note(trace, NOT_PACKED)
        return False
    if func is not _aten._local_scalar_dense.default:
        return None
    for frame in torchs_frames():
        code = frame.f_code
        if code.co_filename.endswith("amp/grad_scaler.py"):
            return 0.0  # no infinities found: the step is not skipped
        if code.co_name == "_detect_is_causal_mask":
            _note(trace, CAUSAL)
            return True
        if code.co_filename.endswith("optim/swa_utils.py"):
            return _of_average(frame)
    return None


def _of_average(frame: FrameType) -> float | bool | None:
    """Answer an AveragedModel: its count stands still for good, but the changes of it do not.

    Of its two questions the second is asked when the answer to the first has a name.
    """
    name, known = frame.f_code.co_name, frame.f_locals
    if name == "swa_update":
        return 1.0  # the weight of a mean: which one it is costs nothing
    if name != "update_parameters":
        return None
    begun = known["self"].n_averaged._version > 0
    return begun if "copy_param" in known else not begun


def _note(trace: Trace, text: str) -> None:
    if text not in trace.notes:
        trace.notes = (*trace.notes, text)
