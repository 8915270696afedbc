"""Files whose tables declare more than they hold are refused before a demuxer takes memory for it."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import av
import numpy as np
import pytest

from pipeline.sample_tables import check_sample_tables
from schemas.errors import MediaCorrupt, VideoTooLong
from tests.tiny_videos import LIMITS, make_video, numbers, pick


def rewritten(payload: bytes, tables: dict[bytes, bytes]) -> bytes:
    """The same mp4 with other contents in some of its boxes."""
    boxes = b""
    position = 0
    while position + 8 <= len(payload):
        size, kind = struct.unpack_from(">I4s", payload, position)
        content = payload[position + 8 : position + size]
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"moof", b"traf"):
            content = rewritten(content, tables)
        content = tables.get(kind, content)
        boxes += struct.pack(">I4s", len(content) + 8, kind) + content
        position += size
    return boxes


MANY = 60_000_000
HOSTILE_TABLES = {
    "sizes": {b"stsz": struct.pack(">III", 0, 1, MANY)},
    "small-sizes": {b"stsz": b"", b"stss": struct.pack(">I4sIII", 20, b"stz2", 0, 4, MANY)},
    "times": {b"stts": struct.pack(">IIIIII", 0, 2, MANY // 2, 1, MANY // 2, 2)},
    "offsets": {b"stss": struct.pack(">I4sIIII", 24, b"ctts", 0, 1, MANY, 1)},
    "long-box": {b"stss": struct.pack(">I4sQIII", 1, b"stsz", 28, 0, 1, MANY)},
    "edits": {b"edts": struct.pack(">I4sII", 1 << 30, b"elst", 0, 1 << 30) + bytes(12 * 900_000)},
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_tables_of_too_many_samples_are_refused_before_the_container_is_opened(name, monkeypatch):
    payload = rewritten(make_video(20), HOSTILE_TABLES[name])
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened"))
    for whole in (payload, payload[: len(payload) - 100]):
        with pytest.raises(VideoTooLong, match="tables of the video declare"):
            pick(whole)
    moov = payload[payload.index(b"moov") - 4 :]
    header = (
        b"cmov" + struct.pack(">I4s4sI4sI", 12, b"dcom", b"zlib", 1 << 20, b"cmvd", len(moov)) + zlib.compress(moov)
    )
    with pytest.raises(VideoTooLong, match="tables of the video declare"):
        pick(b"\0\0\0\x08wide" + struct.pack(">I4sI", len(header) + 12, b"moov", len(header) + 4) + header)


def fragmented() -> bytes:
    return make_video(20, movflags="frag_keyframe+empty_moov+dash")


def test_fragments_have_their_samples_counted_too():
    payload = bytearray(fragmented())
    assert numbers(pick(bytes(payload))) == list(range(20))
    struct.pack_into(">I", payload, payload.index(b"trun") + 8, 1 << 28)
    with pytest.raises(VideoTooLong, match="tables of the video declare 268,4"):
        pick(bytes(payload))


def test_long_uncompressed_sound_is_no_film_that_is_too_long():
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        film, sound = output.add_stream("libx264", rate=25), output.add_stream("pcm_s16le", rate=48000, layout="mono")
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        for number in range(3):
            output.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts = 48000, number * 1920
            output.mux(sound.encode(samples))
        output.mux([*film.encode(None), *sound.encode(None)])
    payload = bytearray(file.getvalue())
    struct.pack_into(">I", payload, payload.rindex(b"stsz") + 12, MANY)
    struct.pack_into(">I", payload, payload.rindex(b"stts") + 12, MANY)
    assert len(pick(bytes(payload))) == 3
    struct.pack_into(">4s", payload, payload.index(b"soun"), b"vide")
    with pytest.raises(VideoTooLong, match="tables of the video declare 60,000,003 samples"):
        pick(bytes(payload))


def test_tables_that_overlap_are_not_added_up_for_ever():
    payload = make_video(3) + struct.pack(">I4sIIII", 24, b"stts", 0, 1 << 31, 0, 1) * 20_000
    with pytest.raises(MediaCorrupt, match="overlap"):
        pick(payload)


def test_an_avi_of_many_tracks_is_refused_before_it_is_opened(monkeypatch):
    payload = make_video(3, container="avi", codec="mpeg4")
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(MediaCorrupt, match="17 tracks"):
        pick(payload.replace(b"strh", b"strh" * 17))


def test_a_segment_index_cannot_point_into_the_data():
    payload = bytearray(fragmented())
    index = payload.index(b"sidx")
    assert payload[index + 4] == 1
    behind = index - 4 + struct.unpack_from(">I", payload, index - 4)[0]
    struct.pack_into(">q", payload, index + 24, payload.index(b"mdat") + 4 - behind)
    with pytest.raises(MediaCorrupt, match="segment index"):
        pick(bytes(payload))


def test_tables_cut_or_damaged_anywhere_are_read_or_refused():
    generator = np.random.default_rng(4)
    for whole in (make_video(3), fragmented()):
        start = whole.index(b"moov") - 40
        for position in range(max(0, start), min(len(whole), start + 1200)):
            damaged = bytearray(whole)
            damaged[position] = generator.integers(256)
            for payload in (whole[:position], bytes(damaged)):
                with contextlib.suppress(VideoTooLong, MediaCorrupt):
                    check_sample_tables(payload, LIMITS)
