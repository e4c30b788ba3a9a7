"""A tracer put to the proof: ``python -m bench.predict.trial <tracer>``, in a process of its own.

Runs a mixed-precision convolution, normalisation and their backward pass on fake tensors, as every
prediction does, and prints one line of what was seen. Anything that does not work is a traceback
and an exit status other than 0.
"""

from __future__ import annotations

import os
import sys

from bench.predict.tracing_process import become

__all__ = ["main", "trial"]


def trial(tracer: str) -> str:
    """Return what a tiny training step on fake tensors looked like.

    Raises RuntimeError if it ran, but not as on the device it was meant for.
    """
    become(tracer)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cpu" if tracer == "cpu" else "cuda:0")
    half = torch.bfloat16 if tracer == "cpu" else torch.float16
    with FakeTensorMode(), device:
        convolution = torch.nn.Conv3d(1, 2, kernel_size=3)
        model = torch.nn.Sequential(convolution, torch.nn.BatchNorm3d(2), torch.nn.LeakyReLU())
        with torch.autocast(device.type, dtype=half):
            y = model(torch.randn(1, 1, 8, 8, 8))
        y.float().sum().backward()
    gradient = convolution.weight.grad
    if gradient is None or gradient.device != device or y.dtype != half:
        raise RuntimeError(f"gradient {gradient!r} and output {y!r} are not {half} on {device}")
    return f"a training step in {str(half).removeprefix('torch.')} on fake {device}"


def main() -> None:
    """Try the tracer that the command line names."""
    print(trial(sys.argv[1]), flush=True)
    # autograd's thread for the fake cuda:0 may abort the interpreter's own way out
    os._exit(0)


if __name__ == "__main__":
    main()
