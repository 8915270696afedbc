"""One member becomes its clip views; and every hostile or odd sample that we know becomes what it should."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.decode import Decoder, media_kind
from pipeline.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, media_kind_of_extension, sniff_media
from pipeline.sample import Member
from schemas.errors import MediaCorrupt, MediaUnsupported, NoFrames, SampleError, SpecError
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec

SHARED = Path(os.environ.get("BSQTOK_SHARED") or Path(__file__).parents[3] / "shared")
NASTY = SHARED / "data" / "nasty"
LIMITS = LimitsSpec()


def member(payload: bytes, name: str) -> Member:
    return Member(name, "file", len(payload), 0, payload)


def decoder(*, size: int = 32, clip_frames: int = 4, fps="source", stride="clip", short_clips="keep", **preprocess):
    clips = ClipSpec(fps=fps, clip_frames=clip_frames, stride=stride, short_clips=short_clips)
    return Decoder(PreprocessSpec(size=size, **preprocess), clips, LIMITS)


def photo(height: int = 96, width: int = 128) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(9 * x + 5 * y + phase) + 0.3 * np.sin(40 * x * y + phase) for phase in (0.0, 1.0, 2.0)]
    return (127 + 90 * np.stack(waves, axis=-1)).clip(0, 255).astype(np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo()).save(file, "PNG")
    return file.getvalue()


@cache
def video(num_frames: int, *, height: int = 48, width: int = 64) -> bytes:
    """Flat grey frames of level 20 + 4 n at 25 a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=Fraction(25), options={"crf": "4", "bf": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            pixels_HWC = np.full((height, width, 3), 20 + 4 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def numbers(view) -> list[int]:
    """Which frames a view holds, by their grey level."""
    return [round((float(frame.float().mean()) - 20) / 4) for frame in view.frames_TCHW]


# ---- images


def test_an_image_is_one_clip_of_one_frame():
    (view,) = decoder().views("key", member(png(), "0.png"))
    assert (view.clip, view.view, view.num_frames) == (0, 0, 1)
    assert view.frames_TCHW.shape == (1, 3, 32, 32)
    assert view.frames_TCHW.dtype == torch.uint8
    assert view.frames_TCHW.is_contiguous()
    assert (view.width, view.height, view.crop, view.flipped) == (128, 96, (16, 0, 96, 96), False)
    assert (view.start, view.frame_times, view.warnings) == (None, None, [])


def test_views_of_an_image_are_different_crops_of_it():
    views = list(decoder(crop="random", views=5).views("key", member(png(), "0.png")))
    assert [(view.clip, view.view) for view in views] == [(0, number) for number in range(5)]
    assert len({view.crop for view in views}) == 5


def test_views_depend_on_the_key_and_not_on_what_came_before():
    random = decoder(crop="random", views=2, flip=0.5)
    alone = list(random.views("key", member(png(), "0.png")))
    list(random.views("other", member(png(), "0.png")))
    again = list(random.views("key", member(png(), "renamed.jpg")))
    assert [view.crop for view in again] == [view.crop for view in alone]
    assert all(torch.equal(a.frames_TCHW, b.frames_TCHW) for a, b in zip(alone, again, strict=True))


def test_a_flipped_view_is_the_mirror_of_its_crop():
    plain, flipped = (next(decoder(flip=flip).views("key", member(png(), "0.png"))) for flip in (0.0, 1.0))
    assert flipped.flipped
    assert torch.equal(flipped.frames_TCHW, plain.frames_TCHW.flip(-1))


def test_a_failure_names_the_member():
    with pytest.raises(MediaCorrupt) as caught:
        list(decoder().views("key", member(b"\xff\xd8\xff\xd9" + b"\0" * 9, "folder/0.jpg")))
    assert caught.value.member == "folder/0.jpg"
    assert caught.value.clip is None


def test_threads_share_one_decoder():
    shared = decoder(crop="random", views=2)
    jobs = [(f"key-{number}", member(png(), "0.png")) for number in range(20)]
    jobs += [(f"film-{number}", member(video(9), "0.mp4")) for number in range(5)]
    alone = {key: [view.frames_TCHW for view in shared.views(key, media)] for key, media in jobs}
    together: dict[str, list[torch.Tensor]] = {}

    def work(part: int) -> None:
        for key, media in jobs[part::4]:
            together[key] = [view.frames_TCHW for view in shared.views(key, media)]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for key, frames in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(frames, together[key], strict=True))


# ---- clips


def held(payload: bytes, **spec) -> list[list[int]]:
    return [numbers(view) for view in decoder(**spec).views("key", member(payload, "0.mp4"))]


@pytest.mark.parametrize(
    ("num_frames", "clip_frames", "stride", "clips"),
    [
        (8, 4, "clip", [range(4), range(4, 8)]),
        (10, 4, "clip", [range(4), range(4, 8), range(8, 10)]),
        (3, 4, "clip", [range(3)]),
        (8, 4, 2, [range(4), range(2, 6), range(4, 8)]),
        (9, 4, 2, [range(4), range(2, 6), range(4, 8), range(6, 9)]),
        (6, 4, 3, [range(4), range(3, 6)]),
        (12, 3, 5, [range(3), range(5, 8), range(10, 12)]),
        (10, 3, 5, [range(3), range(5, 8)]),
        (9, 3, 5, [range(3), range(5, 8)]),
        (3, 1, 1, [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_clips_are_cut_by_length_and_stride(num_frames, clip_frames, stride, clips):
    expected = [list(clip) for clip in clips]
    spec = {"clip_frames": clip_frames, "stride": stride}
    assert held(video(num_frames), **spec) == expected
    whole = [clip for clip in expected if len(clip) == clip_frames]
    if whole:
        assert held(video(num_frames), short_clips="drop", **spec) == whole


def test_a_video_too_short_for_one_clip_says_so_when_short_clips_are_dropped():
    with pytest.raises(NoFrames, match=r"gives 3 frames .* clip of 4.*short_clips"):
        held(video(3), short_clips="drop")


def test_stride_counts_picked_frames():
    assert held(video(25), fps=5, clip_frames=2, stride=2) == [[0, 5], [10, 15], [20]]


def test_times_are_those_of_the_picked_frames():
    first, second = decoder(fps=5, clip_frames=3).views("key", member(video(25), "0.mp4"))
    assert first.start == 0.0
    assert first.frame_times == pytest.approx((0.0, 0.2, 0.4))
    assert second.start == pytest.approx(0.6)
    assert second.frame_times == pytest.approx((0.0, 0.2))


def test_every_clip_of_a_video_has_all_views_at_the_same_boxes():
    spec = {"crop": "random", "views": 3, "flip": 0.5, "clip_frames": 4}
    views = list(decoder(**spec).views("key", member(video(10), "0.mp4")))
    assert [(view.clip, view.view) for view in views] == [(clip, view) for clip in range(3) for view in range(3)]
    for number in range(3):
        assert len({(view.crop, view.flipped) for view in views if view.view == number}) == 1
    assert [numbers(view) for view in views[::3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_longer_video_begins_with_the_clips_of_a_shorter_one():
    long = held(video(30), fps=10, clip_frames=3)
    short = held(video(17), fps=10, clip_frames=3, short_clips="drop")
    assert short == long[: len(short)]
    assert len(short) == 2


def test_clips_come_before_the_rest_is_decoded():
    views = decoder(clip_frames=2).views("key", member(video(40), "0.mp4"))
    assert numbers(next(views)) == [0, 1]
    assert numbers(next(views)) == [2, 3]
    views.close()


def test_clips_before_the_damage_are_kept_and_the_failure_names_the_next():
    payload = bytearray(video(40))
    data = payload.index(b"mdat")
    middle = data + (payload.index(b"moov") - data) * 3 // 4
    payload[middle : middle + 60] = b"\xff" * 60
    kept = []
    with pytest.raises(SampleError) as caught:
        kept.extend(decoder(clip_frames=4, views=2, flip=0.5).views("key", member(bytes(payload), "0.mp4")))
    clips = Counter(view.clip for view in kept)
    assert len(clips) >= 1
    assert set(clips.values()) == {2}
    assert caught.value.clip == len(clips)
    assert caught.value.stage == "decode"
    for view in kept[::2]:
        assert numbers(view) == list(range(4 * view.clip, 4 * view.clip + 4))


def test_a_warning_stands_on_the_first_view_of_the_first_clip():
    file = io.BytesIO()
    with av.open(io.BytesIO(video(10))) as source, av.open(file, "w", format="h264") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    views = list(decoder(clip_frames=4, views=2, flip=0.5).views("key", member(file.getvalue(), "0.h264")))
    assert [len(view.warnings) for view in views] == [1, 0, 0, 0, 0, 0]
    assert views[0].warnings[0].error == "FrameTimesMissing"


# ---- which decoder


def test_extensions_are_told_apart():
    assert media_kind_of_extension("JPG") == media_kind_of_extension("v2.jpg") == "image"
    assert media_kind_of_extension("mp4") == "video"
    assert media_kind_of_extension("txt") is None
    assert not IMAGE_EXTENSIONS & VIDEO_EXTENSIONS


def test_content_decides_and_the_extension_only_what_content_leaves_open():
    assert media_kind(member(png(), "0.mp4")) == "image"
    assert media_kind(member(video(1), "0.jpg")) == "video"
    assert sniff_media(b"GIF89a") is None
    assert media_kind(member(b"GIF89a", "0.gif")) == "image"
    assert media_kind(member(b"GIF89a", "a.mp4/0.v2.MP4")) == "video"
    with pytest.raises(MediaUnsupported):
        media_kind(member(b"text", "0.txt"))


@pytest.mark.parametrize("spec", [{"size": "tokenizer"}, {"clip_frames": "tokenizer"}])
def test_a_spec_that_is_not_resolved_is_refused(spec):
    preprocess = PreprocessSpec(size=spec.get("size", 32))
    with pytest.raises(SpecError, match="tokenizer"):
        Decoder(preprocess, ClipSpec(clip_frames=spec.get("clip_frames", 4)), LIMITS)


# ---- every known hostile or odd sample

SHARDS = ("images-ok-but-odd.tar", "images-bad.tar", "videos-ok-but-odd.tar", "videos-bad.tar")


@cache
def nasty_cases() -> list[dict]:
    """The cases with a media member that grouping would hand on, in the order of the shards."""
    if not NASTY.is_dir():
        return []
    cases = json.loads((NASTY / "expected.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if case["shard"] in SHARDS and media_name(case) is not None]


def media_name(case: dict) -> str | None:
    for name, _ in case["members"]:
        # The key ends at the first dot of the base name.
        extension = name.rpartition("/")[2].partition(".")[2]
        if media_kind_of_extension(extension) is not None:
            return name
    return None


@cache
def nasty_members(shard: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(NASTY / shard) as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is not None:
                members.setdefault(entry.name, file.read())
    return members


@cache
def nasty_decoder() -> Decoder:
    # One pixel is small but not bad; so that all shapes go through the decoders.
    clips = ClipSpec(fps="source", clip_frames=4)
    return Decoder(PreprocessSpec(size=64), clips, LimitsSpec(min_side=1))


def grid(pixels_HWC: np.ndarray) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]

    def cell(row: int, column: int) -> np.ndarray:
        top, left = row * height // 4, column * width // 4
        bottom, right = max(top + 1, (row + 1) * height // 4), max(left + 1, (column + 1) * width // 4)
        return pixels_HWC[top:bottom, left:right].reshape(-1, 3).mean(axis=0)

    return np.array([[cell(row, column) for column in range(4)] for row in range(4)])


def outcome(case: dict, use: Decoder) -> tuple[list, SampleError | None]:
    name = media_name(case)
    views: list = []
    try:
        views.extend(use.views(case["key"], member(nasty_members(case["shard"])[name], name)))
    except SampleError as error:
        return views, error
    return views, None


def problems(case: dict, use: Decoder) -> list[str]:
    """What is wrong with the outcome of a case; empty when it is as expected."""
    views, error = outcome(case, use)
    if error is not None:
        expected = case.get("fail")
        if case["expect"] == "ok" or expected is None:
            return [f"failed: {error.stage} {error.error} {error}"]
        return [] if error.stage in expected["stage"] else [f"stage {error.stage}, expected {expected['stage']}"]
    if case["expect"] == "fail" or "ok" not in case:
        return [] if case["expect"] == "either" else ["tokenized"]
    expected, found = case["ok"], []
    name = media_name(case)
    shown_HWC = use.upright(member(nasty_members(case["shard"])[name], name))
    size = [shown_HWC.shape[1], shown_HWC.shape[0]]
    if [views[0].width, views[0].height] != size:
        found.append(f"row says {views[0].width} x {views[0].height}, the picture is {size}")
    # Pixels are shown square, so where a display size is given it is the only right one.
    sizes = expected.get("sizes_allowed") or [expected.get("display_size") or expected.get("size", size)]
    if size not in sizes:
        found.append(f"size {size}, expected {sizes}")
    if views[0].start is not None:
        num_frames = sum(view.num_frames for view in views)
        if num_frames not in expected.get("frames_allowed", [expected.get("frames", num_frames)]):
            found.append(f"{num_frames} frames")
        if num_frames > expected.get("frames_max", num_frames):
            found.append(f"{num_frames} frames")
        if "pts_ms" in case:
            seconds = [view.start + time for view in views for time in view.frame_times]
            if not np.allclose(seconds, np.array(case["pts_ms"]) / 1000):
                found.append(f"times {seconds}")
    if "mean_rgb" in expected:
        off = float(np.abs(shown_HWC.reshape(-1, 3).mean(axis=0) - expected["mean_rgb"]).max())
        if off > expected["tol"]:
            found.append(f"mean off by {off:.1f}")
    if "grid_rgb" in expected:
        off = float(np.abs(grid(shown_HWC) - np.array(expected["grid_rgb"])).max())
        if off > expected["grid_tol"]:
            found.append(f"grid off by {off:.1f}")
    return found


needs_shared = pytest.mark.skipif(not NASTY.is_dir(), reason=f"the shared data are not at {SHARED}")
nasty_parameters = [pytest.param(case, id=f"{case['shard'][:-4]}:{case['key'][:40]}") for case in nasty_cases()]


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("case", nasty_parameters)
def test_nasty_sample(case):
    assert problems(case, nasty_decoder()) == []


@pytest.mark.shared
@needs_shared
def test_nasty_cases_are_all_there_and_preferred_outcomes_are_counted(capsys):
    table: Counter[tuple[str, str, str]] = Counter()
    against_preference = []
    for case in nasty_cases():
        _, error = outcome(case, nasty_decoder())
        result = "ok" if error is None else "fail"
        table[case["shard"], case["expect"], result] += 1
        if case.get("prefer", result) != result:
            against_preference.append(case["key"])
    with capsys.disabled():
        print()
        for (shard, expect, result), count in sorted(table.items()):
            print(f"  {shard:24} expected {expect:7} was {result:5} {count:4}")
        print(f"  against the preferred outcome: {', '.join(against_preference) or 'none'}")
    assert all(result == expect for (_, expect, result) in table if expect != "either")
    assert table.total() == 191
    # Content decides: a clip named .jpg is a clip, a JPEG named .mp4 a picture.  A frame of 36 megapixels is within
    # the default limit.  Bad sidecars cost no sample.
    assert set(against_preference) == {"mp4-in-jpg", "jpeg-in-mp4", "huge-frames", "json-deep"}


@pytest.mark.shared
@needs_shared
def test_small_pictures_are_refused_by_the_default_limits():
    default = Decoder(PreprocessSpec(size=64), ClipSpec(clip_frames=4), LIMITS)
    for case in nasty_cases():
        if case["key"] in ("one-by-one", "one-by-one-jpg", "tall-1x4000", "wide-5000x7"):
            _, error = outcome(case, default)
            assert error is not None
            assert error.error == "ImageTooSmall"
            assert problems(case, default) == []
