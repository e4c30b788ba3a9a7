"""Training 3D segmentation networks in less memory: techniques, and the networks they came with."""

from memsave.checkpoint import checkpoint_block, checkpoint_sequence, checkpoint_steps
from memsave.errors import InputError, MemsaveError, OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.mixed_precision import MixedPrecision
from memsave.networks import FCN, NETWORKS
from memsave.techniques import TECHNIQUES, Technique, find_technique

__all__ = [
    "FCN",
    "NETWORKS",
    "TECHNIQUES",
    "InPlaceABN",
    "InPlaceABNSync",
    "InPlaceGroupNorm",
    "InPlaceInstanceNorm",
    "InputError",
    "MemsaveError",
    "MixedPrecision",
    "OptionError",
    "Technique",
    "UnknownNameError",
    "checkpoint_block",
    "checkpoint_sequence",
    "checkpoint_steps",
    "find_technique",
]
