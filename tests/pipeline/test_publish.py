from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.begin import resolve
from pipeline.publish import failure_table_name, find_published, publish_shard, token_file_name
from pipeline.rows import Row, ShardRows
from pipeline.sample import Member, Sample
from pipeline.sidecars import Sidecars
from pipeline.storage import Storage, open_storage
from pipeline.storage.local_folder import LocalFolder
from schemas.errors import CaptionNotText, MediaCorrupt, TarTruncated
from schemas.job import Job
from schemas.jobspec import parse_spec
from schemas.ledger import Commit
from schemas.tokenfile import TokenFooter, serialise_token_file

TOKENS_OF_A_FRAME = 8 * 8


@pytest.fixture(scope="module")
def job() -> Job:
    values = {"shards": ["/a.tar"], "out": "/out", "tokenizer": "stub", "preprocess": {"size": 64}}
    return resolve(parse_spec(values, source="test"), gpus=False, storage_options={}).job


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


def finished_shard(*, failures: bool = True, number: int = 1042, rows: int = 3) -> ShardRows:
    """Shard 1042 with a picture, a warning, a clip of three frames, and a sample that failed."""
    shard = ShardRows(shard=number, attempt=1, url="", source_bytes=9000, source_etag="tag")
    shard.num_samples = rows + failures
    for position in range(rows):
        num_frames = 3 if position == 1 else 1
        sidecars = Sidecars(caption=f"picture {position}", label=position, metadata=None, warnings=[])
        row = Row(
            shard=shard,
            key=f"k{position}",
            position=position,
            source_offset=512 * position,
            sidecars=sidecars,
            clip=0,
            view=0,
            num_frames=num_frames,
            width=20,
            height=10,
            crop=(5, 0, 10, 10),
            flipped=False,
            start=None,
            frame_times=None,
            tokens=bytes([position]) * (2 * num_frames * TOKENS_OF_A_FRAME),
        )
        shard.add_rows([row])
    if failures:
        media = Member("bad.jpg", "file", 10, 4096, b"")
        shard.fail_sample(Sample(rows, "bad", {}, media), MediaCorrupt("a bit is wrong."))
        shard.fail_sample(Sample(0, "k0", {}, media), CaptionNotText("it is no text.", member="k0.txt"))
    return shard


def publish(storage: Storage, job: Job, shard: ShardRows | None = None) -> Commit:
    return publish_shard(storage, job, shard or finished_shard(), arithmetic="a1b2c3d4", worker="cpu0")


def adopt(storage: Storage, job: Job, **changes: Any) -> Commit | None:
    asked: dict[str, Any] = {"shard": 1042, "attempt": 2, "source_bytes": 9000, "source_etag": "tag", "worker": "cpu1"}
    return find_published(storage, job, **(asked | changes))


def what_counts(commit: Commit) -> Commit:
    """A commit without who made it, when, and how quickly."""
    return commit.model_copy(update={"attempt": 0, "arithmetic": "", "worker": "", "at": "", "seconds": None})


