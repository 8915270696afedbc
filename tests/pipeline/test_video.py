"""Frames are picked by time, shown upright in the right colours, and never taken from a damaged stream in silence."""

from __future__ import annotations

import io
import itertools
import socket
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipeline.containers import missing_bytes
from pipeline.preprocess import turn_upright
from pipeline.video import Deadline, pick_frames, to_rgb
from schemas.errors import (
    DecodeTimeout,
    ImageTooLarge,
    ImageTooSmall,
    MediaCorrupt,
    MediaTruncated,
    MediaUnsupported,
    NoFrames,
    SampleError,
    VideoTooLong,
)
from schemas.jobspec import LimitsSpec
from tests.tiny_videos import LIMITS, make_video, numbers, pick


def expected_numbers(times: list[Fraction], end: Fraction, fps: Fraction) -> list[int]:
    """The rule by its own words: for k = 0, 1, ..., the last frame with a time <= start + k / fps, none twice."""
    chosen: list[int] = []
    k = 0
    while times[0] + k / fps < end:
        last = max(number for number, time in enumerate(times) if time <= times[0] + k / fps)
        if not chosen or last != chosen[-1]:
            chosen.append(last)
        k += 1
    return chosen


# ---- picking


@pytest.mark.parametrize("fps", [1, 3, 8, 12.5, 24, 25, 30, 120])
def test_frames_are_picked_by_time(fps):
    payload = make_video(20)
    times = [Fraction(number, 25) for number in range(20)]
    picked = pick(payload, fps)
    assert numbers(picked) == expected_numbers(times, Fraction(20, 25), Fraction(fps))
    assert [frame.seconds for frame in picked] == pytest.approx([number / 25 for number in numbers(picked)])


def test_source_takes_every_frame():
    assert numbers(pick(make_video(20))) == list(range(20))


@pytest.mark.parametrize("fps", [1, 4, 10, 100])
def test_uneven_times_are_times_and_not_counts(fps):
    times = [Fraction(milliseconds, 1000) for milliseconds in (0, 40, 80, 400, 440, 900, 920, 940, 2000, 2040)]
    payload = make_video(10, times=times)
    picked = numbers(pick(payload, fps))
    assert picked == expected_numbers(times, times[-1] + Fraction(1, 25), Fraction(fps))


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30000, 1001), Fraction(24), Fraction(60)])
def test_times_rounded_to_milliseconds_lose_no_frame_at_the_videos_own_rate(rate):
    payload = make_video(40, rate=rate, container="matroska")
    assert numbers(pick(payload, float(rate))) == list(range(40))


def test_a_video_that_starts_late_is_picked_from_its_first_frame():
    times = [5 + Fraction(number, 25) for number in range(20)]
    picked = pick(make_video(20, times=times), 5)
    assert numbers(picked) == [0, 5, 10, 15]
    assert picked[0].seconds == 5.0


def test_the_frames_of_a_shorter_video_are_the_first_of_a_longer_one():
    long = numbers(pick(make_video(40, codec="mpeg4"), 7))
    for count in (1, 9, 23, 39):
        short = numbers(pick(make_video(count, codec="mpeg4"), 7))
        assert short == [number for number in long if number < count]


def test_missing_and_backward_times_are_made_up_from_the_rate_with_one_warning():
    raw = make_video(12, container="h264", options={"bf": "0"})
    picked = pick(raw)
    assert numbers(picked) == list(range(12))
    steps = {round(b.seconds - a.seconds, 6) for a, b in itertools.pairwise(picked)}
    assert len(steps) == 1
    assert [warning.error for warning in picked[0].info.warnings] == ["FrameTimesMissing"]
    assert numbers(pick(raw, 1000.0)) == list(range(12))

    # Two transport streams, one after the other: the clock starts again in the middle.
    part = make_video(10, container="mpegts", codec="libx264", options={"bf": "0"})
    picked = pick(part + part)
    assert len(picked) == 20
    seconds = [frame.seconds for frame in picked]
    assert seconds == sorted(set(seconds))
    assert [warning.error for warning in picked[0].info.warnings] == ["FrameTimesMissing"]


