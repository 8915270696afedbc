"""The layout that readers rely on: row groups between clips, one page of plain bytes each, a footer that explains."""

from __future__ import annotations

import io
import itertools
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parquet import read_parquet
from schemas.errors import BsqError
from schemas.tokenfile import (
    ROW_GROUP_BYTES,
    ROW_GROUP_ROWS,
    TokenFooter,
    row_group_bounds,
    serialise_token_file,
    token_schema,
)

FOOTER = TokenFooter(
    fingerprint="f" * 64, shard=42, bits=18, group_size=9, grid=(4, 4), views=1, samples=3, failed=0, source_bytes=9
)


def token_table(tokens: list[bytes], *, views: int = 1, frames: list[int] | None = None) -> pa.Table:
    """Rows of images (or clips), `views` to a sample, with the token bytes given."""
    count = len(tokens)
    columns: dict[str, Any] = {
        "key": [f"key{row // views:05d}" for row in range(count)],
        "clip": [0] * count,
        "view": [row % views for row in range(count)],
        "frames": frames or [1] * count,
        "tokens": tokens,
        "width": [640] * count,
        "height": [480] * count,
        "crop": [[80, 0, 480, 480]] * count,
        "flipped": [False] * count,
        "start": [None] * count,
        "frame_times": [None] * count,
        "position": [row // views for row in range(count)],
        "source_offset": [512 + 1024 * (row // views) for row in range(count)],
        "caption": [None if row % 3 else f"picture {row}" for row in range(count)],
    }
    return pa.table(columns, schema=token_schema(["caption"]))


def random_tokens(count: int, num_bytes: int, seed: int = 0) -> list[bytes]:
    generator = np.random.default_rng(seed)
    return [generator.bytes(num_bytes) for _ in range(count)]


# --- row groups


@st.composite
def clips_of_rows(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Packed sizes and clip starts of clips with several views; sizes near the limits are as likely as small ones."""
    views = draw(st.integers(1, 5))
    one_size = st.sampled_from([1, 2304, 4608, 4095, 4096, 4097, ROW_GROUP_BYTES // 2, ROW_GROUP_BYTES, 5 << 20])
    clips = draw(st.lists(one_size, max_size=40))
    repeats = draw(st.integers(1, 60))
    sizes = [size for clip in clips for size in [clip] * repeats for _ in range(views)]
    starts = [row % views == 0 for row in range(len(sizes))]
    return sizes, starts


@given(clips_of_rows())
@settings(deadline=None)
def test_row_groups_hold_whole_clips_within_the_limits_and_are_filled_greedily(rows: tuple[list[int], list[bool]]):
    sizes, starts = rows
    bounds = row_group_bounds(sizes, starts)
    if not sizes:
        assert bounds == [0]
        return
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    clip_ends = [*[row for row in range(1, len(sizes)) if starts[row]], len(sizes)]
    for first, last in itertools.pairwise(bounds):
        assert last > first
        assert starts[first]
        num_clips = sum(starts[first:last])
        fits = last - first <= ROW_GROUP_ROWS and sum(sizes[first:last]) <= ROW_GROUP_BYTES
        assert fits or num_clips == 1
        if last < len(sizes):
            with_next_clip = next(end for end in clip_ends if end > last)
            assert with_next_clip - first > ROW_GROUP_ROWS or sum(sizes[first:with_next_clip]) > ROW_GROUP_BYTES


@pytest.mark.parametrize(
    ("num_rows", "views", "num_bytes", "expected"),
    [
        (1024, 1, 8, [0, 1024]),  # exactly full
        (1025, 1, 8, [0, 1024, 1025]),
        (1026, 3, 8, [0, 1023, 1026]),  # 1,024 is no multiple of three views
        (4, 1, 2 << 20, [0, 2, 4]),  # exactly 4 MiB
        (4, 1, (2 << 20) + 1, [0, 1, 2, 3, 4]),
        (4, 2, 4 << 20, [0, 2, 4]),  # a clip whose views alone exceed the limit stands alone
    ],
)
def test_row_groups_end_where_a_limit_would_be_passed(num_rows, views, num_bytes, expected):
    assert row_group_bounds([num_bytes] * num_rows, [row % views == 0 for row in range(num_rows)]) == expected


# --- footer


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@given(
    footer=st.builds(
        TokenFooter,
        format_version=st.just(1),
        fingerprint=texts,
        shard=st.integers(0, 2**40),
        part=st.integers(0, 99),
        bits=st.integers(1, 64),
        group_size=st.integers(1, 16),
        grid=st.tuples(st.integers(1, 512), st.integers(1, 512)),
        views=st.integers(1, 64),
        samples=st.integers(0, 2**40),
        failed=st.integers(0, 2**40),
        failures_sha256=st.sampled_from(["", "a" * 64]),
        source_bytes=st.integers(0, 2**60),
        source_etag=texts,
        partial=st.booleans(),
    )
)
def test_a_footer_reads_back_as_it_was_written(footer: TokenFooter):
    stored = {key.encode(): value.encode() for key, value in footer.to_metadata().items()}
    assert all(isinstance(value, str) for value in footer.to_metadata().values())
    assert TokenFooter.from_metadata(stored) == footer


def test_a_footer_reads_back_from_the_file():
    footer = TokenFooter.from_metadata(
        pq.read_metadata(io.BytesIO(serialise_token_file(token_table([]), FOOTER).data)).metadata
    )
    assert footer == FOOTER


def test_the_footer_says_what_formats_promise():
    assert FOOTER.to_metadata() == {
        "bsqtok.format_version": "1",
        "bsqtok.fingerprint": "f" * 64,
        "bsqtok.shard": "42",
        "bsqtok.part": "0",
        "bsqtok.bits": "18",
        "bsqtok.group_size": "9",
        "bsqtok.grid": "4,4",
        "bsqtok.views": "1",
        "bsqtok.bit_order": "lsb_first",
        "bsqtok.channel_order": "msb_first",
        "bsqtok.samples": "3",
        "bsqtok.failed": "0",
        "bsqtok.failures_sha256": "",
        "bsqtok.source_bytes": "9",
        "bsqtok.source_etag": "",
        "bsqtok.partial": "false",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bsqtok.format_version": None}, "not a token file"),
        ({"bsqtok.format_version": "2"}, "format version 2"),
        ({"bsqtok.bits": "many"}, "damaged"),
        ({"bsqtok.grid": "4"}, "damaged"),
        ({"bsqtok.partial": "maybe"}, "damaged"),
        ({"bsqtok.shard": None}, "damaged"),
    ],
)
def test_a_footer_that_cannot_be_trusted_is_refused_in_words(change, words):
    metadata = FOOTER.to_metadata() | change
    stored = {key.encode(): value.encode() for key, value in metadata.items() if value is not None}
    with pytest.raises(BsqError, match=words):
        TokenFooter.from_metadata(stored)


# --- layout


def test_the_token_column_is_one_plain_page_for_each_row_group():
    encoded = serialise_token_file(token_table(random_tokens(2500, 36)), FOOTER)
    metadata = pq.read_metadata(io.BytesIO(encoded.data))
    assert encoded.row_groups == [1024, 1024, 452]
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(metadata.schema.names.index("tokens"))
        assert chunk.path_in_schema == "tokens"
        assert chunk.compression == "UNCOMPRESSED"
        assert set(chunk.encodings) <= {"PLAIN", "RLE"}
        assert not chunk.has_dictionary_page
        assert chunk.statistics is None
        page = PageHeader(encoded.data, encoded.tokens_offset[group])
        assert page.type == 0
        assert page.encoding == 0
        assert page.num_values == encoded.row_groups[group]
        assert page.uncompressed_bytes == page.compressed_bytes == encoded.row_groups[group] * (4 + 36)
        assert page.crc is not None
        assert encoded.tokens_offset[group] + page.header_bytes + page.compressed_bytes == (
            chunk.data_page_offset + chunk.total_compressed_size
        )


def test_other_columns_are_compressed_and_carry_statistics():
    metadata = pq.read_metadata(io.BytesIO(serialise_token_file(token_table(random_tokens(10, 36)), FOOTER).data))
    for index in range(metadata.num_columns):
        chunk = metadata.row_group(0).column(index)
        if chunk.path_in_schema != "tokens":
            assert chunk.compression == "ZSTD", chunk.path_in_schema
            assert chunk.statistics is not None, chunk.path_in_schema
    key = metadata.row_group(0).column(0).statistics
    assert (key.min, key.max) == ("key00000", "key00009")


def test_required_columns_hold_no_null():
    schema = pq.read_schema(io.BytesIO(serialise_token_file(token_table([]), FOOTER).data))
    optional = {field.name for field in schema if field.nullable}
    assert optional == {"start", "frame_times", "caption"}


def test_an_empty_shard_makes_a_file_without_rows():
    encoded = serialise_token_file(token_table([]), FOOTER)
    assert encoded.row_groups == encoded.tokens_offset == []
    assert read_parquet(encoded.data).num_rows == 0


@pytest.mark.parametrize("frames", [[1] * 2100, [1 + row % 5 for row in range(2100)]], ids=["images", "clips"])
def test_rows_read_at_byte_offsets_are_those_that_parquet_reads(frames):
    generator = np.random.default_rng(1)
    tokens = [generator.bytes(36 * count) for count in frames]
    encoded = serialise_token_file(token_table(tokens, frames=frames), FOOTER)
    row = 0
    for num_rows, offset in zip(encoded.row_groups, encoded.tokens_offset, strict=True):
        place = offset + PageHeader(encoded.data, offset).header_bytes
        for _ in range(num_rows):
            (length,) = struct.unpack_from("<I", encoded.data, place)
            assert length == 36 * frames[row]
            assert encoded.data[place + 4 : place + 4 + length] == tokens[row]
            place += 4 + length
            row += 1
    assert row == len(tokens)
    assert read_parquet(encoded.data)["tokens"].to_pylist() == tokens


def test_views_of_a_clip_share_a_row_group():
    encoded = serialise_token_file(token_table(random_tokens(3 * 700, 36), views=3), FOOTER)
    assert encoded.row_groups == [1023, 1023, 54]


def test_the_same_rows_make_the_same_bytes():
    table = token_table(random_tokens(1500, 36))
    chunked = pa.concat_tables([table.slice(first, 100) for first in range(0, 1500, 100)])
    assert serialise_token_file(table, FOOTER).data == serialise_token_file(chunked, FOOTER).data


def test_the_page_of_a_known_row_group_byte_for_byte():
    """Three rows of 16 tokens of 18 bits whose values are worked out by hand, and the page that holds them."""
    values = [[0] * 16, [1] * 16, [2**18 - 1] + [0] * 15]
    tokens = [sum(value << 18 * place for place, value in enumerate(row)).to_bytes(36, "little") for row in values]
    # Value 1 every 18 bits: bits 0, 18, 36, 54, 72 ... set; 72 bits are 9 bytes, so the pattern repeats.
    assert tokens[1] == bytes([1, 0, 4, 0, 16, 0, 64, 0, 0]) * 4
    assert tokens[2] == b"\xff\xff\x03" + bytes(33)
    encoded = serialise_token_file(token_table(tokens), FOOTER)
    (offset,) = encoded.tokens_offset
    start = offset + PageHeader(encoded.data, offset).header_bytes
    page = encoded.data[start : start + 3 * 40]
    assert page == b"".join(b"\x24\x00\x00\x00" + row for row in tokens)


def test_page_checksums_catch_a_flipped_bit():
    encoded = serialise_token_file(token_table(random_tokens(10, 36)), FOOTER)
    damaged = bytearray(encoded.data)
    damaged[encoded.tokens_offset[0] + 100] ^= 4
    with pytest.raises(OSError, match="CRC"):
        read_parquet(bytes(damaged), check_pages=True)


class PageHeader:
    """A Parquet page header, parsed here from the format's own description (Thrift compact protocol)."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data, self._place = data, offset
        fields = self._read_struct()
        self.header_bytes = self._place - offset
        self.type: int = fields[1]
        self.uncompressed_bytes: int = fields[2]
        self.compressed_bytes: int = fields[3]
        self.crc: int | None = fields.get(4)
        self.num_values: int = fields[5][1]
        self.encoding: int = fields[5][2]

    def _read_struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._data[self._place]) != 0:
            self._place += 1
            number = number + (head >> 4) if head >> 4 else self._read_zigzag()
            fields[number] = self._read_value(head & 15)
        self._place += 1
        return fields

    def _read_value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._read_zigzag()
        if kind == 8:
            length = self._read_varint()
            self._place += length
            return self._data[self._place - length : self._place]
        if kind == 12:
            return self._read_struct()
        raise AssertionError(f"Thrift type {kind} does not occur in page headers")

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._place]
            self._place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _read_zigzag(self) -> int:
        value = self._read_varint()
        return value >> 1 ^ -(value & 1)
