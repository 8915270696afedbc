"""The rules of the ledger hold however its segments were merged, and while another process merges them."""

from __future__ import annotations

import hashlib
import io
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset_files import (
    CommittedParts,
    StoredFile,
    iter_commits,
    list_generations,
    plan_name,
    read_job,
    read_ledger,
    read_manifest,
    read_manifest_summary,
    read_plan,
    select_segments,
    serialise_plan,
)
from pipeline.parquet import read_parquet
from pipeline.storage import Storage, open_storage
from pipeline.storage.local_folder import LocalFolder
from schemas.errors import BsqError
from schemas.ledger import Arithmetic, Attempt, Commit, GivenUp, SourceRecord, Summary, segment_name
from schemas.manifest import ManifestSummary, manifest_table, serialise_manifest


def commit(shard: int, part: int = 0, *, rows: int = 1) -> Commit:
    return Commit(
        shard=shard,
        part=part,
        attempt=1,
        file=f"tokens/0000/{shard:07d}-{rows:08x}.parquet",
        bytes=10,
        sha256="a" * 64,
        rows=rows,
        tokens=16 * rows,
        samples=rows,
        failed=0,
        warnings=0,
        partial=False,
        min_frames=1,
        max_frames=1,
        min_key="a",
        max_key="b",
        row_groups=[rows],
        tokens_offset=[4],
        source=SourceRecord(bytes=1),
        arithmetic="a",
        worker="w",
        at="now",
    )


def attempt(shard: int, *, counts: bool = True) -> Attempt:
    return Attempt(shard=shard, attempt=1, stage="open", error="E", message="m", counts=counts, worker="w", at="now")


def given_up(shard: int) -> GivenUp:
    return GivenUp(shard=shard, attempts=3, error="E", message="m", at="now")


Record = Commit | Attempt | GivenUp | Arithmetic | Summary


def publish(storage: Storage, first: int, records: list[Record], last: int | None = None) -> None:
    data = "".join(record.to_line() + "\n" for record in records).encode()
    storage.publish(f"ledger/0000/{segment_name(first, last)}", data)


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path / "out"))


# --- the rules


def test_the_first_commit_of_a_shard_counts(storage):
    publish(storage, 0, [commit(1, rows=5), commit(1, rows=7)])
    publish(storage, 1, [commit(1, rows=9), commit(1, part=1, rows=2)])
    state = read_ledger(storage, 0)
    assert {key: record.rows for key, record in state.commits.items()} == {(1, 0): 5, (1, 1): 2}
    assert [record.rows for record in state.ignored] == [7, 9]
    assert (state.totals.rows, state.totals.commits) == (7, 2)
    assert [record.rows for record in iter_commits(storage, 0)] == [5, 2]


@pytest.mark.parametrize("order", list(itertools.permutations([commit(1), given_up(1), attempt(1)])))
def test_a_commit_beats_a_failure_in_any_order(storage, order):
    publish(storage, 0, list(order))
    state = read_ledger(storage, 0)
    assert (1, 0) in state.committed
    assert state.given_up == {}


def test_only_attempts_that_are_the_shards_fault_count(storage):
    publish(storage, 0, [attempt(3), attempt(3, counts=False), attempt(4, counts=False), attempt(3), given_up(3)])
    state = read_ledger(storage, 0)
    assert [record.counts for record in state.failed_attempts[3]] == [True, False, True]
    assert len(state.failed_attempts[4]) == 1
    assert set(state.given_up) == {3}


def test_an_arithmetic_is_known_by_its_id(storage):
    publish(storage, 0, [Arithmetic(id="a1", value={"device": "cpu"}), commit(0)])
    assert read_ledger(storage, 0).arithmetic == {"a1": {"device": "cpu"}}


def test_no_ledger_is_an_empty_state(storage):
    state = read_ledger(storage, 0)
    assert (state.next_segment, state.segments, len(state.committed)) == (0, [], 0)


