"""Training 3D segmentation networks in less memory: techniques, and the networks they came with."""

from memsave.apply import Applied, apply
from memsave.checkpoint import checkpoint_block, checkpoint_sequence, checkpoint_steps
from memsave.checkpoint_budget import checkpoint_budget
from memsave.checkpoint_nested import checkpoint_nested_steps
from memsave.checkpoint_selective import checkpoint_selective
from memsave.compression import compress_activations
from memsave.errors import (
    BackwardError,
    InputError,
    MemsaveError,
    OptionError,
    RefusedError,
    UnknownNameError,
)
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.invertibility import Invertibility, check_invertible
from memsave.mixed_precision import MixedPrecision
from memsave.networks import FCN, NETWORKS
from memsave.offload import offload
from memsave.optimizer_in_backward import optimizer_in_backward
from memsave.recompute_pairs import recompute_pair, recompute_pairs
from memsave.recomputed_norm_act import RecomputedNormAct, attach_recompute, recompute
from memsave.reversible import ReversibleBlock, ReversibleSequence, reversible_conv_block
from memsave.techniques import TECHNIQUES, Technique, find_technique
from memsave.tiled import TiledLevelsOptions, TiledUNet, UNetLayout, UNetLevel, tile_levels

__all__ = [
    "FCN",
    "NETWORKS",
    "TECHNIQUES",
    "Applied",
    "BackwardError",
    "InPlaceABN",
    "InPlaceABNSync",
    "InPlaceGroupNorm",
    "InPlaceInstanceNorm",
    "InputError",
    "Invertibility",
    "MemsaveError",
    "MixedPrecision",
    "OptionError",
    "RecomputedNormAct",
    "RefusedError",
    "ReversibleBlock",
    "ReversibleSequence",
    "Technique",
    "TiledLevelsOptions",
    "TiledUNet",
    "UNetLayout",
    "UNetLevel",
    "UnknownNameError",
    "apply",
    "attach_recompute",
    "check_invertible",
    "checkpoint_block",
    "checkpoint_budget",
    "checkpoint_nested_steps",
    "checkpoint_selective",
    "checkpoint_sequence",
    "checkpoint_steps",
    "compress_activations",
    "find_technique",
    "offload",
    "optimizer_in_backward",
    "recompute",
    "recompute_pair",
    "recompute_pairs",
    "reversible_conv_block",
    "tile_levels",
]
