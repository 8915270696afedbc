"""Tells the workers of a torch DataLoader which epoch a pass over it is.

Each worker has a copy of the loader, and the main process does not hear of their progress.  What they share is a few
bytes of memory: the position that the main process last set, and which pass began at which epoch.  A worker that
begins a pass of its own number writes what its siblings would write too, so no lock is needed.  The memory is
anonymous and goes with the processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import get_worker_info

from pipeline.loader_state import Position

_POSITION_BYTES = 4096
_EPOCH_BITS = 23
_KEY_MASK = (1 << 40) - 1


class WorkerPasses:
    """Memory that the copies of a loader share."""

    def __init__(self, position: Position) -> None:
        self._marks = _shared(2, torch.int64)
        """How often the position was set, and the pass that began last with its epoch (0: none since then)."""
        self._position = _shared(_POSITION_BYTES, torch.uint8)
        self._following = _shared(_POSITION_BYTES, torch.uint8)
        """Where the epoch after the one that ended last begins; all workers write the same."""
        self._seen = 0
        self._passes = 0
        self._entered = 0
        self._loaded = 0
        _write(self._position, position)

    def were_begun(self) -> bool:
        """Whether workers began a pass since the position was last set."""
        return bool(self._marks[1])

    def set_position(self, position: Position) -> None:
        """In the main process: workers begin here."""
        _write(self._position, position)
        self._marks[1] = 0
        self._marks[0] += 1
        self._seen = int(self._marks[0])

    def next_pass(self) -> None:
        """In a worker: a pass over the DataLoader begins."""
        self._passes += 1

    def load_in_worker(self, position: Position) -> None:
        """In a worker: its next pass begins where its own state says."""
        self._loaded = self._passes + 1
        self._seen = int(self._marks[0])
        self._marks[1] = self._word(self._loaded, position.epoch)

    def enter(self, position: Position, beginning_of: Callable[[int], Position]) -> Position | None:
        """In a worker: where the present pass begins, once; None when it has entered it, or was told by a state."""
        if self._entered == self._passes:
            return None
        self._entered = self._passes
        if self._loaded == self._passes:
            return None
        if self._seen != int(self._marks[0]):
            self._seen = int(self._marks[0])
            position = _read(self._position)
        word = int(self._marks[1])
        last_key, last_epoch = word >> _EPOCH_BITS, word & ((1 << _EPOCH_BITS) - 1)
        if not word:
            epoch = position.epoch
        elif last_key == self._word(self._passes, 0) >> _EPOCH_BITS:
            epoch = last_epoch
        else:
            epoch = last_epoch + 1
        self._marks[1] = self._word(self._passes, epoch)
        if epoch == position.epoch:
            return position
        following = _read(self._following)
        return following if following.epoch == epoch else beginning_of(epoch)

    def end(self, following: Position) -> None:
        """In a worker: the epoch ended, and the next one begins there."""
        _write(self._following, following)

    def _word(self, number: int, epoch: int) -> int:
        """One integer, so that it is written at once: a key that all workers of this pass share, and the epoch."""
        worker = get_worker_info()
        assert worker is not None
        key = (worker.seed - worker.id + number * 0x9E3779B97F4A7C15) & _KEY_MASK
        return (key or 1) << _EPOCH_BITS | epoch


def _write(memory: torch.Tensor, position: Position) -> None:
    data = json.dumps(position.to_json_dict()).encode()
    memory[: len(data) + 1] = torch.tensor([*data, 0], dtype=torch.uint8)


def _read(memory: torch.Tensor) -> Position:
    data = bytes(memory.tolist()).split(b"\0")[0]
    place: dict[str, Any] = json.loads(data) if data else {"epoch": -1, "step": 0}
    return Position(place["epoch"], place["step"], place.get("packing"))


def _shared(size: int, dtype: torch.dtype) -> torch.Tensor:
    memory: torch.Tensor = torch.zeros(size, dtype=dtype).share_memory_()  # type: ignore[no-untyped-call]
    return memory