def test_without_commit_records_the_sums_and_the_shards_are_the_same(storage):
    publish(storage, 0, [commit(5, rows=3), commit(9, rows=4), commit(5, rows=8)])
    full, slim = read_ledger(storage, 0), read_ledger(storage, 0, keep_commits=False)
    assert slim.commits == {}
    assert slim.totals == full.totals
    assert all(((shard, 0) in slim.committed) == ((shard, 0) in full.commits) for shard in range(12))


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3)), max_size=60))
def test_committed_parts_are_a_set(items: list[tuple[int, int]]):
    ours, theirs = CommittedParts(), set()
    for shard, part in items:
        assert ours.add(shard, part) == ((shard, part) not in theirs)
        theirs.add((shard, part))
    assert len(ours) == len(theirs)
    assert all((item in ours) == (item in theirs) for item in [*items, (7, 0), (4999, 2), (10**6, 0), (0, 9)])


# --- segments


def test_a_merged_segment_wins_over_its_parts(storage):
    publish(storage, 0, [commit(0)])
    publish(storage, 1, [commit(1), attempt(9)])
    publish(storage, 2, [commit(2)])
    publish(storage, 0, [Summary(counts={"commit": 2, "attempt": 1}), commit(0), commit(1), attempt(9)], last=1)
    state = read_ledger(storage, 0)
    assert state.segments == ["000000000-000000001.jsonl", "000000002.jsonl"]
    assert state.next_segment == 3
    assert sorted(state.commits) == [(0, 0), (1, 0), (2, 0)]
    assert {shard: len(attempts) for shard, attempts in state.failed_attempts.items()} == {9: 1}


@given(st.data())
@settings(deadline=None)
def test_segments_merged_in_levels_are_read_once_each(data: st.DataObject):
    fan_in = data.draw(st.integers(2, 4))
    count = data.draw(st.integers(0, 70))
    names = {segment_name(number) for number in range(count)}
    width = 1
    while (width := width * fan_in) <= count:
        for first in range(0, count - width + 1, width):
            # A merge publishes first and deletes its parts after; it may be anywhere in between.
            if data.draw(st.booleans()):
                names.add(segment_name(first, first + width - 1))
                parts = {segment_name(number) for number in range(first, first + width)}
                names -= set(data.draw(st.lists(st.sampled_from(sorted(parts)), unique=True)))
    shuffled = sorted(names, key=lambda name: random.Random(name).random())
    covered = []
    for name in select_segments(shuffled):
        first, _, last = name.removesuffix(".jsonl").partition("-")
        covered += range(int(first), int(last or first) + 1)
    assert covered == list(range(count))


def test_other_files_in_the_folder_are_passed_over():
    assert select_segments(["000000000.jsonl", ".000000001.jsonl.7.tmp", "notes.txt"]) == ["000000000.jsonl"]


class MergingStorage(LocalFolder):
    """Another process merges segments 0 to 2 after this one has listed them and read the first."""

    merged = False

    def read_bytes(self, name: str) -> bytes:
        if name.endswith("000000001.jsonl") and not self.merged:
            self.merged = True
            parts = [f"ledger/0000/{segment_name(number)}" for number in range(3)]
            self.publish(f"ledger/0000/{segment_name(0, 2)}", b"".join(map(super().read_bytes, parts)))
            for part in parts:
                self.delete(part)
        return super().read_bytes(name)


@pytest.mark.parametrize("read", ["ledger", "commits"])
def test_a_segment_that_vanishes_was_merged_and_nothing_counts_twice(tmp_path, read):
    storage = MergingStorage(str(tmp_path / "out"), str(tmp_path / "out"))
    for number in range(3):
        publish(storage, number, [commit(number), attempt(7)])
    if read == "commits":
        assert [record.shard for record in iter_commits(storage, 0)] == [0, 1, 2]
    else:
        state = read_ledger(storage, 0)
        assert sorted(state.commits) == [(0, 0), (1, 0), (2, 0)]
        assert state.ignored == []
        assert {shard: len(attempts) for shard, attempts in state.failed_attempts.items()} == {7: 3}
        assert state.next_segment == 3


