"""Reads Parquet without pyarrow's threads.

They may hold the last reference to a Python file or buffer when the interpreter ends, and then abort the process after
all its work is done: on a busy machine in up to half of all runs (pyarrow 26).  What is read here is small, or one row
group of a few megabytes, so threads would gain nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_ERRORS = (pa.ArrowException, OSError)
"""What reading damaged Parquet raises."""


def open_parquet(source: bytes | io.RawIOBase, *, check_pages: bool = False) -> pq.ParquetFile:
    """Open Parquet bytes, or a file object that seeks; with `check_pages` each page is held against its checksum.

    Every read of the file that is returned must be told `use_threads=False`.  Raises PARQUET_ERRORS."""
    reader = pa.BufferReader(source) if isinstance(source, bytes) else source
    return pq.ParquetFile(reader, pre_buffer=False, page_checksum_verification=check_pages)


def read_parquet(
    source: bytes | io.RawIOBase, columns: Sequence[str] | None = None, *, check_pages: bool = False
) -> pa.Table:
    """Read all rows of `columns`, or of all columns.  Raises PARQUET_ERRORS."""
    return open_parquet(source, check_pages=check_pages).read(columns=columns, use_threads=False)
