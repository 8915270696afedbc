"""Which shard is tried next, and what its failed attempts say about it.

Everything here can be read back from the ledger, so that a driver that takes over decides as this one would."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.messages import Assignment
from schemas.ledger import Attempt

WORKER_DIED = "WorkerDied"
"""The worker's process ended with the shard in flight; any of its keys may have done it."""
WORKER_HUNG = "WorkerHung"
"""The worker stood still as a whole and was killed; any of its keys may have done it."""
DECODE_HUNG = "DecodeHung"
"""One key was decoded for longer than allowed, and its worker was killed for it: the key is known."""

MAX_LOSSES = 20
"""Attempts that may end through no fault of the shard (a lost node, a preemption) before it is given up."""
BACKOFF_SECONDS = 1.0
BACKOFF_MOST_SECONDS = 60.0
DEATHS_OF_A_SUSPECT = 2


@dataclass(slots=True)
class _History:
    """What has gone wrong with one shard."""

    num_attempts: int = 0
    num_counted: int = 0
    num_lost: int = 0
    num_deaths: int = 0
    deaths_of_key: Counter[str] = field(default_factory=Counter)
    hung_keys: set[str] = field(default_factory=set)

    def add(self, attempt: Attempt) -> None:
        self.num_attempts += 1
        if not attempt.counts:
            self.num_lost += 1
            return
        self.num_counted += 1
        if attempt.error in (WORKER_DIED, WORKER_HUNG):
            self.num_deaths += 1
            self.deaths_of_key.update(set(attempt.keys_in_flight))
        elif attempt.error == DECODE_HUNG:
            self.num_deaths += 1
            self.hung_keys.update(attempt.keys_in_flight)

    @property
    def suspects(self) -> frozenset[str]:
        """Keys that were in flight in two deaths, or are known to hang."""
        twice = {key for key, deaths in self.deaths_of_key.items() if deaths >= DEATHS_OF_A_SUSPECT}
        return frozenset(twice | self.hung_keys)


class ShardQueue:
    """The shards that are left.  Holds their numbers, and a history only of those that failed before."""

    def __init__(self, shards: Sequence[int], failed: Mapping[int, Iterable[Attempt]], *, max_attempts: int) -> None:
        """`failed` holds the failed attempts of earlier drivers."""
        self._shards = shards
        self._max_attempts = max_attempts
        self._next = 0
        self._histories: dict[int, _History] = {}
        for shard in shards:
            for attempt in failed.get(shard, ()):
                self._histories.setdefault(shard, _History()).add(attempt)
        # Shards that failed wait for their time.  Those in flight when a worker died wait apart, to be tried by
        # themselves: then another death costs no other shard an attempt.
        self._later: list[tuple[float, int]] = []
        self._alone: list[tuple[float, int]] = [(0.0, shard) for shard in shards if self.is_suspect(shard)]
        self._apart = frozenset(shard for _, shard in self._alone)

    def is_suspect(self, shard: int) -> bool:
        """Whether a worker died of it, perhaps."""
        history = self._histories.get(shard)
        return history is not None and history.num_deaths > 0

    def take(self, *, alone: bool) -> int | None:
        """The shard to try next; one that may have killed a worker only where it would be `alone`."""
        now = time.monotonic()
        for waiting in (self._alone, self._later) if alone else (self._later,):
            if waiting and waiting[0][0] <= now:
                return heapq.heappop(waiting)[1]
        while self._next < len(self._shards):
            shard = self._shards[self._next]
            self._next += 1
            if shard not in self._apart:
                return shard
        return None

    def assignment(self, shard: int, url: str, *, adopt: bool) -> Assignment:
        """What a worker is told; `adopt` where an earlier driver may have left files of the shard."""
        history = self._histories.get(shard)
        if history is None:
            return Assignment(shard, 1, url, adopt)
        is_last = history.num_counted + 1 >= self._max_attempts
        return Assignment(
            shard,
            history.num_attempts + 1,
            url,
            adopt=True,
            suspects=history.suspects,
            # More samples may be as bad as the first: the last attempt must not end with the next of them.
            contained=is_last and history.num_deaths > 0,
        )

    def add_failed(self, attempt: Attempt, *, retryable: bool) -> bool:
        """Take a failed attempt; return whether there will be another, False when the shard is to be given up."""
        shard = attempt.shard
        history = self._histories.setdefault(shard, _History())
        history.add(attempt)
        if not retryable or history.num_counted >= self._max_attempts or history.num_lost > MAX_LOSSES:
            return False
        # Jitter keeps shards that failed together from coming back together.
        delay = min(BACKOFF_SECONDS * 2 ** max(0, history.num_counted - 1), BACKOFF_MOST_SECONDS)
        delay *= random.uniform(0.5, 1.0)
        heapq.heappush(self._alone if history.num_deaths else self._later, (time.monotonic() + delay, shard))
        return True

    def num_counted(self, shard: int) -> int:
        """Failed attempts that count against the shard."""
        history = self._histories.get(shard)
        return history.num_counted if history else 0

    def forget(self, shard: int) -> None:
        """Drop what is known of a shard that is committed or given up."""
        self._histories.pop(shard, None)
