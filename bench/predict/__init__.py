"""Prediction: the measured training step, on fake tensors, through an allocator simulator.

The package can be called: ``bench.predict(build, inputs, ...)`` is ``bench.prediction.predict``.
Name and package are one, whichever was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__: list[str] = []


class _CallablePackage(ModuleType):
    """This package's class: a module that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict a network; see ``bench.prediction.predict``, which has the arguments."""
        from bench.prediction import predict

        return predict(*args, **kwargs)

    @property
    def __signature__(self) -> Any:  # what help() and editors show
        import inspect

        from bench.prediction import predict

        return inspect.signature(predict)


sys.modules[__name__].__class__ = _CallablePackage
