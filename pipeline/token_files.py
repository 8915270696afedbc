"""Reads rows and columns out of the token files of a dataset, local, cached or remote.

A file is opened when it is first needed, and held against what the manifest says of it: its size, and in its footer
its dataset, shard and rows.  Tokens are then read at byte offsets (`pipeline.token_pages`), or decoded by pyarrow
where a file was rewritten in a way that does not allow it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.file_cache import FileCache
from pipeline.parquet import PARQUET_ERRORS, read_footer
from pipeline.storage import Storage, open_storage
from pipeline.token_index import TokenIndex, read_file_column
from pipeline.token_pages import (
    PREFIX_BYTES,
    ChunkPlace,
    NotPlain,
    Octets,
    check_fixed_header,
    check_prefixes,
    chunk_place,
    fixed_header_bytes,
    row_starts,
)
from schemas.errors import BsqError
from schemas.tokenfile import TokenFooter

Check = Literal["size", "sha256"]

_TAIL_BYTES = 1 << 16
_MAX_OPEN = 512

Numbers = npt.NDArray[np.int64]


class _Source(Protocol):
    """The bytes of one file."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Fill `buffers` one after the other from `offset` on; False when the file ends before."""

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` from `offset`."""

    def read_each(self, offsets: Sequence[int], buffers: Sequence[memoryview]) -> bool:
        """Fill each buffer from an offset of its own; False when the file ends before."""


class _LocalSource:
    def __init__(self, file: io.FileIO) -> None:
        # The object closes the descriptor when its last user is gone.
        self._file = file

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        wanted = sum(map(len, buffers))
        done = os.preadv(self._file.fileno(), buffers, offset)
        if done < wanted:
            # A signal, or more than the 2 GiB of one call.
            whole = memoryview(bytearray(wanted))
            done = 0
            while step := os.preadv(self._file.fileno(), [whole[done:]], offset + done):
                done += step
            _scatter(whole, buffers)
        return done == wanted

    def read(self, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), num_bytes, offset)

    def read_each(self, offsets: Sequence[int], buffers: Sequence[memoryview]) -> bool:
        descriptor, preadv = self._file.fileno(), os.preadv
        for offset, buffer in zip(offsets, buffers, strict=True):
            if preadv(descriptor, (buffer,), offset) != len(buffer):
                return False
        return True


class _RemoteSource:
    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        wanted = sum(map(len, buffers))
        data = self.read(offset, wanted)
        _scatter(memoryview(data), buffers)
        return len(data) == wanted

    def read(self, offset: int, num_bytes: int) -> bytes:
        return self._storage.read_range(self._name, offset, num_bytes) if num_bytes else b""

    def read_each(self, offsets: Sequence[int], buffers: Sequence[memoryview]) -> bool:
        return all(self.read_into(offset, (buffer,)) for offset, buffer in zip(offsets, buffers, strict=True))


def _scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    place = 0
    for buffer in buffers:
        part = data[place : place + len(buffer)]
        buffer[: len(part)] = part
        place += len(buffer)


class _Segment(io.RawIOBase):
    """A file for pyarrow's reader: bytes that are there already, and requests for all others."""

    def __init__(self, source: _Source, file_bytes: int) -> None:
        super().__init__()
        self._source = source
        self._size = file_bytes
        self._place = 0
        self.start, self.data = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._size - self._place)
        wanted = rest if size is None or size < 0 else min(size, rest)
        first = self._place - self.start
        if first >= 0 and first + wanted <= len(self.data):
            data = self.data[first : first + wanted]
        else:
            data = self._source.read(self._place, wanted)
        self._place += len(data)
        return data


class TokenFile:
    """One token file, opened and checked.  Units are numbered within the file here."""

    def __init__(self, source: _Source, printable: str, dataset: str, file_bytes: int, *, in_one_request: bool) -> None:
        """Raises BsqError when the file is damaged or not as recorded."""
        self._source = source
        self._name = printable
        self._dataset = dataset
        self._bytes = file_bytes
        self._in_one_request = in_one_request
        self._lock = threading.Lock()
        self._parquet: pq.ParquetFile | None = None
        with self._told():
            self._metadata = self._read_metadata()
            self.footer = TokenFooter.from_metadata(self._metadata.metadata)
            column = next(
                (number for number in range(self._metadata.num_columns) if self._path_of(number) == "tokens"), None
            )
            if column is None:
                raise self.damaged("it has no tokens")
            self._groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
            levels = self._metadata.schema.column(column)
            flat = levels.max_definition_level == 0 and levels.max_repetition_level == 0
            self._places: list[ChunkPlace | None] = [
                chunk_place(group.column(column), group.num_rows, file_bytes) if flat else None
                for group in self._groups
            ]
        self._headers: dict[int, int | None] = {}

    @property
    def unit_rows(self) -> list[int]:
        """Rows of each unit, as the footer says."""
        return [group.num_rows for group in self._groups]

    def read_fixed(self, unit: int, rows_RS: Octets) -> None:
        """Fill `rows_RS` with the rows of a unit that all have S - 4 bytes; the first 4 of each are then its prefix.

        Raises BsqError when they cannot be read, or have other sizes."""
        row_bytes = rows_RS.shape[1] - PREFIX_BYTES
        place = self._places[unit]
        header_bytes = fixed_header_bytes(place, row_bytes) if place is not None else None
        if place is not None and header_bytes is not None:
            header = bytearray(header_bytes)
            with self._told(), contextlib.suppress(NotPlain):
                if self._source.read_into(place.offset, [memoryview(header), rows_RS.data.cast("B")]):
                    check_fixed_header(bytes(header), place, row_bytes)
                    check_prefixes(rows_RS)
                    self._headers[unit] = header_bytes
                    return
        chunk, starts_R, sizes_R = self._decode(unit)
        if len(starts_R) != len(rows_RS) or (sizes_R != row_bytes).any():
            raise self.damaged("its rows have other sizes than recorded")
        if len(starts_R):
            # Decoded values follow each other without gaps.
            rows_RS[:, PREFIX_BYTES:] = chunk[starts_R[0] : starts_R[0] + sizes_R.sum()].reshape(-1, row_bytes)

    def read_ragged(self, unit: int, row_bytes_R: Numbers) -> tuple[Octets, Numbers]:
        """Bytes that hold the rows of a unit, and where in them each row begins.  Raises BsqError."""
        place = self._places[unit]
        if place is not None and place.num_rows == len(row_bytes_R):
            chunk = np.empty(place.num_bytes, np.uint8)
            with self._told(), contextlib.suppress(NotPlain):
                if self._source.read_into(place.offset, [chunk.data]):
                    return chunk, row_starts(chunk, row_bytes_R)
        chunk, starts_R, sizes_R = self._decode(unit)
        if not np.array_equal(sizes_R, row_bytes_R):
            raise self.damaged("its rows have other sizes than recorded")
        return chunk, starts_R

    def read_rows(self, unit: int, rows: Numbers, out: Sequence[memoryview]) -> bool:
        """Read single rows of a unit of rows of one size S - 4 into buffers of S bytes, with their prefixes.

        Returns False where rows cannot be read one by one; the caller then reads the unit, as it does when a prefix is
        not S - 4.  Raises BsqError."""
        if not len(rows):
            return True
        stride = len(out[0])
        header_bytes = self._header_of(unit, stride - PREFIX_BYTES)
        place = self._places[unit]
        if header_bytes is None or place is None:
            return False
        try:
            return self._source.read_each((rows * stride + (place.offset + header_bytes)).tolist(), out)
        except FileNotFoundError as error:
            raise self.damaged("it is not there") from error

    def read_columns(self, unit: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a unit as a table.  Raises BsqError."""
        with self._lock, self._told():
            if self._parquet is None:
                self._file = _Segment(self._source, self._bytes)
                self._parquet = pq.ParquetFile(self._file, metadata=self._metadata, pre_buffer=False)
            if self._in_one_request:
                self._file.start, self._file.data = self._request_columns(unit, columns)
            try:
                return self._parquet.read_row_group(unit, columns=list(columns), use_threads=False)
            finally:
                self._file.data = b""

    def statistics(self, unit: int, column: str) -> Any:
        """Parquet's statistics of a column in a unit, None where there are none."""
        group = self._groups[unit]
        for number in range(group.num_columns):
            if group.column(number).path_in_schema == column:
                return group.column(number).statistics
        return None

    @property
    def column_names(self) -> list[str]:
        """The file's columns."""
        names: list[str] = self._metadata.schema.to_arrow_schema().names
        return names

    def _decode(self, unit: int) -> tuple[Octets, Numbers, Numbers]:
        """The tokens of a unit by pyarrow: bytes, first byte and size of each row."""
        column = self.read_columns(unit, ["tokens"])["tokens"].cast(pa.large_binary()).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_binary())
        if column.null_count:
            raise self.damaged("rows without tokens")
        if not len(column):
            return np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
        _, offsets, values = column.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)
        chunk = np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
        return chunk, bounds[:-1], np.diff(bounds)

    def _header_of(self, unit: int, row_bytes: int) -> int | None:
        """Bytes before the first row of a unit of rows of one size; None where it is not laid out so."""
        if unit not in self._headers:
            place = self._places[unit]
            header_bytes = fixed_header_bytes(place, row_bytes) if place is not None else None
            if place is not None and header_bytes is not None:
                header = bytearray(header_bytes)
                try:
                    with self._told():
                        self._source.read_into(place.offset, [memoryview(header)])
                    check_fixed_header(bytes(header), place, row_bytes)
                except NotPlain:
                    header_bytes = None
            self._headers[unit] = header_bytes
        return self._headers[unit]

    def _request_columns(self, unit: int, columns: Sequence[str]) -> tuple[int, bytes]:
        """One request that holds all of `columns`, unless others between them would be most of it."""
        spans = []
        group = self._groups[unit]
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.partition(".")[0] in columns:
                start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                spans.append((start, start + chunk.total_compressed_size))
        if not spans:
            return 0, b""
        first, last = min(spans)[0], max(span[1] for span in spans)
        wanted = sum(stop - start for start, stop in spans)
        if not 0 <= first < last <= self._bytes or last - first > 2 * wanted + (1 << 20):
            return 0, b""
        return first, self._source.read(first, last - first)

    def _read_metadata(self) -> pq.FileMetaData:
        length = min(_TAIL_BYTES, self._bytes)
        # One byte more than there should be tells a file that grew.
        tail = self._source.read(self._bytes - length, length + 1)
        if len(tail) != length:
            raise self.damaged(f"it does not have the {self._bytes:,} bytes that are recorded")
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or footer_bytes > self._bytes:
            raise self.damaged("it does not end as Parquet does")
        if footer_bytes > length:
            tail = self._source.read(self._bytes - footer_bytes, footer_bytes)
        return read_footer(tail[-footer_bytes:])

    def _path_of(self, column: int) -> str:
        return str(self._metadata.schema.column(column).path)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of Parquet and of the disk in our words."""
        try:
            yield
        except FileNotFoundError as error:
            raise self.damaged("it is not there") from error
        except (*PARQUET_ERRORS, ValueError) as error:
            raise self.damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def damaged(self, what: str) -> BsqError:
        """The error for what is wrong with this file."""
        return damaged(self._name, self._dataset, what)


def damaged(name: str, dataset: str, what: str) -> BsqError:
    """The error for a token file that cannot be used."""
    return BsqError(f"{name}: gone or altered: {what.rstrip('.')}. Run `bsq verify {dataset}`.")


class TokenFiles:
    """The token files of a dataset, opened when they are needed; a few hundred stay open."""

    def __init__(
        self,
        url: str,
        index: TokenIndex,
        storage_options: dict[str, Any] | None = None,
        *,
        check: Check = "size",
        cache: FileCache | None = None,
    ) -> None:
        self._url = url
        self._options = dict(storage_options or {})
        self._index = index
        self._check = check
        self._cache = cache
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._storage = open_storage(self._url, self._options)
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in range(64)]
        self._open: OrderedDict[int, TokenFile] = OrderedDict()
        self._checked: set[int] = set()
        self._sha256: pa.ChunkedArray | None = None
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = min(_MAX_OPEN, limit // 4) if limit > 0 else _MAX_OPEN

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_url", "_options", "_index", "_check", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def storage(self) -> Storage:
        """The dataset's folder."""
        self._follow_fork()
        return self._storage

    @property
    def is_local(self) -> bool:
        """Whether reading does not wait for a network."""
        return self._storage.is_local

    def __getitem__(self, number: int) -> TokenFile:
        """File `number` of the dataset, opened and checked.  Raises BsqError."""
        self._follow_fork()
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                self._open.move_to_end(number)
                return file
        with self._opening[number % len(self._opening)]:
            # Of threads that want one file, one opens it.
            file = self._open.get(number) or self._open_file(number)
        with self._lock:
            self._open[number] = file
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file

    def _follow_fork(self) -> None:
        # A connection or a lock that was copied by a fork belongs to the parent.
        if os.getpid() != self._process:
            self._reset()

    def _open_file(self, number: int) -> TokenFile:
        index = self._index
        name, size = index.file_name(number), int(index.file_bytes[number])
        source: _Source | None = None
        if self._storage.is_local:
            source = _LocalSource(self._open_local(name, size))
        elif self._cache is not None:
            cached = self._cache.fetch(self._storage, name, size, self._sha256_of(number))
            source = _LocalSource(cached) if cached is not None else None
        if source is None:
            source = _RemoteSource(self._storage, name)
        printable = self._storage.printable(name)
        in_one_request = isinstance(source, _RemoteSource)
        if self._check == "sha256" and number not in self._checked:
            self._check_sha256(source, number, printable, size)
        file = TokenFile(source, printable, self._storage.url, size, in_one_request=in_one_request)
        footer, info = file.footer, index.info
        if footer.fingerprint != info.fingerprint:
            raise BsqError(
                f"{printable}: its fingerprint is {footer.fingerprint[:8]}, that of the dataset "
                f"{info.fingerprint[:8]}; a file of another dataset lies here. Run `bsq verify {self._storage.url}`."
            )
        units = slice(int(index.first_unit[number]), int(index.first_unit[number + 1]))
        expected = (index.shards[number], index.parts[number], info.bits, info.grid, info.views, "lsb_first")
        found = (footer.shard, footer.part, footer.bits, footer.grid, footer.views, footer.bit_order)
        if found != expected or file.unit_rows != index.unit_rows[units].tolist():
            raise damaged(printable, self._storage.url, "its footer is not that of the file that is recorded")
        return file

    def _open_local(self, name: str, size: int) -> io.FileIO:
        try:
            file = io.FileIO(str(self._storage.local_path(name)), "rb")
        except OSError as error:
            raise damaged(self._storage.printable(name), self._storage.url, os.strerror(error.errno or 0)) from error
        found = os.fstat(file.fileno()).st_size
        if found != size:
            what = f"it has {found:,} bytes, {size:,} are recorded"
            raise damaged(self._storage.printable(name), self._storage.url, what)
        return file

    def _sha256_of(self, number: int) -> str:
        if self._sha256 is None:
            self._sha256 = read_file_column(self._storage, self._index, "sha256")
        return str(self._sha256[number].as_py())

    def _check_sha256(self, source: _Source, number: int, printable: str, size: int) -> None:
        digest = hashlib.sha256()
        for offset in range(0, size, 1 << 24):
            digest.update(source.read(offset, min(1 << 24, size - offset)))
        if digest.hexdigest() != self._sha256_of(number):
            raise damaged(printable, self._storage.url, "its SHA-256 is not the one that is recorded")
        self._checked.add(number)
