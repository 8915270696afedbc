"""What failed attempts mean for the next one is the same for the driver that saw them and for one that read of them."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobs.attempts
from jobs.attempts import DECODE_HUNG, MAX_LOSSES, WORKER_DIED, WORKER_HUNG, ShardQueue
from schemas.ledger import Attempt

ERRORS = st.sampled_from([WORKER_DIED, WORKER_HUNG, DECODE_HUNG, "ShardUnreadable"])
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), ERRORS, st.lists(st.sampled_from("abc"), max_size=2), st.booleans()), max_size=20
)


def attempt(shard: int, error: str, keys: list[str], counts: bool = True) -> Attempt:
    return Attempt(
        shard=shard,
        attempt=1,
        stage="worker",
        error=error,
        message="why",
        keys_in_flight=keys,
        counts=counts,
        worker="cpu0",
        at="2026-01-01",
    )


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.attempts, "BACKOFF_SECONDS", 0.0)


def everything(queue: ShardQueue) -> list[int]:
    """The shards in the order in which an idle worker gets them."""
    taken = []
    while (shard := queue.take(alone=True)) is not None:
        taken.append(shard)
    return taken


@settings(deadline=None)
@given(EVENTS)
def test_a_driver_that_takes_over_decides_as_the_one_before(events: list[tuple[int, str, list[str], bool]]) -> None:
    live = ShardQueue(range(4), {}, max_attempts=50)
    records = defaultdict(list)
    everything(live)
    for shard, error, keys, counts in events:
        record = attempt(shard, error, keys, counts)
        assert live.add_failed(record, retryable=True)
        records[shard].append(record)
    later = ShardQueue(range(4), records, max_attempts=50)
    for shard in range(4):
        assert live.assignment(shard, "url", adopt=True) == later.assignment(shard, "url", adopt=True)
        assert live.is_suspect(shard) == later.is_suspect(shard)
    assert sorted(everything(later)) == [0, 1, 2, 3]


def test_a_shard_that_may_kill_workers_waits_for_one_that_is_idle() -> None:
    queue = ShardQueue(range(3), {1: [attempt(1, WORKER_DIED, [])]}, max_attempts=3)
    assert [queue.take(alone=False) for _ in range(3)] == [0, 2, None]
    assert queue.take(alone=True) == 1


def test_a_shard_that_was_suspect_is_handed_out_once_though_it_is_forgotten_when_committed() -> None:
    failed = {shard: [attempt(shard, WORKER_DIED, [])] for shard in (0, 1)}
    queue = ShardQueue(range(4), failed, max_attempts=3)
    taken = []
    while (shard := queue.take(alone=True)) is not None:
        taken.append(shard)
        queue.forget(shard)
    assert taken == [0, 1, 2, 3]


def test_a_shard_that_waits_for_its_turn_holds_no_other_back() -> None:
    queue = ShardQueue(range(3), {}, max_attempts=5)
    assert everything(queue) == [0, 1, 2]
    queue.add_failed(attempt(0, WORKER_DIED, []), retryable=True)
    queue.add_failed(attempt(2, "ShardUnreadable", []), retryable=True)
    assert queue.take(alone=False) == 2, "though the first in line must wait for an idle worker"


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.attempts, "BACKOFF_SECONDS", 1.0)
    now = [100.0]
    monkeypatch.setattr(jobs.attempts.time, "monotonic", lambda: now[0])

    def wait_of(shard: int, queue: ShardQueue) -> float:
        began = now[0]
        while queue.take(alone=True) != shard:
            now[0] += 0.01
        return now[0] - began

    waits = defaultdict(set)
    for shard in range(20):
        queue = ShardQueue([shard], {}, max_attempts=9)
        queue.take(alone=True)
        for number in range(1, 9):
            queue.add_failed(attempt(shard, "ShardUnreadable", []), retryable=True)
            waits[number].add(round(wait_of(shard, queue), 2))
    for number, seconds in waits.items():
        most = min(2 ** (number - 1), jobs.attempts.BACKOFF_MOST_SECONDS)
        assert most / 2 - 0.02 <= min(seconds) < max(seconds) <= most + 0.02


@pytest.mark.parametrize(("counts", "allowed"), [(True, 2), (False, MAX_LOSSES)])
def test_attempts_end_sooner_when_they_count(counts: bool, allowed: int) -> None:
    queue = ShardQueue([0], {}, max_attempts=3)
    outcomes = [queue.add_failed(attempt(0, WORKER_DIED, [], counts), retryable=True) for _ in range(allowed + 1)]
    assert outcomes == [True] * allowed + [False]
