"""Many cases simulated in warm child processes, as many at once as there are cores."""

from __future__ import annotations

import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from bench.backends import predicted_backend
from bench.case import Case
from bench.child import Child, ChildCrashError, ChildTimeoutError
from bench.environment import read_environment
from bench.predict.cards import Card
from bench.record import Record
from bench.runner import Backend, make_record

__all__ = ["Simulator"]


class Simulator:
    """Predicts cases for cards; a context, since its children live until it ends::

        with Simulator(card) as simulator:
            plain, checkpointed = simulator.records([case, other])

    Errors: MembenchError for allocator settings that torch would refuse.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self._backend: Backend = predicted_backend(card)[0]
        self._environment = read_environment()
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._children: set[Child] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self._backend.workers)
        self.traced = 0

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            children = list(self._children)
        for child in children:
            child.close()
        self._threads.shutdown(cancel_futures=True)

    def records(
        self,
        cases: Sequence[Case],
        card: Card | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        """Return the records of ``cases``, in their order; a failed case is a record too.

        ``card``: in place of the simulator's. ``on_record`` is called for each, in order.
        """
        chosen = card or self.card
        results = []
        for record in self._threads.map(lambda case: self._record(case, chosen), cases):
            self.traced += 1
            results.append(record)
            if on_record is not None:
                on_record(record)
        return results

    def budgets(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
        """Return the budgets that ``checkpoint_budget`` can meet, in bytes, the largest first.

        One tuple for each of ``cases``, which use that technique: at the first budget nothing is
        recomputed, at each next one more, at the last all that makes the peak smaller. Empty where
        they cannot be found.
        """
        replies = self._threads.map(
            lambda case: self._ask(case, self.card, {"budgets": True}), cases
        )
        return [tuple(reply.get("budgets", ())) for reply in replies]

    def _record(self, case: Case, card: Card) -> Record:
        readings = self._ask(case, card, {})
        environment = dataclasses.replace(self._environment, card_hash=card.digest())
        return make_record(replace(self._backend, card=card.name), case, readings, environment)

    def _ask(self, case: Case, card: Card, more: dict[str, Any]) -> dict[str, Any]:
        """Return what a child answers of ``case``; a failure is an answer too."""
        try:
            child = self._child()
            reply = child.ask(
                {
                    **self._backend.request,
                    "case": case.to_definition(),
                    "card": card.to_dict(),
                    "search_path": [os.path.abspath(p) for p in sys.path],
                    **more,
                },
                case.time_limit_s,
            )
            self._idle.put(child)
        except ChildTimeoutError as error:
            return {"status": "timeout", "reason": str(error)}
        except ChildCrashError as error:
            return {"status": "failed", "reason": str(error)}
        return reply

    def _child(self) -> Child:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            child = Child(self._backend.module, self._backend.child_environment)
            with self._lock:
                self._children.add(child)
            return child
