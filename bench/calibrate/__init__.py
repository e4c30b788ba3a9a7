"""A card measured: its context, and what libraries and kernels take beside their results."""
