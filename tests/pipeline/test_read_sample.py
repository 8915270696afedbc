"""Single samples read again are those that streaming gives, at the cost of the samples alone; what changed is said."""

from __future__ import annotations

import gzip
import io
import tarfile
import threading

import pytest

from pipeline.byte_stream import RetryPolicy, open_shard
from pipeline.group import group_samples
from pipeline.queues import Stopped
from pipeline.read_sample import FIRST_BYTES, SamplePlace, read_samples
from pipeline.sample import Member
from pipeline.tar import read_members
from schemas.errors import ArchiveError, ShardNotFound, ShardUnreadable, SourceChanged
from schemas.jobspec import LimitsSpec
from tests.range_server import serve_ranges
from tests.tiny_corpus import jpeg, photo_members, write_tar

LIMITS = LimitsSpec()
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ONCE = RetryPolicy(attempts=1)


def streamed(path):
    """Place and payload of each sample, as the job sees them."""
    with open_shard(str(path)) as stream:
        samples = list(group_samples(read_members(stream, LIMITS), LIMITS))
    places = {sample.position: SamplePlace(sample.key, sample.position, sample.media.offset) for sample in samples}
    return places, {sample.position: sample.media.payload for sample in samples}


def payloads(answers):
    return {number: answer.payload for number, answer in answers if isinstance(answer, Member)}


@pytest.mark.parametrize("format", FORMATS)
def test_every_sample_is_read_again_as_it_was_streamed(tmp_path, format):
    names = ["a/plain", "ключ/éé", "long/" + "x" * 120, "deep/" * 30 + "key", "a/large", "last"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[format]) as archive:
        for number, name in enumerate(names):
            if format == "ustar" and len(name.encode()) > 90:
                continue
            for suffix, payload in ((".txt", b"words"), (".jpg", jpeg(number) + bytes(FIRST_BYTES) * (number == 4))):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
    places, expected = streamed(path)
    assert len(places) >= 4
    assert payloads(read_samples(str(path), places, LIMITS)) == expected


def test_a_compressed_shard_is_streamed(tmp_path):
    path = write_tar(tmp_path / "a.tar", photo_members(0, 5))
    places, expected = streamed(path)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert payloads(read_samples(str(tmp_path / "a.tar.gz"), places, LIMITS)) == expected


def test_only_the_bytes_of_the_samples_are_asked_for(tmp_path):
    members = [(f"{number:04d}.jpg", jpeg(number) + bytes(200_000)) for number in range(40)]
    path = write_tar(tmp_path / "a.tar", members)
    places, expected = streamed(path)
    with serve_ranges(tmp_path) as server:
        found = payloads(read_samples(server.url("a.tar"), {7: places[37]}, LIMITS))
        assert found == {7: expected[37]}
        # One look at the shard's beginning, one ahead, one at the sample; the whole shard has 8 MB.
        assert server.bytes_sent < 4 * FIRST_BYTES < path.stat().st_size / 2


def test_a_shard_that_was_written_again_is_not_taken_for_the_old_one(tmp_path):
    path = write_tar(tmp_path / "a.tar", photo_members(0, 4))
    places, _ = streamed(path)
    write_tar(path, photo_members(50, 4))
    answers = dict(read_samples(str(path), places, LIMITS))
    assert all(isinstance(answer, SourceChanged) for answer in answers.values())
    assert "sample 2 is not '000002' any more" in str(answers[2])
    write_tar(path, photo_members(0, 2))
    answers = dict(read_samples(str(path), places, LIMITS))
    assert [type(answers[number]) for number in range(4)] == [Member, Member, SourceChanged, SourceChanged]
    assert "fewer samples than when its tokens were made" in str(answers[3])


def test_a_shard_that_is_gone_is_said_for_each_sample(tmp_path):
    places = {3: SamplePlace("a", 0, 512), 8: SamplePlace("b", 1, 4096)}
    answers = dict(read_samples(str(tmp_path / "gone.tar"), places, LIMITS, retry=ONCE))
    assert set(answers) == {3, 8}
    assert all(isinstance(answer, ShardNotFound) for answer in answers.values())


def test_samples_beyond_damage_are_said(tmp_path):
    path = write_tar(tmp_path / "a.tar", photo_members(0, 4))
    places, expected = streamed(path)
    data = bytearray(gzip.compress(path.read_bytes(), mtime=0))
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    answers = dict(read_samples(str(tmp_path / "a.tar.gz"), places, LIMITS))
    assert set(answers) == set(places)
    assert isinstance(answers[3], ArchiveError)
    assert answers[0].payload == expected[0]


def test_streaming_stops_at_its_limit(tmp_path):
    members = [(f"{number:04d}.jpg", jpeg(number, 400, 300)) for number in range(60)]
    path = write_tar(tmp_path / "a.tar", members)
    places, _ = streamed(path)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    answers = dict(read_samples(str(tmp_path / "a.tar.gz"), places, LIMITS, max_stream_bytes=50_000))
    assert isinstance(answers[0], Member)
    assert isinstance(answers[59], ShardUnreadable)
    assert "can only be read from its beginning" in str(answers[59])


def test_a_source_that_hangs_is_left_when_told_to(tmp_path):
    write_tar(tmp_path / "a.tar", photo_members(0, 4))
    stop = threading.Event()
    with serve_ranges(tmp_path, delay_seconds=2.0) as server:
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Stopped):
            list(read_samples(server.url("a.tar"), {0: SamplePlace("000000", 0, 512)}, LIMITS, stop=stop))