def test_a_lost_segment_is_an_error_not_a_shorter_dataset(storage):
    publish(storage, 0, [commit(0)])
    publish(storage, 2, [commit(2)])
    with pytest.raises(BsqError, match="a segment of ledger/0000 is missing"):
        read_ledger(storage, 0)
    with pytest.raises(BsqError, match="a segment of ledger/0000 is missing"):
        list(iter_commits(storage, 0))


# --- plan, manifest, job


def test_a_plan_reads_back(storage):
    storage.publish(plan_name(3), serialise_plan(["a.tar", "b.tar"], [10, 11]))
    assert read_plan(storage, 3).to_pydict() == {"shard": [10, 11], "url": ["a.tar", "b.tar"]}


def test_a_damaged_plan_is_named(storage):
    storage.publish(plan_name(0), b"PAR1")
    with pytest.raises(BsqError, match=r"plan/0000\.parquet: damaged"):
        read_plan(storage, 0)
    with pytest.raises(BsqError, match=r"plan/0001\.parquet: there is no such file"):
        read_plan(storage, 1)


def publish_manifest(storage: Storage, generation: int) -> ManifestSummary:
    data = serialise_manifest(manifest_table([(commit(0), "a.tar", generation)]))
    summary = ManifestSummary(
        fingerprint="f",
        generation=generation,
        files=1,
        rows=1,
        tokens=16,
        samples=1,
        failed=0,
        warnings=0,
        failed_shards=0,
        first_failed_shards=[],
        partial_shards=0,
        bytes=10,
        bits=18,
        group_size=9,
        grid=(4, 4),
        views=1,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        complete=True,
        created_by="bsqtok",
    )
    storage.publish(f"manifest/{generation:04d}.parquet", data)
    storage.publish(f"manifest/{generation:04d}.json", summary.model_dump_json().encode())
    return summary


def test_the_highest_generation_is_read_unless_another_is_asked_for(storage):
    assert read_manifest(storage) is None
    for generation in (0, 1):
        publish_manifest(storage, generation)
    # A table without its summary is a generation that is not finished.
    storage.publish("manifest/0002.parquet", b"")
    assert list_generations(storage) == [0, 1]
    newest, oldest = read_manifest(storage), read_manifest(storage, 0)
    assert newest is not None and oldest is not None
    assert newest.summary.generation == 1
    assert oldest.table["generation"].to_pylist() == [0]
    with pytest.raises(BsqError, match="generation 2 is not finished"):
        read_manifest(storage, 2)
    with pytest.raises(FileNotFoundError):
        read_manifest_summary(storage, 2)


def test_a_manifest_table_of_another_summary_is_refused(storage):
    publish_manifest(storage, 0)
    storage.publish("manifest/0000.parquet", serialise_manifest(manifest_table([])))
    with pytest.raises(BsqError, match="its SHA-256 differs"):
        read_manifest(storage)


@pytest.mark.parametrize(
    ("content", "words"), [(b"{", "no job of bsqtok"), (b"{}", "no job of bsqtok"), (b"\xff", "no job of bsqtok")]
)
def test_a_damaged_job_is_an_error(storage, content, words):
    assert read_job(storage) is None
    storage.publish("job.json", content)
    with pytest.raises(BsqError, match=words):
        read_job(storage)


# --- reading parts of a file


def test_a_stored_file_is_read_by_ranges(storage):
    data = serialise_plan([f"{number}.tar" for number in range(1000)])
    storage.publish("plan/0000.parquet", data)
    file = StoredFile(storage, "plan/0000.parquet")
    assert read_parquet(file).num_rows == 1000
    plain, ours = io.BytesIO(data), StoredFile(storage, "plan/0000.parquet")
    for offset, whence, length in [(0, 0, 4), (-8, 2, 100), (10, 0, 0), (5, 1, 7), (len(data) + 5, 0, 3), (0, 0, -1)]:
        assert ours.seek(offset, whence) == plain.seek(offset, whence)
        assert ours.read(length) == plain.read(length)
    with pytest.raises(FileNotFoundError):
        StoredFile(storage, "plan/0001.parquet")
