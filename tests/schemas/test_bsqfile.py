"""A .bsq file says what it holds in few bytes, and whatever is wrong with one is a single line."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import bsqfile
from schemas.bsqfile import FIXED, BsqFile, CodedItem, parse_bsq
from schemas.errors import StreamError


def bsq(items, **values):
    """A file whose streams are numbered bytes."""
    given_values = {
        "tokenizer": bytes(range(8)),
        "prior": bytes(range(8, 16)),
        "bits": 18,
        "grid": (16, 16),
        "patch": 8,
        "clip_frames": 16,
        "lanes": 32,
        "tokens_crc32": 0x01020304,
        **values,
    }
    file = BsqFile(items=tuple(items), streams=(), **given_values)
    streams = tuple(bytes([number % 256]) * (1 + number % 3) for number in range(file.num_streams))
    return dataclasses.replace(file, streams=streams)


def resealed(content):
    """The same bytes with a checksum that fits."""
    blank = content[: FIXED.size - 4] + bytes(4) + content[FIXED.size :]
    return blank[: FIXED.size - 4] + struct.pack("<I", zlib.crc32(blank)) + blank[FIXED.size :]


items = st.builds(
    CodedItem,
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    frames=st.integers(2, 40),
    start_ms=st.integers(-(1 << 30), 1 << 30),
    step_us=st.integers(0, 1 << 30),
    name=st.text(max_size=20).filter(lambda text: text.isprintable()),
) | st.builds(CodedItem, width=st.integers(1, 300), height=st.integers(1, 300), name=st.text("ab/.-é", max_size=9))


@given(
    st.lists(items, min_size=1, max_size=5),
    st.fixed_dictionaries(
        {
            "bits": st.integers(1, 64),
            "grid": st.tuples(st.integers(4, 20), st.integers(4, 20)),
            "patch": st.integers(8, 16),
            "clip_frames": st.integers(1, 16),
            "lanes": st.integers(3, 255),
            "first_lane": st.integers(0, 2),
            "arithmetic": st.integers(0, 1),
        }
    ),
)
def test_what_is_written_is_read(several, values):
    pack = bsq(several, is_pack=True, **values)
    assert parse_bsq(pack.to_bytes(), "x") == pack
    single = bsq([dataclasses.replace(several[0], name="")], **values)
    assert parse_bsq(single.to_bytes(), "x") == single


def test_the_bytes_of_a_file():
    file = dataclasses.replace(bsq([CodedItem(200, 100)], lanes=2, first_lane=1), streams=(b"\xaa", b"\xbb\xcc"))
    content = file.to_bytes()
    assert content[:4] == b"BSQ\x01" and content[4:7] == bytes([0, 2, 1])
    assert content[7:23] == bytes(range(16)) and content[23:27] == bytes([4, 3, 2, 1])
    # L, grid, patch, frames of a clip; 200 = 0x48 + 128 * 1, 100, one frame; 1 byte in the first of two streams.
    assert content[31:] == bytes([18, 16, 16, 8, 16, 0xC8, 0x01, 100, 1, 1]) + b"\xaa\xbb\xcc"
    assert file.tiles(file.items[0]) == (1, 2) and file.clips(file.items[0]) == [1, 1]


def test_a_header_takes_at_most_48_bytes():
    day_ms = 24 * 3600 * 1000
    clips = [CodedItem(1920, 1080, 30, day_ms, 33_367), CodedItem(128, 128, 16, 0, 125_000)]
    for item in [CodedItem(16_383, 500), *clips]:
        file = bsq([item], lanes=255, first_lane=0, clip_frames=16, grid=(32, 32))
        assert len(file.streams) == 1
        assert len(file.to_bytes()) - file.payload_bytes <= 48


def test_names_of_a_pack_take_few_bytes():
    pack = bsq([CodedItem(128, 128, name=f"photo-{number:06d}") for number in range(500)], is_pack=True)
    assert len(pack.to_bytes()) - pack.payload_bytes < 500 * 6


def test_the_clips_of_larger_and_longer_items():
    file = bsq([CodedItem(300, 129, 20)])
    assert file.tiles(file.items[0]) == (2, 3) and file.clips(file.items[0]) == [16] * 6 + [4] * 6
    assert file.num_tokens == 20 * 6 * 256 and file.num_clips == 12 and file.num_pixels == 300 * 129 * 20


@given(st.data())
def test_a_file_that_is_cut_or_garbled_is_refused(data):
    content = bytearray(bsq([CodedItem(300, 129, 20, name="a"), CodedItem(8, 8, name="b")], is_pack=True).to_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StreamError) as caught:
        parse_bsq(bytes(content), "shown.bsq")
    assert str(caught.value).startswith("shown.bsq: ") and "\n" not in str(caught.value)


@given(st.data())
def test_a_hostile_file_with_a_right_checksum_is_read_or_refused_in_bounded_memory(data):
    file = bsq([CodedItem(300, 129, 20, name="a"), CodedItem(8, 8, name="b")], is_pack=data.draw(st.booleans(), "pack"))
    if not file.is_pack:
        file = bsq([CodedItem(300, 129, 20)])
    content = bytearray(file.to_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    if file.is_pack and data.draw(st.booleans()):
        table = zlib.compress(data.draw(st.binary(max_size=60)))
        content = content[: FIXED.size] + bytes([len(table)]) + table
    hostile = resealed(bytes(content))
    tracemalloc.start()
    try:
        parsed = parse_bsq(hostile, "x")
        assert parsed.num_tokens <= bsqfile.MAX_TOKENS and len(parsed.streams) == parsed.num_streams
    except StreamError as error:
        assert "\n" not in str(error)
    finally:
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_tables_that_inflate_without_end_are_refused():
    bomb = zlib.compress(bytes(bsqfile.MAX_TABLE_BYTES + 1), 9)
    content = bsq([CodedItem(8, 8)], is_pack=True).to_bytes()[: FIXED.size]
    for table in (bomb, b"no zlib", zlib.compress(b"") + b"more"):
        with pytest.raises(StreamError, match="table"):
            parse_bsq(resealed(content + bsqfile._varint(len(table)) + table), "x")


def test_many_empty_streams_are_refused_before_they_are_listed():
    small = bsq([CodedItem(8, 8)], is_pack=True).to_bytes()
    sizes = (18, 1, 1, 1, 1, 1, 0, 8191, 4095, 1)  # tokens of one pixel, each in a lane of its own
    table = zlib.compress(b"".join(map(bsqfile._varint, sizes)) + bytes(8191 * 4095 - 1), 9)
    fixed = bytearray(small[: FIXED.size])
    fixed[5] = 1
    with pytest.raises(StreamError, match="33,542,145 streams; at most 262,144"):
        parse_bsq(resealed(bytes(fixed) + bsqfile._varint(len(table)) + table), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"PK\x03\x04" + content[4:], r"no \.bsq file; it begins with b'PK"),
        (lambda content: content[:3] + b"\x02" + content[4:], "format version 2; this bsqtok reads version 1. Update"),
        (lambda content: content[:20], "cut off after 20 bytes"),
        (lambda content: content[:-1], "damaged or cut off"),
        (lambda content: resealed(content[:4] + b"\x05" + content[5:]), "arithmetic number 5 is not known"),
        (lambda content: resealed(content[:5] + b"\x00" + content[6:]), "sizes that cannot be"),
    ],
)
def test_every_mistake_has_a_line(change, message):
    with pytest.raises(StreamError, match=message):
        parse_bsq(change(bsq([CodedItem(8, 8)]).to_bytes()), "x")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (CodedItem(70_000, 8), "70,000 x 8 px, 1 frames; at most 65,535 px a side"),
        (CodedItem(20_000, 20_000), "at most 134,217,728 pixels"),
        (CodedItem(128, 128, 60_000), "at most 134,217,728 pixels"),
    ],
)
def test_items_beyond_limits_are_neither_written_nor_read(item, message):
    with pytest.raises(StreamError, match=message):
        bsq([item]).to_bytes()
    small = bsq([CodedItem(8, 8)]).to_bytes()
    table = b"".join(map(bsqfile._varint, (18, 16, 16, 8, 16, item.width, item.height, item.frames)))
    table += bytes(2) if item.frames > 1 else b""
    with pytest.raises(StreamError, match=message):
        parse_bsq(resealed(small[: FIXED.size] + table), "x")