# ---- shape and colour


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_is_known_and_not_applied_to_the_stored_frame(rotation):
    corner = np.full((48, 64, 3), 40, np.uint8)
    corner[:12, :16] = 220  # top left as stored
    (picked,) = pick(make_video([corner], rotation=rotation))
    shown = turn_upright(torch.from_numpy(to_rgb(picked).copy()).permute(2, 0, 1), picked.info.orientation)[0]
    # Counter-clockwise degrees, as in frame.rotation.
    place = {0: (0, 0), 90: (-1, 0), 180: (-1, -1), -90: (0, -1)}[rotation]
    assert shown[place] > 200
    assert sum(int(shown[y, x]) > 200 for y in (0, -1) for x in (0, -1)) == 1
    assert picked.info.upright_size == ((48, 64) if rotation in (90, -90) else (64, 48))


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(16, 11), (93, 48)), (Fraction(1, 2), (64, 96)), (None, (64, 48))]
)
def test_pixels_are_made_square_by_stretching(aspect, size):
    (picked,) = pick(make_video(1, aspect=aspect))
    assert picked.info.upright_size == size


def test_a_pixel_aspect_cannot_blow_up_the_frame():
    with pytest.raises(ImageTooLarge, match="square pixels"):
        pick(make_video(1, aspect=Fraction(10)), limits=LimitsSpec(max_pixels=30_000))


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"])
def test_colours_and_ranges_come_back(pixels):
    colours = np.zeros((48, 64, 3), np.uint8)
    colours[:24], colours[24:] = (200, 60, 40), (5, 128, 250)
    (picked,) = pick(make_video([colours], pixels=pixels))
    shown = to_rgb(picked).astype(int)
    assert np.abs(shown[4:20] - (200, 60, 40)).max() <= 6
    assert np.abs(shown[28:44] - (5, 128, 250)).max() <= 6


