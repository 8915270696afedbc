from __future__ import annotations

from pathlib import Path

import pytest

import jobs.commit
from jobs.commit import SEGMENT_RECORDS, LedgerWriter
from pipeline.dataset_files import read_ledger
from pipeline.storage import Storage, open_storage
from schemas.errors import LeaseLost
from schemas.ledger import GivenUp

FOLDER = "ledger/0000"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the writer; its only item may be set."""
    now = [1000.0]
    monkeypatch.setattr(jobs.commit.time, "monotonic", lambda: now[0])
    return now


def writer(storage: Storage, next_segment: int = 0) -> LedgerWriter:
    return LedgerWriter(storage, 0, next_segment, set())


def record(shard: int) -> GivenUp:
    return GivenUp(shard=shard, attempts=3, error="ShardUnreadable", message="no answer", at="2026-01-01")


def shards_of(storage: Storage) -> list[int]:
    return sorted(read_ledger(storage, 0).given_up)


def test_a_segment_is_published_when_enough_records_wait(storage: Storage, clock: list[float]) -> None:
    ledger = writer(storage)
    for shard in range(SEGMENT_RECORDS - 1):
        ledger.add(record(shard))
        ledger.flush_if_due()
    assert storage.list(FOLDER) == []
    ledger.add(record(SEGMENT_RECORDS - 1))
    ledger.flush_if_due()
    assert storage.list(FOLDER) == ["000000000.jsonl"]
    assert shards_of(storage) == list(range(256))


def test_a_segment_is_published_five_seconds_after_its_first_record(storage: Storage, clock: list[float]) -> None:
    ledger = writer(storage)
    ledger.add(record(0))
    clock[0] += 3
    ledger.add(record(1))
    clock[0] += 1.9
    ledger.flush_if_due()
    assert storage.list(FOLDER) == []
    clock[0] += 0.2
    ledger.flush_if_due()
    assert shards_of(storage) == [0, 1]
    ledger.add(record(2))
    clock[0] += 4.9
    ledger.flush_if_due()
    assert storage.list(FOLDER) == ["000000000.jsonl"], "the five seconds begin anew"
    clock[0] += 0.2
    ledger.flush_if_due()
    assert storage.list(FOLDER) == ["000000000.jsonl", "000000001.jsonl"]


def test_nothing_is_published_when_nothing_waits(storage: Storage, clock: list[float]) -> None:
    ledger = writer(storage)
    clock[0] += 100
    ledger.flush_if_due()
    ledger.flush()
    assert storage.list(FOLDER) == []


def test_a_number_that_is_taken_means_that_the_job_is_lost(storage: Storage) -> None:
    zombie, winner = writer(storage), writer(storage)
    winner.add(record(1))
    winner.flush()
    before = storage.read_bytes(f"{FOLDER}/000000000.jsonl")
    zombie.add(record(2))
    with pytest.raises(LeaseLost, match="segment 0 of the ledger was written by another driver"):
        zombie.flush()
    assert storage.read_bytes(f"{FOLDER}/000000000.jsonl") == before
    with pytest.raises(LeaseLost):
        zombie.flush()
    assert storage.list(FOLDER) == ["000000000.jsonl"]


def test_a_writer_goes_on_at_the_number_that_the_ledger_names(storage: Storage) -> None:
    first = writer(storage)
    for shard in range(3):
        first.add(record(shard))
        first.flush()
    second = writer(storage, read_ledger(storage, 0).next_segment)
    second.add(record(9))
    second.flush()
    assert storage.list(FOLDER)[-1] == "000000003.jsonl"
    assert shards_of(storage) == [0, 1, 2, 9]


def test_an_arithmetic_is_recorded_once(storage: Storage) -> None:
    ledger = LedgerWriter(storage, 0, 0, {"known"})
    for identifier in ("known", "new", "new", "unknown"):
        ledger.add_arithmetic(identifier, {} if identifier == "unknown" else {"device": identifier})
    ledger.flush()
    assert read_ledger(storage, 0).arithmetic == {"new": {"device": "new"}}
    assert storage.read_bytes(f"{FOLDER}/000000000.jsonl").count(b"\n") == 1


def test_segments_are_merged_by_levels_and_read_the_same(storage: Storage) -> None:
    ledger = writer(storage)
    for shard in range(2 * jobs.commit.MERGED_SEGMENTS + 3):
        ledger.add(record(shard))
        ledger.flush()
    names = storage.list(FOLDER)
    assert names[:2] == ["000000000-000000063.jsonl", "000000064-000000127.jsonl"]
    assert len(names) == 2 + 3
    assert shards_of(storage) == list(range(131))
    assert read_ledger(storage, 0).next_segment == 131


def test_a_zombie_is_fenced_although_its_number_was_merged_away(storage: Storage) -> None:
    winner = writer(storage)
    winner.add(record(0))
    winner.flush()
    zombie = writer(storage, 1)
    for shard in range(1, jobs.commit.MERGED_SEGMENTS):
        winner.add(record(shard))
        winner.flush()
    assert storage.list(FOLDER) == ["000000000-000000063.jsonl"]
    zombie.add(record(999))
    with pytest.raises(LeaseLost):
        zombie.flush()
    assert storage.list(FOLDER) == ["000000000-000000063.jsonl"]
    assert shards_of(storage) == list(range(64))


@pytest.mark.parametrize("merged_bytes", [64 << 20, 4000])
def test_a_ledger_has_few_segments_however_many_were_written(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, merged_bytes: int
) -> None:
    # Levels of 4, so that few segments have as many levels as a million have of 64.
    monkeypatch.setattr(jobs.commit, "MERGED_SEGMENTS", 4)
    monkeypatch.setattr(jobs.commit, "MERGED_BYTES", merged_bytes)
    ledger = writer(storage)
    num_bytes, num_levels = 0, 1
    for shard in range(100):
        ledger.add(record(shard))
        num_bytes += len(record(shard).to_line()) + 1
        ledger.flush()
        num_levels += (shard + 1) == 4**num_levels
        # Two neighbours that were not merged have more than a merged segment may have.
        assert len(storage.list(FOLDER)) <= 3 * num_levels + 2 * num_bytes / merged_bytes + 1
    assert shards_of(storage) == list(range(100))
    state = read_ledger(storage, 0)
    assert state.next_segment == 100
    sizes = [storage.size(f"{FOLDER}/{name}") for name in state.segments]
    assert max(sizes) <= merged_bytes + 100, "with the line of its summary"
    assert storage.read_bytes(f"{FOLDER}/{state.segments[0]}").count(b'"summary"') == 1


def test_parts_that_a_dead_driver_left_beside_their_merged_segment_are_removed(storage: Storage) -> None:
    first = writer(storage)
    for shard in range(jobs.commit.MERGED_SEGMENTS):
        first.add(record(shard))
        first.flush()
    (merged,) = storage.list(FOLDER)
    # As if it had died after it published the merged segment, and before it deleted these.
    lines = storage.read_bytes(f"{FOLDER}/{merged}").splitlines(keepends=True)[1:]
    for number in (3, 40):
        storage.publish(f"{FOLDER}/{number:09d}.jsonl", lines[number])
    second = writer(storage, read_ledger(storage, 0).next_segment)
    for shard in range(jobs.commit.MERGED_SEGMENTS, 2 * jobs.commit.MERGED_SEGMENTS):
        second.add(record(shard))
        second.flush()
    assert storage.list(FOLDER) == ["000000000-000000063.jsonl", "000000064-000000127.jsonl"]
    assert shards_of(storage) == list(range(128))
