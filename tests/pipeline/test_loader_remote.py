"""Datasets in an object store, and the bounded local cache that processes share."""

import fcntl
import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from pipeline import TokenDataset, TokenLoader
from pipeline.file_cache import FOLDER, FileCache
from pipeline.storage import open_storage
from schemas.errors import BsqError, SpecError
from tests.token_datasets import TokenDatasetWriter


@pytest.fixture
def remote(object_store):
    """Five files with clips of 1 to 3 frames in an object store."""
    return TokenDatasetWriter(
        url=f"{object_store.url}/tokens",
        storage_options=object_store.storage_options,
        clips_of_file=[30, 20, 0, 25, 25],
        frames=lambda file, clip: 1 + (file + clip) % 3,
        row_group_rows=8,
    ).write()


def open_remote(remote, **options):
    return TokenDataset(remote.url, storage_options=remote.storage_options, **options)


def rows_of(loader):
    return [(batch["key"], batch["index"].tolist()) for batch in loader]


def test_an_object_store_gives_the_same_batches_as_a_disk(remote, tmp_path):
    local = TokenDatasetWriter(
        url=str(tmp_path / "local"), clips_of_file=remote.clips_of_file, frames=remote.frames, row_group_rows=8
    ).write()
    filters = [("frames", "<", 3)]
    expected = rows_of(TokenLoader(TokenDataset(local.url, ["key"], filters=filters), 8, window=24, tail="pad"))
    for options in ({}, {"cache_dir": tmp_path / "cache"}, {"cache_dir": tmp_path / "cache"}):
        dataset = open_remote(remote, columns=["key"], filters=filters, **options)
        assert rows_of(TokenLoader(dataset, 8, window=24, tail="pad")) == expected
    assert len(list((tmp_path / "cache" / FOLDER).iterdir())) == 4  # the empty file was never opened
    assert open_remote(remote).find("0003/000007") == TokenDataset(local.url).find("0003/000007")


def test_random_access_reads_single_rows(object_store):
    writer = TokenDatasetWriter(
        url=f"{object_store.url}/tokens", storage_options=object_store.storage_options, clips_of_file=[40, 40]
    ).write()
    dataset = open_remote(writer)
    for sample, number in zip(dataset.__getitems__([70, 3, -1]), [70, 3, 79], strict=True):
        assert (sample["index"].numpy() == writer.indices(writer.rows[number])).all()


@pytest.mark.parametrize(
    ("method", "cached_files"), [("fork", 0), ("fork", 2), pytest.param("spawn", 2, marks=pytest.mark.long)]
)
def test_workers_of_a_dataloader_read_an_object_store(remote, tmp_path, method, cached_files):
    """Also when they and their parent share a cache that has no room for all files."""
    options = {"cache_dir": tmp_path, "cache_bytes": cached_files * max(commit.bytes for commit in remote.commits)}
    dataset = open_remote(remote, columns=["key"], **options if cached_files else {})
    dataset[0]  # a connection that the workers must not use
    loader = TokenLoader(dataset, 8, window=24)
    expected = rows_of(loader)
    loader.set_epoch(0)
    found = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert rows_of(found) == expected
    cache = FileCache(tmp_path, options["cache_bytes"] or 1)
    assert bool(cached_files) == bool(cache.num_bytes()) and cache.num_bytes() <= options["cache_bytes"]


def test_a_file_that_is_gone_or_altered_in_the_store(remote, tmp_path):
    name = remote.commits[1].file
    data = remote.storage.read_bytes(name)
    for changed, message in (
        (data + b"1", r"it does not have the [\d,]+ bytes"),
        (data[:-1], r"it does not have the [\d,]+ bytes"),
        (data[:-1] + b"x", "it does not end as Parquet does"),
    ):
        remote.storage.publish(name, changed)
        with pytest.raises(BsqError, match=rf"0000001-.*gone or altered: {message}"):
            list(TokenLoader(open_remote(remote), 8, window=24))
        with pytest.raises(BsqError, match=r"0000001-.*gone or altered: "):
            list(TokenLoader(open_remote(remote, check="sha256"), 8, window=24))
        if len(changed) <= len(data):  # a cache takes as many bytes as are recorded, and these are right
            with pytest.raises(BsqError, match=r"0000001-.*gone or altered: its SHA-256 .* fetched twice"):
                list(TokenLoader(open_remote(remote, cache_dir=tmp_path), 8, window=24))
    remote.storage.delete(name)
    with pytest.raises(BsqError, match=r"0000001-.*gone or altered: it is not there"):
        list(TokenLoader(open_remote(remote), 8, window=24))
    with pytest.raises(BsqError, match=r"0000001-.*gone or altered: it is not there"):
        list(TokenLoader(open_remote(remote, cache_dir=tmp_path / "other"), 8, window=24))


def test_credentials_stay_out_of_messages(remote):
    remote.storage.delete(remote.commits[0].file)
    with pytest.raises(BsqError) as caught:
        list(open_remote(remote))
    assert remote.storage_options["secret"] not in str(caught.value)


