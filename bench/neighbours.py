"""Who else is on a GPU: looked at before a case, while it runs, and after it.

NVML knows processes by the host's numbers, which a container hides: there the list may be empty,
or hold our own process under a number that we do not know. What is new beside it is then counted,
and where nothing is listed the device's memory in use has to tell. A note says which it was.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from bench import nvml
from bench.nvml import ProcessUse
from bench.units import MIB, format_bytes

__all__ = ["IDLE_BYTES", "Occupants", "Watch", "look"]

# No CUDA context is as small as this, and an idle device's use, less the driver's reserve, is less.
IDLE_BYTES = 64 * MIB
_INTERVAL_S = 0.5
_LAST_LOOKS = 4  # NVML may list a process for a moment after its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupants:
    """What NVML said of a device at one moment.

    ``processes``: None where it lists none at all. ``used_bytes``: of the whole device, by
    whomever. ``notes``: why one of them is None.
    """

    processes: tuple[ProcessUse, ...] | None
    used_bytes: int | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Occupants:
        """Make it again from ``to_dict``'s object, as it came through JSON."""
        listed = data["processes"]
        return cls(
            processes=None if listed is None else tuple(ProcessUse(**use) for use in listed),
            used_bytes=data["used_bytes"],
            notes=tuple(data["notes"]),
        )

    @property
    def pids(self) -> frozenset[int]:
        """The numbers of the listed processes, the host's."""
        return frozenset(use.pid for use in self.processes or ())

    @property
    def known(self) -> bool:
        """Whether NVML said anything by which another process could be seen."""
        return self.processes is not None or self.used_bytes is not None

    def describe(self) -> str:
        """Say who is on the device, of whom none is ours; "" when it is nobody."""
        if self.processes:
            return _listed(self.processes)
        if self.used_bytes is not None and self.used_bytes > IDLE_BYTES:
            return (
                f"{format_bytes(self.used_bytes)} are in use by processes that NVML does not list"
            )
        return ""


def look(uuid: str) -> Occupants:
    """Return who is on the GPU of that UUID now."""
    notes: list[str] = []
    return Occupants(
        processes=nvml.processes(uuid, notes),
        used_bytes=nvml.device_used_bytes(uuid, notes),
        notes=tuple(notes),
    )


def _listed(uses: tuple[ProcessUse, ...]) -> str:
    def one(use: ProcessUse) -> str:
        size = "of unknown size" if use.used_bytes is None else format_bytes(use.used_bytes)
        return f"process {use.pid} ({size})"

    return ", ".join(one(use) for use in uses)


class Watch:
    """Looks at a GPU while ``pid`` runs a case on it; ``end`` says who came meanwhile.

    ``before`` is what was there before ``pid`` had a context. The looks are taken here, in the
    process that waits, so that they cost the case no time.
    """

    def __init__(
        self, uuid: str, pid: int, before: Occupants, interval_s: float = _INTERVAL_S
    ) -> None:
        self._uuid, self._pid, self._before = uuid, pid, before
        self._interval_s = interval_s
        self._seen: dict[int, ProcessUse] = {}
        self._ours_among = False
        self.own_listed = False  # under the number that we know
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> str:
        """Look a last time, after ``pid`` has ended; return who came, "" when it was nobody."""
        self._done.set()
        self._thread.join()
        for _ in range(_LAST_LOOKS):
            after = look(self._uuid)
            stayed, grown = self._new(after.processes), self._grown(after)
            if not stayed and not grown:
                break
            time.sleep(self._interval_s / 2)
        seen = tuple((self._seen | stayed).values())
        if not seen:
            return grown
        return _listed(seen) + (", one of them our own" if self._ours_among else "")

    def _run(self) -> None:
        while not self._done.is_set():
            self._look_beside()
            self._done.wait(self._interval_s)

    def _look_beside(self) -> None:
        listed = nvml.processes(self._uuid) or ()
        others = self._new(listed)
        known = any(use.pid == self._pid for use in listed) and self._pid not in self._before.pids
        self.own_listed |= known
        # Where our number is not listed, one new process is ours, under the host's number.
        if known or len(others) > 1:
            self._seen |= others
            self._ours_among |= not known

    def _new(self, listed: tuple[ProcessUse, ...] | None) -> dict[int, ProcessUse]:
        known = self._before.pids | {self._pid}
        return {use.pid: use for use in listed or () if use.pid not in known}

    def _grown(self, after: Occupants) -> str:
        """Where no process is listed: whether the device holds more than before the case."""
        if after.processes or after.used_bytes is None or self._before.used_bytes is None:
            return ""
        grown_bytes = after.used_bytes - self._before.used_bytes
        if grown_bytes <= IDLE_BYTES:
            return ""
        return f"{format_bytes(grown_bytes)} more in use after the case than before it"
