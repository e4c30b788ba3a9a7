"""Writes ``memsave/PAIRS.md`` from the decisions that ``test_pairs`` tests.

``python -m tests.memsave.pairs_table`` in the root of the repository.
"""

from __future__ import annotations

from pathlib import Path

import memsave
from memsave.techniques import TECHNIQUES
from tests.memsave.pairs import COMPRESSED, NOTES, Refused, Together, all_pairs, decision

__all__ = ["PATH", "table"]

PATH = Path(memsave.__file__).parent / "PAIRS.md"

_HEAD = f"""# Pairs of techniques

Made from the tests by `python -m tests.memsave.pairs_table`. Each pair is tried in both orders: two
training steps of a small FCN (a recurrent network for `checkpoint_steps`), in float64 on the CPU.
The test also asks that both techniques were seen at work.

- **=** gradients of both steps, and running statistics, equal bit for bit those of the plain
  network, or of the pair's inexact technique alone.
- **~** equal within 1e-13 of their norm: only the order of sums differs.
- **{COMPRESSED:.0%}** within this share of their norm in the first step, with
  `compress_activations` in bf16.
- **no** refused, with an error, before anything runs. Why stands below.

"""


def table() -> str:
    """Return the whole file."""
    names = list(TECHNIQUES)
    numbers = {name: i + 1 for i, name in enumerate(names)}
    rows = ["| | technique | " + " | ".join(str(n) for n in numbers.values()) + " |"]
    rows.append("| --- | --- |" + " --- |" * len(names))
    for name in names:
        cells = ["" if name == other else _sign(decision(name, other)) for other in names]
        rows.append(f"| {numbers[name]} | `{name}` | " + " | ".join(cells) + " |")
    return _HEAD + "\n".join(rows) + "\n\n## Refused\n" + _refusals() + "\n## Notes\n" + _notes()


def _sign(decided: Together | Refused) -> str:
    if isinstance(decided, Refused):
        return "no"
    if decided.band == 0:
        return "="
    return f"{COMPRESSED:.0%}" if decided.band == COMPRESSED else "~"


def _refusals() -> str:
    by_reason: dict[str, list[str]] = {}
    for first, second in all_pairs():
        decided = decision(first, second)
        if isinstance(decided, Refused):
            by_reason.setdefault(decided.reason, []).append(f"`{first}` + `{second}`")
    return _list(by_reason)


def _notes() -> str:
    by_note: dict[str, list[str]] = {}
    for first, second in all_pairs():
        note = NOTES.get(frozenset({first, second}))
        if note is not None:
            by_note.setdefault(note, []).append(f"`{first}` + `{second}`")
    return _list(by_note)


def _list(by_text: dict[str, list[str]]) -> str:
    return "".join(f"- {', '.join(pairs)}: {text}.\n" for text, pairs in by_text.items())


if __name__ == "__main__":
    PATH.write_text(table())
