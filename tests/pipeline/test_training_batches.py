"""Training data: the same for any number of threads, every sample once an epoch, and resumable to the sample."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipeline.training_batches import Complaints, ShardSource, StreamedFrames, held_source, hold_frames
from schemas.errors import SpecError
from schemas.jobspec import ClipSpec, PreprocessSpec
from tests.tiny_corpus import mp4, photo_members, write_tar
from tokenizer.train_config import OptimizerPart, SamplingPart


def source(urls, kind="image", threads=2, **preprocess):
    settings = {"size": 32, "crop": "random", "filter": "bilinear", "flip": 0.5, "engine": "pillow", **preprocess}
    return ShardSource(
        urls=[str(url) for url in urls],
        kind=kind,
        preprocess=PreprocessSpec(**settings),
        clips=ClipSpec(fps="source", clip_frames=3, stride=2, short_clips="drop"),
        num_threads=threads,
    )


def streamed(sources, complaints=None, colour_detail=0.0, **options):
    settings = {"seed": 5, "shuffle_samples": 6, "complaints": complaints or Complaints(lambda line: None)}
    return StreamedFrames(
        sources,
        sampling=SamplingPart(clip_share=0.4, colour_detail=colour_detail),
        optimizer=OptimizerPart(batch_images=4, batch_clips=1),
        **{**settings, **options},
    )


def take(batches, number):
    return [batches.next_batch() for _ in range(number)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_colours_of_a_share_of_streamed_samples_are_sharpened_and_a_resumed_stream_does_the_same(small_shards):
    plain = take(streamed([source(small_shards)]), 10)
    stream = streamed([source(small_shards)], colour_detail=0.5)
    sharp = take(stream, 5)
    goes_on = streamed([source(small_shards)], colour_detail=0.5)
    goes_on.load(json.loads(json.dumps(stream.state())))
    sharp += take(stream, 5)
    assert equal(take(goes_on, 5), sharp[5:])
    changed = torch.cat([(one != other).flatten(1).any(1) for one, other in zip(plain, sharp, strict=True)])
    assert 10 <= int(changed.sum()) <= 30


def test_held_frames_are_all_views_of_a_kind_in_order_for_any_number_of_threads(small_shards):
    complaints = Complaints(lambda line: None)
    held = hold_frames(source(small_shards, threads=1, views=2), complaints)
    assert held.shape == (2 * 48, 1, 32, 32, 3) and held.dtype == torch.uint8
    assert torch.equal(held, hold_frames(source(small_shards, threads=3, views=2), complaints))
    clips = hold_frames(source(small_shards, "video"), complaints)
    assert clips.shape == (2 + 5, 3, 32, 32, 3)  # of 5 and 11 frames: 3 of them, every 2
    assert hold_frames(held_source(source(small_shards), scale=1.25), complaints, most=5).shape == (5, 1, 40, 40, 3)
    assert complaints.num_failed == 0


def test_the_stream_does_not_depend_on_threads_and_differs_by_seed_and_epoch(small_shards):
    first = take(streamed([source(small_shards, threads=1), source(small_shards, "video", 1)]), 24)
    assert equal(first, take(streamed([source(small_shards, threads=3), source(small_shards, "video", 2)]), 24))
    assert {tuple(batch.shape) for batch in first} == {(4, 1, 32, 32, 3), (1, 3, 32, 32, 3)}
    other = take(streamed([source(small_shards)], seed=6), 12)
    images = take(streamed([source(small_shards)]), 24)
    assert not equal(images[:12], other)
    assert not equal(images[:12], images[12:])  # the second epoch: other order, other crops


def test_every_sample_comes_once_an_epoch_over_all_ranks(small_shards):
    """Without random crops an epoch is the held frames in another order."""
    whole = replace(source(small_shards), preprocess=PreprocessSpec(size=32, engine="pillow"))
    held = hold_frames(whole, Complaints(lambda line: None))
    wanted = sorted(bytes(each.contiguous().numpy()) for each in held)
    for shards, num_ranks in ((small_shards, 1), (small_shards, 2), (small_shards[:1], 2)):
        part = replace(whole, urls=[str(url) for url in shards])
        per_rank = 8 * len(shards) // num_ranks // 4
        seen = [
            bytes(frames.contiguous().numpy())
            for rank in range(num_ranks)
            for batch in take(streamed([part], rank=rank, num_ranks=num_ranks), per_rank)
            for frames in batch
        ]
        assert len(set(seen)) == 8 * len(shards)
        if len(shards) == 6:
            assert sorted(seen) == wanted


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_stream_that_is_loaded_goes_on_with_the_same_batches(small_shards, taken):
    sources = [source(small_shards), source(small_shards, "video")]
    first, second = streamed(sources), streamed(sources)
    take(first, taken)
    second.load(json.loads(json.dumps(first.state())))
    assert equal(take(first, 10), take(second, 10))
    with pytest.raises(SpecError, match="begun with shards"):
        streamed([source(small_shards[:2]), source(small_shards, "video")]).load(first.state())


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3)])
def test_a_stream_goes_on_with_as_many_ranks_alone(small_shards, before, now):
    """A rank's place says nothing of what another number of ranks has drawn."""
    saved = json.loads(json.dumps(streamed([source(small_shards)], num_ranks=before).state()))
    for rank in range(now):
        with pytest.raises(SpecError, match=rf"begun with {before} processes .* now there are {now}\. Resume with the"):
            streamed([source(small_shards)], rank=rank, num_ranks=now).load(saved)


def test_damaged_samples_and_shards_are_told_and_left_out(tmp_path, small_shards):
    members = photo_members(0, 3)
    members[4:4] = [("broken.jpg", members[0][1][:200])]
    good = write_tar(tmp_path / "some.tar", members)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(small_shards[0].read_bytes()[:12_000])
    lines = []
    complaints = Complaints(lines.append)
    held = hold_frames(source([good, cut, tmp_path / "missing.tar"]), complaints)
    assert len(held) > 3 and complaints.num_failed >= 3
    text = "\n".join(lines)
    assert "broken" in text and "cut.tar" in text and "missing.tar" in text


def test_a_source_without_a_usable_sample_is_refused(tmp_path):
    shard = write_tar(tmp_path / "videos.tar", [("a.mp4", mp4(1, 4))])
    with pytest.raises(SpecError, match=r"no image of 1 shards could be used"):
        hold_frames(source([shard]), Complaints(lambda line: None))
    with pytest.raises(SpecError, match=r"no image of 1 shards could be used"):
        streamed([source([shard])]).next_batch()


def test_only_the_first_complaints_are_told_one_by_one():
    lines = []
    complaints = Complaints(lines.append)
    for number in range(40):
        complaints.add(f"sample {number}", ValueError("bad"))
    assert len(lines) == 5 + 3 and "32 samples or shards" in lines[-1]