def test_transparent_frames_are_laid_on_white():
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, np.linspace(0, 255, 64).round()
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        stream = output.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        output.mux(stream.encode(None))
    (picked,) = pick(file.getvalue())
    alpha = rgba[..., 3:] / 255
    assert np.abs(to_rgb(picked) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_change_of_size_ends_the_video_and_keeps_what_was_before():
    small = make_video(10, container="mpegts", size=(32, 32))
    stream = make_video(10, container="mpegts") + small
    frames = pick_frames(stream, "source", LIMITS, Deadline(60))
    seen = []
    with pytest.raises(MediaUnsupported, match="changes from 64 x 48 to 32 x 32"):
        seen.extend(frames)
    assert 8 <= len(seen) <= 10


# ---- damage


def index_first(payload: bytes) -> bytes:
    """The same mp4 with its moov box before the data, as for streaming."""
    boxes = []
    position = 0
    while position < len(payload):
        size = struct.unpack_from(">I", payload, position)[0]
        boxes.append(payload[position : position + size])
        position += size
    moov = bytearray(next(box for box in boxes if box[4:8] == b"moov"))
    table = moov.index(b"stco") + 8
    for entry in range(table + 4, table + 4 + 4 * struct.unpack_from(">I", moov, table)[0], 4):
        struct.pack_into(">I", moov, entry, struct.unpack_from(">I", moov, entry)[0] + len(moov))
    return b"".join((boxes[0], bytes(moov), *(box for box in boxes[1:] if box[4:8] != b"moov")))


def test_a_cut_video_is_truncated_after_its_good_frames():
    whole = index_first(make_video(40))
    assert numbers(pick(whole)) == list(range(40))
    for share in (0.7, 0.9):
        cut = whole[: int(len(whole) * share)]
        assert missing_bytes(cut) == len(whole) - len(cut)
        seen = []
        with pytest.raises(MediaTruncated, match="bytes before its container says"):
            seen.extend(pick_frames(cut, "source", LIMITS, Deadline(60)))
        assert numbers(seen) == list(range(len(seen)))
        assert 0 < len(seen) < 40


@pytest.mark.parametrize("container", ["matroska", "avi", "mp4"])
def test_a_cut_is_found_even_where_the_decoder_just_stops(container):
    whole = make_video(40, container=container, codec="mpeg4" if container == "avi" else "libx264")
    assert missing_bytes(whole) == 0
    for share in (0.3, 0.7, 0.99):
        with pytest.raises(MediaTruncated, match="bytes"):
            pick(whole[: int(len(whole) * share)])


def test_junk_after_the_end_is_harmless():
    whole = make_video(10)
    assert numbers(pick(whole + b"\0" * 3000)) == list(range(10))
    assert numbers(pick(whole + b"junk" * 500)) == list(range(10))


def test_an_index_that_promises_more_than_there_is_means_truncated():
    payload = make_video(10)
    at = payload.index(b"stco")
    entries = struct.unpack_from(">I", payload, at + 8)[0]
    damaged = bytearray(payload)
    struct.pack_into(f">{entries}I", damaged, at + 12, *[2**31] * entries)
    with pytest.raises(MediaTruncated, match="declares 10 frames"):
        pick(bytes(damaged))


def test_flipped_bits_end_in_a_video_or_a_sample_error():
    generator = np.random.default_rng(2)
    textured = [generator.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(12)]
    for container, codec in (
        ("mp4", "libx264"),
        ("matroska", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
    ):
        whole = make_video(textured, container=container, codec=codec)
        errors = 0
        for _ in range(25):
            damaged = bytearray(whole)
            for position in generator.integers(0, len(damaged), 5):
                damaged[position] ^= 1 << int(generator.integers(0, 8))
            try:
                for picked in pick(bytes(damaged), limits=LimitsSpec(max_pixels=1_000_000)):
                    assert to_rgb(picked).shape == (48, 64, 3) or picked.info.stored_size != (64, 48)
            except SampleError as error:
                assert error.stage in ("decode", "limit")
                errors += 1
        assert errors > 0, container


@pytest.mark.parametrize(
    "payload", [b"", b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\xff\0\0\0AVI ", bytes(1000)]
)
def test_headers_alone_are_failures(payload):
    with pytest.raises((MediaTruncated, MediaCorrupt, MediaUnsupported, NoFrames)):
        pick(payload)


def test_a_container_without_film_has_no_frames():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(NoFrames, match="audio"):
        pick(file.getvalue())


# ---- limits


def test_pixels_frames_and_seconds_have_limits():
    payload = make_video(20)
    with pytest.raises(ImageTooLarge, match="max_pixels"):
        pick(payload, limits=LimitsSpec(max_pixels=64 * 48 - 1))
    with pytest.raises(ImageTooSmall, match="min_side"):
        pick(payload, limits=LimitsSpec(min_side=49))
    with pytest.raises(VideoTooLong, match="declares 20 frames"):
        pick(payload, limits=LimitsSpec(max_video_frames=19))
    with pytest.raises(VideoTooLong, match=r"declares 0.8 seconds"):
        pick(payload, limits=LimitsSpec(max_video_seconds=0.7))


def test_frames_and_seconds_are_counted_where_the_header_says_nothing():
    payload = make_video(20, container="mpegts")
    with pytest.raises(VideoTooLong, match="more frames than"):
        pick(payload, limits=LimitsSpec(max_video_frames=19))
    raw = make_video(20, container="h264")
    with pytest.raises(VideoTooLong, match="stands at"):
        pick(raw, limits=LimitsSpec(max_video_seconds=0.3))


def test_decoding_time_is_limited_and_the_consumers_time_is_not_counted():
    payload = make_video(20)
    with pytest.raises(DecodeTimeout, match="decode_timeout_seconds"):
        pick(payload, limits=LimitsSpec(decode_timeout_seconds=1e-9))
    deadline = Deadline(0.2)
    with deadline.paused():
        threading.Event().wait(0.3)
    deadline.check()


# ---- nothing is opened that was not given


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile canary.mp4\n",
    "ffconcat-absolute": "ffconcat version 1.0\nfile {folder}/canary.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ncanary.ts\n#EXT-X-ENDLIST\n",
    "hls-http": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/x.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video {port} RTP/AVP 96\r\n"
    "a=rtpmap:96 H264/90000\r\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="0"><BaseURL>http://127.0.0.1:{port}/x</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_and_scripts_open_nothing(name, tmp_path, monkeypatch):
    (tmp_path / "canary.mp4").write_bytes(make_video(10))
    (tmp_path / "canary.ts").write_bytes(make_video(10, container="mpegts"))
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        payload = PLAYLISTS[name].format(folder=tmp_path, port=port).encode()
        opened = _files_and_sockets()
        with pytest.raises(MediaUnsupported):
            pick(payload)
        # Fewer is fine: what earlier tests left behind may be collected meanwhile.
        assert _files_and_sockets() <= opened
        with pytest.raises(TimeoutError):
            listener.accept()


def test_the_canary_itself_is_a_good_video(tmp_path):
    assert len(pick(make_video(10, container="mpegts"))) == 10


def _files_and_sockets() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0
