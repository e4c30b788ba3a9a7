"""Folders that environment variables name."""

from __future__ import annotations

from pathlib import Path

from bench.errors import MembenchError

__all__ = ["expanded"]


def expanded(variable: str, folder: str) -> Path:
    """Return ``folder``, the value of ``variable``, with its ``~`` or ``~user`` made a path.

    Raises MembenchError where there is no such user.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise MembenchError(
            f"{variable}={folder}: that home folder is not known; write the path in full"
        ) from None
