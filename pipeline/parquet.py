"""Reads Parquet without pyarrow's threads.

They may hold the last reference to a Python file or buffer when the interpreter ends, and then abort the process after
all its work is done: on a busy machine in up to half of all runs (pyarrow 26).  What is read here is small, or one row
group of a few megabytes, so threads would gain nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.thrift_compact import CompactReader, NotThrift

PARQUET_ERRORS = (pa.ArrowException, OSError)
"""What reading damaged Parquet raises."""


_TAIL_BYTES = 8
"""Length of the metadata, and PAR1."""
_NUM_CODECS = 8
# Fields of Parquet's FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and SizeStatistics.
_ROW_GROUPS, _COLUMNS, _COLUMN_METADATA, _CODEC, _SIZES, _REPETITIONS, _DEFINITIONS = 4, 1, 3, 4, 16, 2, 3


def read_footer(footer: bytes) -> pq.FileMetaData:
    """Parse the end of a Parquet file, from the first byte of its metadata to the last of the file.

    pyarrow ends the whole process, rather than raise, when a column chunk is looked at that has no metadata, names an
    unknown codec, or counts other levels than there are; so these are looked for first.  Raises PARQUET_ERRORS."""
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    try:
        groups = CompactReader(memoryview(footer)[:-_TAIL_BYTES]).struct().get(_ROW_GROUPS) or []
        for group in groups:
            for number, chunk in enumerate(group[_COLUMNS]):
                _check_chunk(chunk[_COLUMN_METADATA], metadata.schema.column(number))
    except (NotThrift, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise pa.ArrowInvalid("its footer is damaged") from error
    return metadata


def _check_chunk(chunk: dict[int, Any], column: pq.ColumnSchema) -> None:
    if not 0 <= chunk[_CODEC] < _NUM_CODECS:
        raise ValueError("a codec that Parquet does not have")
    sizes = chunk.get(_SIZES) or {}
    for field, level in ((_REPETITIONS, column.max_repetition_level), (_DEFINITIONS, column.max_definition_level)):
        if len(sizes.get(field) or []) not in (0, level + 1):
            raise ValueError("a histogram of other levels")


def open_parquet(source: bytes | io.RawIOBase, *, check_pages: bool = False) -> pq.ParquetFile:
    """Open Parquet bytes, or a file object that seeks; with `check_pages` each page is held against its checksum.

    Every read of the file that is returned must be told `use_threads=False`.  Raises PARQUET_ERRORS."""
    reader = io.BytesIO(source) if isinstance(source, bytes) else source
    num_bytes = reader.seek(0, io.SEEK_END)
    reader.seek(max(0, num_bytes - _TAIL_BYTES))
    tail = reader.read()
    footer_bytes = int.from_bytes(tail[-_TAIL_BYTES:-4], "little") + _TAIL_BYTES
    metadata = None
    # What does not end as Parquet does is refused in pyarrow's words.
    if tail.endswith(b"PAR1") and footer_bytes <= num_bytes:
        reader.seek(num_bytes - footer_bytes)
        metadata = read_footer(reader.read())
    return pq.ParquetFile(
        pa.BufferReader(source) if isinstance(source, bytes) else source,
        metadata=metadata,
        pre_buffer=False,
        page_checksum_verification=check_pages,
    )


def read_parquet(
    source: bytes | io.RawIOBase, columns: Sequence[str] | None = None, *, check_pages: bool = False
) -> pa.Table:
    """Read all rows of `columns`, or of all columns.  Raises PARQUET_ERRORS."""
    return open_parquet(source, check_pages=check_pages).read(columns=columns, use_threads=False)
