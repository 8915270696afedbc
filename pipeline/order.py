"""The order of samples as a function: an integer hash of seed, epoch and place, the same on every machine.

NumPy does not promise that its generators give the same numbers in later versions, so the shuffle sorts by a hash of
its own: SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014), in 64-bit
unsigned integers.  A change of anything here changes every order: raise `ORDER_VERSION` and the golden vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1

UNITS, ROWS, VIEWS, DROPS = 1, 2, 3, 4
"""What a hash is for; each use has numbers of its own."""

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_COST_BITS = 20
_CHUNK = 1 << 20


def splitmix64(values: Hashes) -> Hashes:
    """One step of SplitMix64 for each uint64, evenly distributed."""
    mixed = values + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def stream_key(*parts: int) -> np.uint64:
    """One hash of several integers of any size and sign, such as purpose, seed and epoch; their order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.array([part & _MASK], np.uint64))
    return np.uint64(key[0])


def hashes(key: np.uint64, numbers: Numbers) -> Hashes:
    """A hash for each number of a stream."""
    return splitmix64(splitmix64(numbers.astype(np.uint64)) ^ key)


def _hashes_up_to(key: np.uint64, count: int) -> Hashes:
    """The hashes of 0 to count - 1, with little memory beside them."""
    found = np.empty(count, np.uint64)
    for first in range(0, count, _CHUNK):
        last = min(first + _CHUNK, count)
        found[first:last] = hashes(key, np.arange(first, last))
    return found


def unit_order(seed: int, epoch: int, num_units: int) -> Numbers:
    """The units (row groups) of an epoch in shuffled order, int64."""
    return np.argsort(_hashes_up_to(stream_key(UNITS, seed, epoch), num_units), kind="stable")


def row_order(seed: int, epoch: int, samples: Numbers) -> Numbers:
    """Places 0 to n - 1 of a window in shuffled order; `samples` are the numbers of its samples."""
    return np.argsort(hashes(stream_key(ROWS, seed, epoch), samples), kind="stable")


def latin_views(epoch: int, clips: Numbers, num_views: int) -> Numbers:
    """The view of each clip in an epoch: of `num_views` epochs in a row every one shows another."""
    first = hashes(stream_key(VIEWS), clips) % np.uint64(num_views)
    return (first.astype(np.int64) + epoch) % num_views


def drop_hashes(seed: int, positions: Numbers) -> Hashes:
    """A hash for each position of the endless stream that decides whether its label or text is dropped."""
    return hashes(stream_key(DROPS, seed), positions)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How the units of one epoch, in their order, are cut into windows."""

    units: Numbers
    """Units in the order in which they come; those without samples are left out."""
    first_unit: Numbers
    """Of each window the place in `units` where it begins, and last the number of units: int64 [windows + 1]."""
    first_sample: Numbers
    """Of each window the number of samples of the epoch before it, and last all of them: int64 [windows + 1]."""

    @property
    def num_windows(self) -> int:
        return len(self.first_unit) - 1

    def window_at(self, place: int) -> int:
        """The window that holds sample `place` of the epoch."""
        return int(np.searchsorted(self.first_sample, place, side="right")) - 1


def unit_costs(
    unit_rows: npt.NDArray[Any], row_bytes: npt.NDArray[Any], max_rows: int, max_bytes: int
) -> npt.NDArray[np.int32]:
    """How much of a window each unit takes, in 2^-20: of `max_rows` rows or `max_bytes` bytes, whichever is more.

    `row_bytes` are the bytes of a row of each unit.  Integers, for sums of floats depend on the order of addition."""
    rows = unit_rows.astype(np.int64) << _COST_BITS
    costs = np.maximum(rows // max_rows, rows * row_bytes // max_bytes)
    return np.asarray(np.minimum(costs, np.iinfo(np.int32).max), np.int32)


def plan_windows(units: Numbers, unit_samples: npt.NDArray[Any], costs: npt.NDArray[np.int32]) -> WindowPlan:
    """Cut `units` into windows: one ends when the costs of its units pass 2^20.

    The other arrays are indexed by unit.  A unit belongs to the window in which it begins, so a window passes its
    bounds by less than one unit; where one is reached is a sum, and no window depends on how another one was cut."""
    empty = unit_samples == 0
    if empty.any():
        units = units[~empty[units]]
    cost = costs[units]
    window = np.cumsum(cost, dtype=np.int64)
    window -= cost
    window >>= _COST_BITS
    starts = np.flatnonzero(window[1:] != window[:-1]) + 1
    first_unit = np.concatenate([[0], starts, [len(units)]]) if len(units) else np.zeros(1, np.int64)
    first_sample = np.zeros(len(first_unit), np.int64)
    if len(units):
        np.cumsum(np.add.reduceat(unit_samples[units], first_unit[:-1], dtype=np.int64), out=first_sample[1:])
    return WindowPlan(units, first_unit, first_sample)
