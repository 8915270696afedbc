"""What is measured comes in order, once, and the same for any number of threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.decoded_clips import ClipReader
from pipeline.training_batches import Complaints
from schemas.jobspec import ClipSpec, PreprocessSpec
from tests.tiny_corpus import jpeg, mp4, photo_members, write_tar


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    mixed = [*photo_members(0, 3), ("clip-a.mp4", mp4(1, 11)), ("clip-b.mp4", mp4(2, 3)), *photo_members(10, 2)]
    bad = [*photo_members(20, 1), ("cut.jpg", jpeg(5)[:300]), ("words.txt", b"alone"), ("odd.xyz", b"?"),
           *photo_members(30, 1)]  # fmt: skip
    urls = [write_tar(folder / "mixed.tar", mixed), write_tar(folder / "bad.tar", bad)]
    return ClipReader(
        urls=[str(url) for url in urls],
        preprocess=PreprocessSpec(size=16),
        clips=ClipSpec(fps="source", clip_frames=4),
        clips_per_video=2,
        num_threads=1,
    )


def read(reader, **settings):
    told = []
    complaints = Complaints(told.append)
    return list(reader.read(complaints, **settings)), told


def names(clips):
    return [(clip.shard, clip.key, clip.clip, len(clip.frames_TCHW)) for clip in clips]


def test_pictures_and_clips_come_in_order_and_what_is_bad_is_told(reader):
    clips, told = read(reader)
    assert names(clips) == [
        (0, "000000", 0, 1),
        (0, "000001", 0, 1),
        (0, "000002", 0, 1),
        (0, "clip-a", 0, 4),
        (0, "clip-a", 1, 4),
        (0, "clip-b", 0, 3),
        (0, "000010", 0, 1),
        (0, "000011", 0, 1),
        (1, "000020", 0, 1),
        (1, "000030", 0, 1),
    ]
    assert [clip.kind for clip in clips[2:5]] == ["image", "video", "video"]
    assert all(clip.frames_TCHW.dtype == torch.uint8 and clip.frames_TCHW.shape[1:] == (3, 16, 16) for clip in clips)
    shares = [clip.share_read for clip in clips]
    assert shares == sorted(shares) and 0 < shares[0] <= shares[-1] <= 1
    assert len(told) == 3 and all("bad.tar: " in line for line in told)
    assert any("cut" in line for line in told) and any("words" in line for line in told)


def test_threads_change_nothing(reader):
    one, told_one = read(reader)
    many, told_many = read(dataclasses.replace(reader, num_threads=5))
    assert names(one) == names(many) and sorted(told_one) == sorted(told_many)
    assert all(torch.equal(a.frames_TCHW, b.frames_TCHW) for a, b in zip(one, many, strict=True))


def test_a_limit_counts_pictures_and_videos_apart(reader):
    clips, _ = read(dataclasses.replace(reader, most=1))
    assert names(clips) == [(0, "000000", 0, 1), (0, "clip-a", 0, 4), (0, "clip-a", 1, 4)]


def test_named_samples_are_read_alone(reader):
    every, _ = read(reader)
    wanted = {0: {every[3].position, every[7].position}, 1: {every[9].position}}
    some, told = read(reader, only=wanted)
    assert names(some) == names([every[3], every[4], every[7], every[9]])
    assert not told
    assert read(reader, only={}) == ([], [])


def test_a_missing_shard_is_told_and_the_others_are_read(reader):
    clips, told = read(dataclasses.replace(reader, urls=["/nowhere/x.tar", reader.urls[0]]))
    assert len(clips) == 8 and clips[0].shard == 1
    assert len(told) == 1 and "/nowhere/x.tar: left out" in told[0]
