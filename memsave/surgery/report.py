"""What ``memsave.apply`` says it did: one line a change, one line a norm left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Change", "Kept", "report", "size"]


@dataclass(frozen=True, slots=True)
class Change:
    """Modules that a technique changed."""

    modules: tuple[str, ...]  # their names, a norm and its activation for a pair
    reason: str  # what by what, and what the user should know
    technique: str
    saved_bytes: int | None = None  # activations no longer kept; None where shapes are not known

    def __str__(self) -> str:
        saved = "" if self.saved_bytes is None else f"; saves {size(self.saved_bytes)}"
        return f"replaced {' + '.join(self.modules)}: {self.reason} ({self.technique}){saved}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A norm left as it was."""

    modules: tuple[str, ...]
    reason: str
    wrong: bool = False  # replacing it would have changed what the network computes

    def __str__(self) -> str:
        return f"kept {' + '.join(self.modules)}: {self.reason}"


def size(nbytes: int) -> str:
    """Write bytes for people, in MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def report(
    name: str,
    replaced: Sequence[Change],
    kept: Sequence[Kept],
    notes: Sequence[str],
    dry_run: bool,
    saved_bytes: int | None,
) -> str:
    """Return the whole report, a summary first."""
    saved = "" if saved_bytes is None else f"; saves {size(saved_bytes)} of activations"
    tense = " (dry run: nothing was changed)" if dry_run else ""
    summary = f"{name}: {len(replaced)} replaced, {len(kept)} kept{saved}{tense}"
    return "\n".join([summary, *map(str, replaced), *map(str, kept), *notes])
