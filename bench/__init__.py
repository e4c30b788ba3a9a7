"""membench's harness: suites of cases, measured on a GPU or predicted without one."""

__all__ = ["__version__"]

__version__ = "0.1.0"
