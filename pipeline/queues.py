"""Queues bounded in bytes that hear the stop flag, so that no thread waits for ever."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")

# How long a waiting thread may miss the stop flag; waking costs microseconds.
POLL_SECONDS = 0.25


class Stopped(Exception):
    """The worker is stopping; the thread that gets this ends."""


class ByteQueue(Generic[Item]):
    """A first-in first-out queue that holds at most `max_bytes`, counted by whoever puts.

    An item larger than the bound is admitted alone."""

    def __init__(self, max_bytes: int, stop: threading.Event) -> None:
        self._max_bytes = max_bytes
        self._stop = stop
        self._items: deque[tuple[Item, int]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes waiting now."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item, num_bytes: int) -> None:
        """Append `item` when there is room.  Raises Stopped."""
        with self._changed:
            while self._items and self._num_bytes + num_bytes > self._max_bytes:
                if self._stop.is_set():
                    raise Stopped
                self._changed.wait(POLL_SECONDS)
            self._items.append((item, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify()

    def get(self) -> Item:
        """Take the oldest item, waiting for one.  Raises Stopped."""
        with self._changed:
            while not self._items:
                if self._stop.is_set():
                    raise Stopped
                self._changed.wait(POLL_SECONDS)
            if self._stop.is_set():
                raise Stopped
            item, num_bytes = self._items.popleft()
            self._num_bytes -= num_bytes
            # Both putters and getters wait on one condition: wake all, or the wrong one may sleep on.
            self._changed.notify_all()
            return item
