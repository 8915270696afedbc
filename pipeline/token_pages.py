"""Finds the rows of a plain, uncompressed `tokens` column at byte offsets, without decoding it.

Parquet writes a column chunk as pages: a header (Thrift's compact protocol), then the values.  In a plain page of byte
arrays each value follows its length in four bytes, so rows of one size lie at one stride.  Whatever is not exactly
that is refused, and then pyarrow decodes the row group instead: slower, and never a different answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.thrift_compact import CompactReader, NotThrift

PREFIX_BYTES = 4
"""Length before each value of a BYTE_ARRAY page."""
MAX_HEADER_BYTES = 1 << 16

_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN = 0
_LEVELS = (3, 4)
"""Encodings of levels: RLE, BIT_PACKED."""
_PLAIN_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}
"""Of values, and of levels."""

Octets = npt.NDArray[np.uint8]


class NotPlain(Exception):
    """The bytes are no plain page of byte arrays, or not all of one."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What the header of a plain data page says."""

    header_bytes: int
    value_bytes: int
    num_values: int


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where the `tokens` of a row group lie in the file."""

    offset: int
    num_bytes: int
    """Page headers and pages."""
    num_rows: int


def chunk_place(column: Any, num_rows: int, file_bytes: int) -> ChunkPlace | None:
    """The bytes of a column chunk, from pyarrow's ColumnChunkMetaData; None when it cannot be read at offsets."""
    if (
        column.physical_type != "BYTE_ARRAY"
        or column.path_in_schema != "tokens"
        or column.compression != "UNCOMPRESSED"
        or column.has_dictionary_page
        or column.total_compressed_size != column.total_uncompressed_size
        or column.num_values != num_rows
        or not {"PLAIN"} <= set(column.encodings) <= _PLAIN_ENCODINGS
        or column.file_path
    ):
        return None
    offset, num_bytes = column.data_page_offset, column.total_compressed_size
    if offset < 4 or num_bytes < 0 or offset + num_bytes > file_bytes - 8:
        return None
    return ChunkPlace(offset, num_bytes, num_rows)


def parse_page_header(data: bytes | memoryview) -> PageHeader:
    """Parse the header at the start of `data`.  Raises NotPlain unless it is that of a plain data page without levels.

    Levels: the column must be required and flat, which its schema says and the caller has checked."""
    reader = CompactReader(data)
    try:
        header = reader.struct()
    except NotThrift as error:
        raise NotPlain(str(error)) from error
    kind = header.get(1)
    body = header.get(5 if kind == _DATA_PAGE else 8)
    if kind not in (_DATA_PAGE, _DATA_PAGE_V2) or not isinstance(body, dict):
        raise NotPlain("no data page")
    # All that the format requires must be there: a header without it was not written, but damaged.
    if {2, 3} - header.keys() or set(range(1, 5 if kind == _DATA_PAGE else 7)) - body.keys():
        raise NotPlain("a field is missing")
    uncompressed, compressed, num_values = header[2], header[3], body[1]
    if not all(isinstance(each, int) for each in (uncompressed, compressed, num_values)):
        raise NotPlain("a field of another type")
    if uncompressed != compressed or compressed < 0 or num_values < 0:
        raise NotPlain("a compressed page")
    if kind == _DATA_PAGE:
        plain = body[2] == _PLAIN and body[3] in _LEVELS and body[4] in _LEVELS
    else:
        plain = body[4] == _PLAIN and (body[2], body[3], body[5], body[6]) == (0, num_values, 0, 0)
    if not plain:
        raise NotPlain("another encoding, or levels")
    return PageHeader(reader.place, compressed, num_values)


def find_pages(chunk: Octets, num_rows: int) -> list[tuple[int, int, int]]:
    """Of each page of a column chunk: first byte of its values, their bytes, their number.

    Raises NotPlain unless plain pages fill the chunk and hold `num_rows` rows."""
    pages = []
    place = rows = 0
    view = chunk.data
    while place < len(chunk):
        header = parse_page_header(view[place : place + MAX_HEADER_BYTES])
        first = place + header.header_bytes
        place = first + header.value_bytes
        pages.append((first, header.value_bytes, header.num_values))
        rows += header.num_values
    if place != len(chunk) or rows != num_rows:
        raise NotPlain("pages do not add up to their chunk")
    return pages


def fixed_header_bytes(place: ChunkPlace, row_bytes: int) -> int | None:
    """Bytes before the first row when one page holds the whole chunk and every row has `row_bytes`; None if it cannot.

    The header itself must still be read and checked, by `check_fixed_header`."""
    header_bytes = place.num_bytes - place.num_rows * (PREFIX_BYTES + row_bytes)
    return header_bytes if 0 < header_bytes <= MAX_HEADER_BYTES else None


def check_fixed_header(data: bytes | memoryview, place: ChunkPlace, row_bytes: int) -> None:
    """Raise NotPlain unless `data` is exactly the header of one page that holds the chunk in rows of `row_bytes`."""
    header = parse_page_header(data)
    expected = PageHeader(len(data), place.num_rows * (PREFIX_BYTES + row_bytes), place.num_rows)
    if header != expected:
        raise NotPlain("not one page of rows of one size")


def check_prefixes(rows_RO: Octets) -> None:
    """Raise NotPlain unless every row, prefix included, begins with the length of what follows."""
    lengths_R = np.ndarray((len(rows_RO),), "<u4", rows_RO, 0, (rows_RO.shape[1],))
    if not (lengths_R == rows_RO.shape[1] - PREFIX_BYTES).all():
        raise NotPlain("a row of another size")


def row_starts(chunk: Octets, row_bytes_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First byte of each row's tokens in a column chunk of rows of `row_bytes_R` bytes.  Raises NotPlain."""
    starts_R = np.empty(len(row_bytes_R), np.int64)
    row = 0
    for first, num_bytes, num_values in find_pages(chunk, len(row_bytes_R)):
        steps = row_bytes_R[row : row + num_values] + PREFIX_BYTES
        if steps.sum() != num_bytes:
            raise NotPlain("rows of other sizes")
        starts_R[row : row + num_values] = first + np.cumsum(steps) - steps + PREFIX_BYTES
        row += num_values
    octets_R4 = chunk[starts_R[:, np.newaxis] + np.arange(-PREFIX_BYTES, 0)]
    if not (octets_R4.view("<u4")[:, 0] == row_bytes_R).all():
        raise NotPlain("rows of other sizes")
    return starts_R