def test_a_commit_says_what_the_files_hold(storage: Storage, job: Job, tmp_path: Path) -> None:
    commit = publish(storage, job)
    data = (tmp_path / "out" / commit.file).read_bytes()
    assert commit.file == token_file_name(1042, 0, hashlib.sha256(data).hexdigest())
    assert commit.file.startswith("tokens/0001/0001042-")
    assert (commit.sha256, commit.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert commit.failures is not None
    failures = (tmp_path / "out" / commit.failures.file).read_bytes()
    assert commit.failures.file == failure_table_name(1042, 0, hashlib.sha256(failures).hexdigest())
    file = pq.ParquetFile(tmp_path / "out" / commit.file)
    footer = TokenFooter.from_metadata(file.metadata.metadata)
    assert footer.failures_sha256 == commit.failures.sha256 == hashlib.sha256(failures).hexdigest()
    assert (footer.fingerprint, footer.shard, footer.samples, footer.failed) == (job.fingerprint, 1042, 4, 1)
    assert (commit.rows, commit.tokens, commit.samples) == (3, 5 * TOKENS_OF_A_FRAME, 4)
    assert (commit.failed, commit.warnings, commit.partial) == (1, 1, False)
    assert (commit.min_frames, commit.max_frames, commit.min_key, commit.max_key) == (1, 3, "k0", "k2")
    assert commit.row_groups == [3] and len(commit.tokens_offset) == 1
    assert file.read()["key"].to_pylist() == ["k0", "k1", "k2"]


def test_publishing_twice_gives_the_same_names_and_bytes(storage: Storage, job: Job, tmp_path: Path) -> None:
    first = publish(storage, job)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    second = publish(storage, job)
    assert what_counts(first) == what_counts(second)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == files
    assert len(files) == 2


def test_the_failure_table_is_there_before_the_token_file(tmp_path: Path, job: Job) -> None:
    class Recording(LocalFolder):
        names: list[str]

        def publish(self, name: str, data: bytes, **settings: Any) -> None:
            self.names.append(name.partition("/")[0])
            super().publish(name, data, **settings)

    storage = Recording(str(tmp_path / "out"), str(tmp_path / "out"))
    storage.names = []
    publish(storage, job)
    assert storage.names == ["failures", "tokens"]


def test_a_shard_without_failures_has_no_failure_table(storage: Storage, job: Job, tmp_path: Path) -> None:
    commit = publish(storage, job, finished_shard(failures=False))
    assert commit.failures is None and commit.failed == 0
    assert not (tmp_path / "out" / "failures").exists()
    assert adopt(storage, job) is not None


def test_an_empty_shard_has_a_token_file_of_no_rows(storage: Storage, job: Job, tmp_path: Path) -> None:
    commit = publish(storage, job, finished_shard(failures=False, rows=0))
    assert (commit.rows, commit.tokens, commit.samples, commit.row_groups) == (0, 0, 0, [])
    assert (commit.min_key, commit.max_key, commit.min_frames) == (None, None, 0)
    assert pq.read_table(tmp_path / "out" / commit.file).num_rows == 0
    adopted = adopt(storage, job)
    assert adopted is not None and what_counts(adopted) == what_counts(commit)


def test_a_partial_shard_says_so(storage: Storage, job: Job) -> None:
    shard = finished_shard()
    shard.fail_archive(TarTruncated("ends early", offset=8000))
    commit = publish(storage, job, shard)
    assert commit.partial
    assert commit.failed == 1, "the archive itself is no sample"
    adopted = adopt(storage, job)
    assert adopted is not None and adopted.partial


def test_an_orphan_is_adopted_as_if_it_had_just_been_made(storage: Storage, job: Job) -> None:
    made = publish(storage, job)
    adopted = adopt(storage, job)
    assert adopted is not None
    assert what_counts(adopted) == what_counts(made)
    assert (adopted.attempt, adopted.worker, adopted.arithmetic) == (2, "cpu1", "unknown")


@pytest.mark.parametrize(
    "changes",
    [{"source_bytes": 9001}, {"source_etag": "other"}, {"shard": 1043}, {"shard": 42}],
    ids=["source grew", "source changed", "other shard", "same number in another folder"],
)
def test_a_file_of_another_source_or_shard_is_not_adopted(storage: Storage, job: Job, changes: dict[str, Any]) -> None:
    publish(storage, job)
    assert adopt(storage, job, **changes) is None


def test_a_file_of_another_fingerprint_is_not_adopted(storage: Storage, job: Job) -> None:
    publish(storage, job)
    assert adopt(storage, job.model_copy(update={"fingerprint": "0" * 64})) is None


@pytest.mark.parametrize("place", [4, -20, 300])
def test_a_file_with_a_wrong_byte_is_not_adopted(storage: Storage, job: Job, tmp_path: Path, place: int) -> None:
    path = tmp_path / "out" / publish(storage, job).file
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert adopt(storage, job) is None


def test_a_file_whose_failure_table_is_missing_or_damaged_is_not_adopted(
    storage: Storage, job: Job, tmp_path: Path
) -> None:
    commit = publish(storage, job)
    assert commit.failures is not None
    table = tmp_path / "out" / commit.failures.file
    whole = table.read_bytes()
    table.write_bytes(whole[:-1])
    assert adopt(storage, job) is None
    table.unlink()
    assert adopt(storage, job) is None
    table.write_bytes(whole)
    assert adopt(storage, job) is not None


def rewritten(storage: Storage, commit: Commit, edit: Callable[[pa.Table, TokenFooter], tuple[Any, Any]]) -> None:
    """Replace a token file by an edited one whose name fits its bytes."""
    file = pq.ParquetFile(Path(storage.url_of(commit.file)))
    table, footer = edit(file.read(), TokenFooter.from_metadata(file.metadata.metadata))
    data = serialise_token_file(table, footer).data
    storage.delete(commit.file)
    storage.publish(token_file_name(1042, 0, hashlib.sha256(data).hexdigest()), data)


def test_a_file_whose_rows_do_not_add_up_is_not_adopted(storage: Storage, job: Job) -> None:
    rewritten(storage, publish(storage, job), lambda table, footer: (table.slice(0, 2), footer))
    assert adopt(storage, job) is None


def test_a_file_of_a_later_part_is_not_adopted(storage: Storage, job: Job) -> None:
    rewritten(storage, publish(storage, job), lambda table, footer: (table, dataclasses.replace(footer, part=1)))
    assert adopt(storage, job) is None


def test_a_later_part_has_a_name_of_its_own_and_is_adopted_for_that_part_alone(storage: Storage, job: Job) -> None:
    shard = finished_shard(rows=1)
    shard.part, shard.num_samples = 7, 4
    commit = publish(storage, job, shard)
    assert commit.file.startswith("tokens/0001/0001042.r7-")
    assert commit.failures is not None and commit.failures.file.startswith("failures/0001/0001042.r7-")
    assert adopt(storage, job) is None
    assert adopt(storage, job, part=70) is None
    adopted = adopt(storage, job, part=7)
    assert adopted is not None and what_counts(adopted) == what_counts(commit)


def test_strangers_with_fitting_names_are_passed_over(storage: Storage, job: Job) -> None:
    for data in (b"", b"no Parquet", b"PAR1" * 10):
        storage.publish(token_file_name(1042, 0, hashlib.sha256(data).hexdigest()), data)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["a"]}), sink)
    stranger = sink.getvalue().to_pybytes()
    storage.publish(token_file_name(1042, 0, hashlib.sha256(stranger).hexdigest()), stranger)
    assert adopt(storage, job) is None
    made = publish(storage, job)
    adopted = adopt(storage, job)
    assert adopted is not None and adopted.file == made.file


def test_of_several_files_the_one_of_this_source_is_adopted(storage: Storage, job: Job) -> None:
    for source_bytes in (8000, 9000, 10_000):
        shard = finished_shard()
        shard.source_bytes = source_bytes
        publish(storage, job, shard)
    adopted = adopt(storage, job)
    assert adopted is not None and adopted.source.bytes == 9000
