"""Appends to the ledger.  The number of a segment is claimed by writing it, create-only: that fences a zombie."""

from __future__ import annotations

import time

from pipeline.dataset_files import ledger_folder, select_segments
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import LeaseLost
from schemas.ledger import Arithmetic, Attempt, Commit, GivenUp, merge_segments, segment_name, segment_range

SEGMENT_RECORDS = 256
SEGMENT_SECONDS = 5.0
MERGED_SEGMENTS = 64
"""Segments of one level that become one of the next, so that any job has at most some thousands."""
MERGED_BYTES = 64 << 20
"""What is merged at most into one: a merge is done in memory."""


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
        data = ("\n".join(lines) + "\n").encode()
        won = self._storage.create_only(name, data, on_temporary=lambda: reached("in_ledger"))
        if won and self._is_merged_away(self._next_segment):
            self._storage.delete(name)
            won = False
        if not won:
            raise LeaseLost(
                f"{self._storage.url}: segment {self._next_segment} of the ledger was written by another driver. "
                f"This one stops; nothing it published is counted twice."
            )
        reached("after_ledger")
        self._next_segment += 1
        self._waiting = []
        self._merge()

    def _is_merged_away(self, number: int) -> bool:
        """Whether the number is free only because another driver's segment of it was merged and deleted."""
        bounds = [segment_range(name) or (0, -1) for name in self._storage.list(self._folder)]
        return any(first <= number <= last and first < last for first, last in bounds)

    def _merge(self) -> None:
        """Merge the last 64 segments of a level into one of the next, or as few as their bytes allow.

        A merged segment is published before its parts are deleted, and the same parts give the same bytes: a driver
        that dies in between leaves a ledger that reads the same."""
        span = MERGED_SEGMENTS
        while self._next_segment % span == 0:
            first, last = self._next_segment - span, self._next_segment - 1
            listed = self._storage.list(self._folder)
            try:
                selected = select_segments(listed)
            except LookupError:
                return  # the listing lags behind; a later merge takes these too
            bounds = {name: numbers for name in listed if (numbers := segment_range(name)) is not None}
            # Parts of a merged segment whose driver died before it deleted them.
            for name in bounds.keys() - set(selected):
                self._storage.delete(f"{self._folder}/{name}")
            parts = [name for name in selected if first <= bounds[name][0] <= bounds[name][1] <= last]
            for group in self._group(parts):
                data = merge_segments([self._storage.read_bytes(f"{self._folder}/{name}") for name in group])
                merged = segment_name(bounds[group[0]][0], bounds[group[-1]][1])
                self._storage.create_only(f"{self._folder}/{merged}", data)
                for name in group:
                    self._storage.delete(f"{self._folder}/{name}")
            span *= MERGED_SEGMENTS

    def _group(self, names: list[str]) -> list[list[str]]:
        """Neighbours that together are no larger than a merged segment may be, two or more of them.

        Two groups that follow each other are larger together, so however long a ledger is, the bytes of two of its
        segments are more than that on average, but for some of each level."""
        groups: list[list[str]] = [[]]
        num_bytes = 0
        for name in names:
            size = self._storage.size(f"{self._folder}/{name}")
            if num_bytes + size > MERGED_BYTES:
                groups.append([])
                num_bytes = 0
            groups[-1].append(name)
            num_bytes += size
        return [group for group in groups if len(group) > 1]
