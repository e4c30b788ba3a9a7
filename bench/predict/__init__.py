"""Prediction: the measured training step, on fake tensors, through an allocator simulator."""
