"""Collects clip views into batches of fixed shape, across shard boundaries."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from pipeline.queues import POLL_SECONDS, Stopped
from pipeline.rows import Row
from pipeline.sample import ClipView


@dataclass(slots=True, eq=False)
class Batch:
    """A reused block of frames and the rows they belong to."""

    frames_BTCHW: torch.Tensor
    """uint8 [B, T, 3, size, size], planar, pinned where a GPU reads it.  A shorter clip is padded along T with its
    last frame, which block-causal attention makes exact."""
    rows: list[Row] = field(default_factory=list)
    num_copied: int = 0
    closed: bool = False
    places: tuple[torch.Tensor, ...] = ()
    """The block cut into its rows once: each cut would let go of the interpreter's lock."""

    def __post_init__(self) -> None:
        self.places = self.frames_BTCHW.unbind()

    @property
    def capacity(self) -> int:
        return len(self.places)


class Batcher:
    """Fills batches of two shapes: images (T = 1) and clips.

    `add` is called by many decoding threads: places are given out under a lock, pixels are written outside it.  A
    place is taken only when decoding has ended, so a slow video holds no batch back."""

    def __init__(
        self,
        *,
        shapes: Iterable[tuple[int, int]],
        size: int,
        num_slots: int,
        pin: bool,
        stop: threading.Event,
    ) -> None:
        """`shapes` holds (T, B) for each kind of batch; `num_slots` batches of each are allocated."""
        self._stop = stop
        self._changed = threading.Condition()
        self._ready: deque[Batch] = deque()
        self._free: dict[int, list[Batch]] = {}
        self._open: dict[int, Batch] = {}
        self._shapes = dict(shapes)
        self._size, self._num_slots, self._pin = size, num_slots, pin
        self._allocated = dict.fromkeys(self._shapes, 0)
        self._lengths = sorted(self._shapes)
        self.decode_wait_seconds = 0.0
        self.device_wait_seconds = 0.0

    def add(self, view: ClipView, row: Row) -> float:
        """Write one clip view into a batch, waiting for a free one; return the seconds of the writing alone.

        Raises Stopped, and whatever resizing raises: then the row's place is taken, but the row is `spoiled`."""
        length = next(length for length in self._lengths if length >= view.num_frames)
        batch, place = self._reserve(length, row)
        began = time.monotonic()
        row.spoiled = True
        try:
            view.write_to(batch.places[place])
            row.spoiled = False
        finally:
            with self._changed:
                batch.num_copied += 1
                if batch.closed:
                    self._hand_over_if_complete(batch)
        return time.monotonic() - began

    def has_ready(self) -> bool:
        """Whether `take` would return at once."""
        return bool(self._ready)

    @property
    def ready_bytes(self) -> int:
        """Bytes of the batches that wait to be taken."""
        return sum(batch.frames_BTCHW.nbytes for batch in self._ready.copy())

    def take(self, is_idle: Callable[[], bool]) -> Batch:
        """Take the next batch.  When none is ready and `is_idle()` says that no input can come before something is
        finished, a partial batch is handed over instead.  Raises Stopped."""
        began = time.monotonic()
        with self._changed:
            while not self._ready:
                if self._stop.is_set():
                    raise Stopped
                if is_idle():
                    self._close_partial()
                    if self._ready:
                        break
                self._changed.wait(POLL_SECONDS)
                # Not only when it ends: whoever looks meanwhile must see it.
                began, waited_since = time.monotonic(), began
                self.device_wait_seconds += began - waited_since
            return self._ready.popleft()

    def give_back(self, batch: Batch) -> None:
        """Return a batch whose frames have been read."""
        with self._changed:
            batch.rows = []
            batch.num_copied = 0
            batch.closed = False
            self._free.setdefault(batch.frames_BTCHW.shape[1], []).append(batch)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let waiting threads look again: an input queue ran dry, or the worker stops."""
        with self._changed:
            self._changed.notify_all()

    def _reserve(self, length: int, row: Row) -> tuple[Batch, int]:
        began = time.monotonic()
        with self._changed:
            while (batch := self._open.get(length) or self._new_batch(length)) is None:
                if self._stop.is_set():
                    raise Stopped
                self._changed.wait(POLL_SECONDS)
                began, waited_since = time.monotonic(), began
                self.decode_wait_seconds += began - waited_since
            self._open[length] = batch
            batch.rows.append(row)
            if len(batch.rows) == batch.capacity:
                batch.closed = True
                del self._open[length]
            return batch, len(batch.rows) - 1

    def _new_batch(self, length: int) -> Batch | None:
        free = self._free.get(length)
        if free:
            return free.pop()
        if self._allocated[length] == self._num_slots:
            return None
        self._allocated[length] += 1
        shape = (self._shapes[length], length, 3, self._size, self._size)
        return Batch(torch.zeros(shape, dtype=torch.uint8, pin_memory=self._pin))

    def _close_partial(self) -> None:
        for length, batch in list(self._open.items()):
            batch.closed = True
            del self._open[length]
            self._hand_over_if_complete(batch)

    def _hand_over_if_complete(self, batch: Batch) -> None:
        if batch.closed and batch.num_copied == len(batch.rows):
            self._ready.append(batch)
            self._changed.notify_all()
