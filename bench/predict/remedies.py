"""What to do about errors that only a predicted step raises, said with the line that raised them.

A fake tensor has no values and its device no driver; torch's own words for that say nothing of a
prediction. Everything else that a network raises is left as it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from bench.errors import MembenchError
from bench.predict.source_lines import persons_line

__all__ = ["with_remedies"]

_VALUES = "a predicted step has no values: "
# Words of torch's error, what is wrong, and what to do.
_REMEDIES = (
    (
        ".numpy() is not supported for tensor subclasses",
        _VALUES + ".numpy() cannot be followed; compute with torch, or leave it out of the step",
    ),
    (
        "unsupported format string passed to FakeTensor.__format__",
        _VALUES + "a number of a tensor's cannot be printed; leave it out of the step, or print "
        "the tensor itself",
    ),
    (
        "torch.cuda.Stream requires CUDA support",
        "streams of one's own are not followed: leave out torch.cuda.Stream",
    ),
    (
        "Tried to instantiate dummy base class",
        "streams, events and graphs of torch.cuda are not followed: leave them out of the step",
    ),
    (
        "Cannot get CUDA generator",
        "a generator on the GPU cannot be made without one: draw from torch's default one",
    ),
    (
        "There was no fake impl registered",
        "an operator of one's own says nothing of its output's shape: register_fake tells it",
    ),
    (
        "Torch not compiled with CUDA enabled",
        "this call of torch.cuda needs a GPU, which a prediction has not: leave it out of the step",
    ),
    (
        "has no attribute '_cuda_",
        "this call of torch.cuda needs a GPU, which a prediction has not: leave it out of the step",
    ),
)


@contextmanager
def with_remedies() -> Iterator[None]:
    """Turn an error that comes of predicting into a MembenchError with its line and a remedy."""
    try:
        yield
    except MembenchError:
        raise
    except (RuntimeError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        said = str(error)
        for words, remedy in _REMEDIES:
            if words in said:
                line = persons_line(traceback.extract_tb(error.__traceback__))
                raise MembenchError(f"{line}: {remedy}" if line else remedy) from error
        raise
