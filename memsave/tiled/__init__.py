"""Levels of a U-Net run slab by slab, forward and backward, with the untiled gradients."""

from memsave.tiled.layout import UNetLayout, UNetLevel
from memsave.tiled.network import TiledLevelsOptions, TiledUNet, tile_levels

__all__ = ["TiledLevelsOptions", "TiledUNet", "UNetLayout", "UNetLevel", "tile_levels"]