class TestCache:
    """A folder of copies: bounded, shared, and owner of nothing but its own files."""

    @pytest.fixture
    def store(self, tmp_path):
        """Ten files of 1,000 bytes."""
        storage = open_storage(str(tmp_path / "store"))
        self.files = {}
        for number in range(10):
            data = bytes([number]) * 1000
            storage.publish(f"file-{number}", data)
            self.files[f"file-{number}"] = hashlib.sha256(data).hexdigest()
        return storage

    def fetch(self, cache, store, number):
        name = f"file-{number}"
        return cache.fetch(store, name, 1000, self.files[name])

    def names(self, cache_dir):
        return {path.name for path in (cache_dir / FOLDER).iterdir()}

    def test_the_bound_is_hard_and_the_longest_unused_go(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 3500)
        for number in (0, 1, 2, 0, 3, 4):
            with self.fetch(cache, store, number) as file:
                assert file.read() == bytes([number]) * 1000
            assert cache.num_bytes() <= 3500
            time.sleep(0.01)
        assert self.names(tmp_path / "cache") == {self.files[f"file-{number}"] for number in (0, 3, 4)}

    def test_what_is_read_is_not_deleted(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 2500)
        kept = [self.fetch(cache, store, number) for number in (0, 1)]
        assert self.fetch(cache, store, 2) is None
        assert [file.read()[0] for file in kept] == [0, 1]
        kept[0].close()
        with self.fetch(cache, store, 2) as file:
            assert file.read()[0] == 2
        assert self.fetch(FileCache(tmp_path / "cache", 999), store, 3) is None

    def test_other_files_in_the_folder_are_left_alone(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 1500)
        self.fetch(cache, store, 0).close()
        ours = tmp_path / "cache" / FOLDER / "notes.txt"
        ours.write_bytes(b"x" * 5000)
        (tmp_path / "cache" / "data.parquet").write_bytes(b"x" * 5000)
        self.fetch(cache, store, 1).close()
        assert ours.exists() and (tmp_path / "cache" / "data.parquet").exists()
        assert self.names(tmp_path / "cache") == {"notes.txt", self.files["file-1"]}

    def test_a_copy_that_was_cut_is_fetched_again(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 5000)
        self.fetch(cache, store, 0).close()
        os.truncate(tmp_path / "cache" / FOLDER / self.files["file-0"], 10)
        with self.fetch(cache, store, 0) as file:
            assert len(file.read()) == 1000

    def test_a_part_of_a_dead_process_is_taken_over(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 2500)
        self.fetch(cache, store, 1).close()
        part = tmp_path / "cache" / FOLDER / (self.files["file-0"] + ".part")
        part.write_bytes(b"y" * 1000)
        dead = tmp_path / "cache" / FOLDER / ("ab" * 32 + ".part")
        dead.write_bytes(b"z" * 1500)
        os.utime(dead, (0, 0))
        with self.fetch(cache, store, 0) as file:
            assert file.read() == b"\0" * 1000
        assert not part.exists() and not dead.exists() and cache.num_bytes() <= 2500

    def test_a_process_that_is_killed_while_it_fetches_hinders_nobody(self, store, tmp_path):
        """It stands still in the middle: what it reads is a pipe that nobody writes to."""
        source = store.local_path("file-0")
        data = source.read_bytes()
        source.unlink()
        os.mkfifo(source)
        cache = FileCache(tmp_path / "cache", 1500)
        fetching = multiprocessing.get_context("fork").Process(target=self.fetch, args=(cache, store, 0))
        fetching.start()
        part = tmp_path / "cache" / FOLDER / (self.files["file-0"] + ".part")
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == 1000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert self.fetch(FileCache(tmp_path / "cache", 1500, patience_seconds=0.1), store, 1) is None
        fetching.kill()
        fetching.join()
        assert part.stat().st_size == 1000
        source.unlink()
        source.write_bytes(data)
        for number in (1, 0):
            with self.fetch(cache, store, number) as file:
                assert file.read() == bytes([number]) * 1000
            assert self.names(tmp_path / "cache") == {self.files[f"file-{number}"]}

    def test_a_part_that_another_process_keeps_is_not_waited_for_without_end(self, store, tmp_path):
        cache = FileCache(tmp_path / "cache", 5000, patience_seconds=0.1)
        (tmp_path / "cache" / FOLDER).mkdir(parents=True)
        part = tmp_path / "cache" / FOLDER / (self.files["file-0"] + ".part")
        with part.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert self.fetch(cache, store, 0) is None
        with self.fetch(cache, store, 0) as file:
            assert len(file.read()) == 1000

    def test_processes_share_it(self, store, tmp_path):
        """Four processes over a cache that holds three of ten files."""
        context = multiprocessing.get_context("fork")
        with context.Pool(4) as pool:
            jobs = [(str(tmp_path / "cache"), str(tmp_path / "store"), self.files, seed) for seed in range(4)]
            most = pool.map(read_all, jobs)
        assert max(most) <= 3500
        assert not [name for name in self.names(tmp_path / "cache") if name.endswith(".part")]

    def test_a_folder_that_cannot_be_used(self, store, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(
            BsqError, match=r"the cache cannot be used \(Not a directory\)\. .*choose another cache_dir"
        ):
            self.fetch(FileCache(tmp_path / "cache", 5000), store, 0)
        with pytest.raises(SpecError, match="cache_bytes is 0"):
            FileCache(tmp_path, 0)


def read_all(job):
    cache_dir, store_url, files, seed = job
    cache, store = FileCache(Path(cache_dir), 3500), open_storage(store_url)
    most = 0
    for turn in range(60):
        number = (turn * (2 * seed + 3) + seed) % 10
        name = f"file-{number}"
        copy = cache.fetch(store, name, 1000, files[name])
        if copy is not None:
            with copy:
                assert copy.read() == bytes([number]) * 1000
        most = max(most, cache.num_bytes())
    return most
