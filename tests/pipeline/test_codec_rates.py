"""Bytes of codecs are counted exactly, and the setting nearest to a rate is found."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.codec_rates import (
    avif_payload_bytes,
    clip_codecs,
    code_nearest,
    h264_payload_bytes,
    h265_codecs,
    h265_payload_bytes,
    jpeg2000_payload_bytes,
    jpeg_payload_bytes,
    picture_codecs,
    webp_payload_bytes,
)

CODECS = {codec.name: codec for codec in [*picture_codecs(), *clip_codecs(), *h265_codecs()]}


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with edges, uint8 [64, 96, 3]."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((96, 64), Image.Resampling.BICUBIC))
    pixels[20:30, 40:70] = (250, 10, 30)
    return pixels


def saved(pixels, format, **options):
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format, **options)
    return sink.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def test_the_payload_of_a_jpeg_is_its_scans_with_stuffing_and_restarts():
    scan = b"\x12\xff\x00\x34\xff\xd0\x56\xff\xd7\x78"
    tables = segment(0xDB, b"\xff\xda" * 32)  # content that looks like a marker
    by_hand = (
        b"\xff\xd8" + tables + segment(0xDA, b"\x01") + scan + tables + segment(0xDA, b"\x02") + scan[:4] + b"\xff\xd9"
    )
    assert jpeg_payload_bytes(by_hand) == len(scan) + 4
    assert jpeg_payload_bytes(by_hand[:-10]) <= len(scan)  # cut off, and no endless loop
    assert jpeg_payload_bytes(b"\xff\xd8") == 0


def test_the_payload_of_pillows_jpegs(picture):
    baseline = saved(picture, "JPEG", quality=60, optimize=True)
    header = baseline.index(b"\xff\xda")
    header += 2 + struct.unpack_from(">H", baseline, header + 2)[0]
    assert jpeg_payload_bytes(baseline) == len(baseline) - header - 2
    progressive = saved(picture, "JPEG", quality=60, progressive=True)
    assert 0 < jpeg_payload_bytes(progressive) < len(progressive)
    assert jpeg_payload_bytes(progressive) == pytest.approx(jpeg_payload_bytes(baseline), rel=0.25)


def test_the_payload_of_a_jpeg_2000_is_what_follows_sod():
    def tile_part(packets, length=None, marks=b""):
        body = marks + b"\xff\x93" + packets
        size = 12 + len(body) if length is None else length
        return struct.pack(">HHHIBB", 0xFF90, 10, 0, size, 0, 1) + body

    head = b"\xff\x4f" + segment(0x51, bytes(38)) + segment(0x64, b"comment")
    by_hand = head + tile_part(b"abc", marks=segment(0x5C, bytes(3))) + tile_part(b"de") + b"\xff\xd9"
    assert jpeg2000_payload_bytes(by_hand) == 5
    assert jpeg2000_payload_bytes(head + tile_part(b"abcd", length=0) + b"\xff\xd9") == 4  # until the end


def test_the_payload_of_pillows_jpeg_2000(picture):
    data = CODECS["jpeg2000"].encode(picture[None], 30.0)
    begin = data.index(b"\xff\x93", data.index(b"\xff\x90")) + 2
    assert jpeg2000_payload_bytes(data) == len(data) - begin - 2
    assert np.array_equal(CODECS["jpeg2000"].decode(data)[0], np.asarray(Image.open(io.BytesIO(data))))


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def test_the_payload_of_a_webp_is_its_bitstream_chunks(picture):
    chunks = chunk(b"VP8X", bytes(10)) + chunk(b"ALPH", b"abc") + chunk(b"VP8 ", b"defgh") + chunk(b"EXIF", bytes(7))
    assert webp_payload_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks) == 8
    lossy = saved(picture, "WEBP", quality=50)
    assert lossy[12:16] == b"VP8 " and webp_payload_bytes(lossy) in (len(lossy) - 20, len(lossy) - 21)


def test_the_payload_of_an_avif_is_its_media_data(picture):
    def box(kind, content):
        return struct.pack(">I4s", 8 + len(content), kind) + content

    large = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + b"abcde"
    to_the_end = struct.pack(">I4s", 0, b"mdat") + b"fg"
    assert avif_payload_bytes(box(b"ftyp", bytes(16)) + box(b"mdat", b"xyz") + large + to_the_end) == 3 + 5 + 2
    data = saved(picture, "AVIF", quality=50, speed=8)
    assert avif_payload_bytes(data) == struct.unpack_from(">I", data, data.rindex(b"mdat") - 4)[0] - 8


def test_the_payload_of_h264_is_its_slices():
    start = b"\0\0\0\1"
    units = [b"\x67parameters", b"\x06message", b"\x65slice", b"\x41other\0\0\3\1x", b"\x09"]
    assert h264_payload_bytes(start + start.join(units)) == len(units[2]) + len(units[3])
    assert h264_payload_bytes(b"\0\0\1" + units[2] + b"\0\0") == len(units[2])


@pytest.fixture(scope="module")
def clip(picture):
    return np.stack([np.roll(picture, 3 * number, 1) for number in range(5)])


def test_a_clip_of_odd_sides_comes_back_whole_and_close(clip):
    odd = clip[:, :63, :95]
    (coded,) = code_nearest(CODECS["x264"], odd, 6000, ["payload"])
    assert coded.frames_THWC.shape == odd.shape and coded.frames_THWC.dtype == np.uint8
    assert coded.payload_bytes == pytest.approx(6000, rel=0.05) and coded.payload_bytes < coded.file_bytes
    # Frames in their order: each is closest to its own original.
    errors = np.abs(coded.frames_THWC[:, None].astype(float) - odd[None]).mean((2, 3, 4))
    assert errors.argmin(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["jpeg", "webp"])
@pytest.mark.parametrize("target", [150, 600, 2000])
def test_no_setting_comes_nearer(name, target, picture):
    codec = CODECS[name]
    every = [codec.encode(picture[None], setting) for setting in codec.settings]
    payload, file = code_nearest(codec, picture[None], target)
    assert abs(payload.payload_bytes - target) == min(abs(codec.payload_bytes(data) - target) for data in every)
    assert abs(file.file_bytes - target) == min(abs(len(data) - target) for data in every)
    assert codec.encode(picture[None], payload.setting) in every


@pytest.mark.parametrize("name", ["jpeg2000", "avif"])
def test_the_rate_is_met_within_what_the_codec_can(name, picture):
    payload, file = code_nearest(CODECS[name], picture[None], 700)
    assert payload.payload_bytes == pytest.approx(700, rel=0.06)
    assert file.file_bytes == pytest.approx(700, rel=0.06)
    assert payload.num_bytes("file") == payload.file_bytes > payload.payload_bytes
    assert payload.frames_THWC.shape == (1, 64, 96, 3)


def test_a_header_that_is_larger_than_the_rate_leaves_the_smallest_file(picture):
    codec = CODECS["jpeg"]
    (file,) = code_nearest(codec, picture[None], 20, ["file"])
    assert file.file_bytes == min(len(codec.encode(picture[None], setting)) for setting in range(1, 6)) > 300


@pytest.mark.parametrize("side", [8, 16, 40])
@pytest.mark.parametrize("name", [codec.name for codec in picture_codecs()])
def test_small_pictures_can_be_coded(name, side, picture):
    small = np.ascontiguousarray(picture[:side, :side])
    (coded,) = code_nearest(CODECS[name], small[None], 36, ["payload"])
    assert coded.frames_THWC.shape == (1, side, side, 3)


def test_the_payload_of_h265_is_its_slices():
    """The unit type lies in bits 1 to 6 of its first byte: below 32 slices, 32 to 34 parameter sets, 39 a message."""
    units = [bytes([kind << 1, 1]) + b"x" * kind for kind in (32, 33, 34, 39, 19, 1)]
    start = b"\0\0\0\1"
    assert h265_payload_bytes(start + start.join(units)) == len(units[4]) + len(units[5])


def test_h265_keeps_frames_and_sizes_and_costs_about_what_it_is_asked_for():
    frames = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[:, None], (5, 48, 64))[..., None].repeat(3, -1)
    codec = CODECS["x265"]
    data = codec.encode(np.roll(frames, 3, 1), 30)
    decoded = codec.decode(data)
    assert decoded.shape == frames.shape and 0 < codec.payload_bytes(data) < len(data)
    assert np.abs(decoded.astype(int) - np.roll(frames, 3, 1)).mean() < 12
