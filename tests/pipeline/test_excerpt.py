"""The beginning of a shard holds whole samples and estimates the rest."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pipeline import excerpt as excerpt_module
from pipeline.byte_stream import open_shard
from pipeline.excerpt import cut_excerpt, stored_size
from pipeline.group import group_samples
from pipeline.tar import read_members
from schemas.errors import ArchiveError, ShardNotFound
from schemas.jobspec import LimitsSpec
from tests.tiny_corpus import photo_members, write_tar

NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("shard") / "photos.tar", photo_members(0, NUM_SAMPLES))


def samples_of(path: Path) -> list[tuple[str, bytes]]:
    found = []
    with open_shard(str(path)) as stream:
        samples = group_samples(read_members(stream))
        while True:
            try:
                sample = next(samples, None)
            except ArchiveError:
                return found
            if sample is None:
                return found
            if sample.failure is None and sample.media is not None:
                found.append((sample.key, sample.media.payload or b""))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_shard_holds_the_first_samples_as_they_are(
    shard: Path, tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(excerpt_module, "PIECE_BYTES", 5000)
    monkeypatch.setattr(excerpt_module, "CHECK_BYTES", 20_000)
    source = shard
    if compressed:
        source = tmp_path / "photos.tar.gz"
        source.write_bytes(gzip.compress(shard.read_bytes()))
    found = cut_excerpt(str(source), tmp_path / "cut.tar", min_samples=10, limits=LimitsSpec())
    assert 10 <= found.num_samples < 20 and not found.is_whole
    cut, whole = samples_of(found.path), samples_of(shard)
    assert len(cut) == found.num_samples
    assert cut == whole[: len(cut)]
    assert found.shard_bytes == source.stat().st_size == stored_size(str(source))
    # The reader takes more of a compressed shard than it has given out.
    assert found.shard_samples == pytest.approx(NUM_SAMPLES, rel=0.7 if compressed else 0.15)


def test_a_shard_that_is_short_or_damaged_is_copied_as_it_is(shard: Path, tmp_path: Path) -> None:
    found = cut_excerpt(str(shard), tmp_path / "whole.tar", min_samples=1000, limits=LimitsSpec())
    assert found.is_whole and found.path.read_bytes() == shard.read_bytes()
    assert found.num_samples == found.shard_samples == NUM_SAMPLES
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(shard.read_bytes()[:40_000])
    found = cut_excerpt(str(damaged), tmp_path / "copy.tar", min_samples=1000, limits=LimitsSpec())
    assert found.is_whole and found.path.read_bytes() == damaged.read_bytes()


def test_a_shard_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ShardNotFound):
        cut_excerpt(str(tmp_path / "none.tar"), tmp_path / "cut.tar", min_samples=1, limits=LimitsSpec())
    assert stored_size(str(tmp_path / "none.tar")) is None
