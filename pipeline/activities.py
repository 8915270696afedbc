"""What every thread of a worker is doing, in memory that outlives its process.

A supervisor on the same host shares the memory, so it can still read which keys were in flight when the process is
dead or frozen; otherwise only the worker's own heartbeat reads it."""

from __future__ import annotations

import struct
import threading
import time
from typing import Any

from pipeline.messages import Activity

SLOT_BYTES = 1024
"""Room for one thread; a longer key is cut."""
SPARE_SLOTS = 8
_HEAD = struct.Struct("<Hd")
_TEXT_BYTES = SLOT_BYTES - _HEAD.size
_SEPARATOR = "\0"


def board_bytes(num_threads: int) -> int:
    """Bytes of memory for so many decoders and as many encode lanes, with reader, writer and some to spare."""
    return (2 * num_threads + SPARE_SLOTS) * SLOT_BYTES


class ActivityBoard:
    """One slot for each thread.  Writing costs microseconds and takes no lock."""

    def __init__(self, memory: Any) -> None:
        """`memory` is a writable buffer of zeros, as long as `board_bytes` says."""
        self._memory = memoryview(memory).cast("B")
        self._slots: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, thread: str, stage: str, shard: int, key: str = "") -> None:
        """Say what `thread` does from now on."""
        start = self._slots.get(thread, -1)
        if start < 0:
            start = self._new_slot(thread)
            if start < 0:
                return
        text = f"{thread}{_SEPARATOR}{stage}{_SEPARATOR}{shard}{_SEPARATOR}{key}".encode("utf-8", "replace")
        text = text[:_TEXT_BYTES]
        # A reader that comes in between must find nothing rather than half of it.
        self._memory[start : start + 2] = b"\0\0"
        start_of_text = start + _HEAD.size
        self._memory[start_of_text : start_of_text + len(text)] = text
        _HEAD.pack_into(self._memory, start, len(text), time.monotonic())

    def end(self, thread: str) -> None:
        """Say that `thread` waits for something to do."""
        start = self._slots.get(thread, -1)
        if start >= 0:
            self._memory[start : start + 2] = b"\0\0"

    def read(self) -> dict[str, Activity]:
        """What each thread is doing, and for how long; those that wait are left out."""
        activities = {}
        now = time.monotonic()
        for start in range(0, len(self._memory) - SLOT_BYTES + 1, SLOT_BYTES):
            length, began = _HEAD.unpack_from(self._memory, start)
            if not length:
                continue
            text = bytes(self._memory[start + _HEAD.size : start + _HEAD.size + length])
            parts = text.decode("utf-8", "replace").split(_SEPARATOR, 3)
            if len(parts) == 4 and parts[2].isdigit():
                thread, stage, shard, key = parts
                activities[thread] = Activity(stage, int(shard), key, max(0.0, now - began))
        return activities

    def _new_slot(self, thread: str) -> int:
        with self._lock:
            start = len(self._slots) * SLOT_BYTES
            if start + SLOT_BYTES > len(self._memory):
                start = -1
            return self._slots.setdefault(thread, start)
