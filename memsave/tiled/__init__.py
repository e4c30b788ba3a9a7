"""Levels of a U-Net run slab by slab, forward and backward, with the untiled gradients."""

from memsave.tiled.network import TiledFCN, TiledLevelsOptions, tile_levels

__all__ = ["TiledFCN", "TiledLevelsOptions", "tile_levels"]
