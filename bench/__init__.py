"""membench's harness: suites of cases, measured on a GPU or predicted without one.

``bench.predict(build, inputs, ...)`` gives a ``bench.Prediction``; neither is imported, nor torch,
before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.prediction import Prediction, predict

__all__ = ["Prediction", "__version__", "predict"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "predict":
        import importlib

        return importlib.import_module("bench.predict")  # a package that can be called
    if name == "Prediction":
        from bench.prediction import Prediction

        return Prediction
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
