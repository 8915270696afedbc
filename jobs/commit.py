"""Appends to the ledger.  The number of a segment is claimed by writing it, create-only: that fences a zombie."""

from __future__ import annotations

import time

from pipeline.dataset_files import ledger_folder
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import LeaseLost
from schemas.ledger import Arithmetic, Attempt, Commit, GivenUp, segment_name

SEGMENT_RECORDS = 256
SEGMENT_SECONDS = 5.0


class LedgerWriter:
    """Collects records and publishes them as segments: 256 records, or what came within 5 seconds."""

    def __init__(self, storage: Storage, generation: int, next_segment: int, known_arithmetic: set[str]) -> None:
        self._storage = storage
        self._folder = ledger_folder(generation)
        self._next_segment = next_segment
        self._known_arithmetic = known_arithmetic
        self._waiting: list[Commit | Attempt | GivenUp | Arithmetic] = []
        self._first_waiting = 0.0

    def add(self, record: Commit | Attempt | GivenUp) -> None:
        """Take a record, to be published with others."""
        if not self._waiting:
            self._first_waiting = time.monotonic()
        self._waiting.append(record)

    def add_arithmetic(self, identifier: str, value: dict[str, object]) -> None:
        """Record once what an arithmetic id in commit records stands for."""
        if value and identifier not in self._known_arithmetic:
            self._known_arithmetic.add(identifier)
            if not self._waiting:
                self._first_waiting = time.monotonic()
            self._waiting.append(Arithmetic(id=identifier, value=value))

    def flush_if_due(self) -> None:
        """Publish what waits if it is enough, or has waited long enough.  Raises LeaseLost."""
        if self._waiting and (
            len(self._waiting) >= SEGMENT_RECORDS or time.monotonic() - self._first_waiting >= SEGMENT_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Publish what waits.  Raises LeaseLost when the number of the segment is taken: another driver is at work."""
        if not self._waiting:
            return
        lines = [record.to_line() for record in self._waiting]
        reached("before_ledger")
        name = f"{self._folder}/{segment_name(self._next_segment)}"
        if not self._storage.create_only(name, ("\n".join(lines) + "\n").encode()):
            raise LeaseLost(
                f"{self._storage.url}: segment {self._next_segment} of the ledger was written by another driver. "
                f"This one stops; nothing it published is counted twice."
            )
        reached("after_ledger")
        self._next_segment += 1
        self._waiting = []
