"""Read a shard front to back: in ranges, again where storage falters, and decompressed.

    source (local file, or ranges with one ahead) -> gzip or zstd, where the first bytes say so -> buffered reader

What fails for a moment is repeated at its byte; what stays wrong becomes a ShardError, or for a damaged compressed
stream GzipCorrupt.  Messages of ArchiveErrors name no URL: they go into the failure table, whose bytes must not
depend on where a shard was read from."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tenacity
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.credentials import printable_url
from pipeline.decompress import GzipReader, ZstdReader, sniff_compression
from pipeline.queues import Stopped
from pipeline.read_faults import may_pass, shard_error
from schemas.errors import ShardError, ShardUnreadable, SourceChanged

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

# Every read of a file lets go of the interpreter's lock, and the reader then queues for it behind the decoders; a
# second copy of small payloads out of this buffer costs less.  Larger ones go past it.
BUFFER_BYTES = 4 << 20

SKIP_BYTES = 1 << 20

_TAG_FIELDS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest")
_TIME_FIELDS = ("LastModified", "Last-Modified", "last_modified", "mtime")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often a failing request is repeated before the shard is given back; waits are random and grow."""

    attempts: int = 8
    """Requests in all, for one range."""
    first_wait_seconds: float = 0.5
    """Bound of the first wait, doubled each time."""
    longest_wait_seconds: float = 30.0
    """Bound of every wait."""


class ShardStream:
    """The decompressed bytes of one shard, in order.  Use as a context manager."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self.url = source.url
        """For messages: without credentials."""
        raw = io.BufferedReader(source, BUFFER_BYTES)
        self.compression = sniff_compression(raw.peek(4))
        """"gzip", "zstd" or "" by the first bytes; the name of the shard does not matter."""
        self._reader: io.BufferedReader[Any] = raw
        if self.compression == "gzip":
            self._reader = io.BufferedReader(cast(Any, GzipReader(raw)), BUFFER_BYTES)
        elif self.compression == "zstd":
            self._reader = io.BufferedReader(cast(Any, ZstdReader(raw, source.url)), BUFFER_BYTES)
        self.read: Callable[[int], bytes] = self._reader.read
        """Return exactly so many bytes, fewer only at the end.  Raises ShardError, GzipCorrupt or Stopped."""

    @property
    def size(self) -> int:
        """Bytes of the object as stored; where the server does not say, those read so far."""
        return self._source.bytes_read if self._source.size is None else self._source.size

    @property
    def etag(self) -> str:
        """The store's tag of the content; empty where it has none, as on a local disk."""
        return self._source.etag

    @property
    def bytes_read(self) -> int:
        """Bytes that came from storage."""
        return self._source.bytes_read

    @property
    def num_retries(self) -> int:
        """Requests that had to be repeated."""
        return self._source.num_retries

    @property
    def end(self) -> int | None:
        """Where the bytes end; None where only reading can tell."""
        return None if self.compression else self._source.size

    def skip(self, length: int) -> int:
        """Pass over `length` bytes in bounded memory; return how many there were."""
        if self._source.seekable() and not self.compression and self.end is not None:
            position = self._reader.tell()
            target = min(position + length, self.end)
            self._reader.seek(target)
            return target - position
        num_skipped = 0
        while num_skipped < length and (piece := self.read(min(SKIP_BYTES, length - num_skipped))):
            num_skipped += len(piece)
        return num_skipped

    def check_source(self, *, damaged: bool = False) -> None:
        """Make sure that what was read is what is stored.

        Raises SourceChanged when size, tag or time of the object are no longer those it was opened with and, for an
        archive found `damaged`, ShardUnreadable when its last range reads differently now: then the damage happened
        on the way, and another attempt will do better."""
        self._source.check_unchanged()
        if damaged:
            self._source.check_last_range()

    def close(self) -> None:
        self._reader.close()
        self._source.close()

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    stop: threading.Event | None = None,
    range_bytes: int = 16 << 20,
    retry: RetryPolicy | None = None,
) -> ShardStream:
    """Open a shard, local or remote, for one pass; `range_bytes` are asked for at a time, one range ahead.

    Raises ShardNotFound, ShardForbidden or ShardUnreadable, and Stopped once `stop` is set."""
    options = dict(storage_options or {})
    shown = printable_url(url)
    common = {"url": shown, "options": options, "stop": stop or threading.Event(), "retry": retry or RetryPolicy()}
    try:
        filesystem, path = url_to_fs(url, **options)
    except Exception as error:
        raise shard_error(error, shown, options) from error
    source: _Source
    if isinstance(filesystem, LocalFileSystem):
        source = _LocalSource(path, **common)
    else:
        source = _RemoteSource(filesystem, path, range_bytes, **common)
    try:
        return ShardStream(source)
    except BaseException:
        source.close()
        raise


class _Source(io.RawIOBase):
    """Bytes as stored, with repetition of what fails for a moment."""

    size: int | None
    etag: str

    def __init__(self, *, url: str, options: dict[str, Any], stop: threading.Event, retry: RetryPolicy) -> None:
        self.url = url
        self.bytes_read = 0
        self.num_retries = 0
        self._options = options
        self._stop = stop
        self._retry = retry

    def readable(self) -> bool:
        return True

    def check_unchanged(self) -> None:
        """Raises SourceChanged."""
        raise NotImplementedError

    def check_last_range(self) -> None:
        """Raises ShardUnreadable."""

    def _persistently(self, request: Callable[[], T]) -> T:
        """Call `request` until it succeeds, fails for good, or has failed too often.  Raises ShardError, Stopped."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=tenacity.stop_after_attempt(self._retry.attempts),
            wait=tenacity.wait_random_exponential(
                multiplier=self._retry.first_wait_seconds, max=self._retry.longest_wait_seconds
            ),
            sleep=self._sleep,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return retrying(request)
        except (ShardError, Stopped):
            raise
        except Exception as error:
            raise shard_error(error, self.url, self._options, position=self.bytes_read) from error

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _count_retry(self, _: tenacity.RetryCallState) -> None:
        self.num_retries += 1

    def _changed(self, before: object, now: object) -> SourceChanged:
        return SourceChanged(
            f"{self.url}: the object changed while it was read (size, tag and time were {before}, now {now}). "
            "Let its writer finish, then run the job again."
        )


class _LocalSource(_Source):
    """A file, read without a thread of its own: the page cache is quicker than handing over."""

    def __init__(self, path: str, **common: Any) -> None:
        super().__init__(**common)
        self._path = path
        self._descriptor = -1
        self._position = 0
        self._identity = self._persistently(self._open)
        self.size = self._identity[0]
        self.etag = ""

    def _open(self) -> tuple[int, int]:
        self._close_descriptor()
        # Without O_NONBLOCK opening a pipe would wait for a writer, for ever.
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise ShardUnreadable(f"{self.url}: this is {kind}, not a file. Name the tar files themselves.")
        return status.st_size, status.st_mtime_ns

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._stop.is_set():
            raise Stopped
        view = memoryview(buffer)
        try:
            length = os.preadv(self._descriptor, [view], self._position)
        except OSError:
            length = self._persistently(lambda: self._reread(view))
        self._position += length
        self.bytes_read += length
        return length

    def _reread(self, view: memoryview) -> int:
        identity = self._open()
        if identity != self._identity:
            raise self._changed(self._identity, identity)
        self.num_retries += 1
        return os.preadv(self._descriptor, [view], self._position)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence != os.SEEK_END
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def check_unchanged(self) -> None:
        def look() -> tuple[int, int]:
            status = os.stat(self._path)  # noqa: PTH116 - the path of fsspec is a string
            return status.st_size, status.st_mtime_ns

        now = self._persistently(look)
        if now != self._identity:
            raise self._changed(self._identity, now)

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        if not self.closed:
            self._close_descriptor()
        super().close()


class _RemoteSource(_Source):
    """An object read in ranges; while one is parsed the next is on its way."""

    def __init__(self, filesystem: Any, path: str, range_bytes: int, **common: Any) -> None:
        super().__init__(**common)
        self._filesystem = filesystem
        self._path = path
        self._range_bytes = range_bytes
        self._file: Any = None
        self._sequential = False
        self._identity = self._persistently(self._look)
        self.size, self.etag, _ = self._identity
        self._chunk, self._chunk_start, self._used = b"", 0, 0
        self._previous, self._previous_start = b"", 0
        self._ahead: Future[bytes] | None = None
        self._at_end = False
        self._start_ahead(0)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._used == len(self._chunk) and not self._at_end:
            self._next_chunk()
        view = memoryview(buffer).cast("B")
        length = min(len(view), len(self._chunk) - self._used)
        view[:length] = memoryview(self._chunk)[self._used : self._used + length]
        self._used += length
        return length

    def _next_chunk(self) -> None:
        assert self._ahead is not None
        chunk = self._wait(self._ahead)
        self._previous, self._previous_start = self._chunk, self._chunk_start
        self._chunk_start += len(self._chunk)
        self._chunk, self._used = chunk, 0
        self.bytes_read += len(chunk)
        end = self._chunk_start + len(chunk)
        # Only where the size is unknown can a range come back short: that is the end.
        self._at_end = end >= self.size if self.size is not None else len(chunk) < self._range_bytes
        if not self._at_end:
            self._start_ahead(end)

    def _start_ahead(self, start: int) -> None:
        end = start + self._range_bytes if self.size is None else min(start + self._range_bytes, self.size)
        future: Future[bytes] = Future()

        def work() -> None:
            try:
                future.set_result(self._persistently(lambda: self._fetch(start, end)))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the reader raises it
                future.set_exception(error)

        self._ahead = future
        # A daemon, because a request that hangs must not keep the process from ending.
        threading.Thread(target=work, name="read-ahead", daemon=True).start()

    def _wait(self, future: Future[T]) -> T:
        while True:
            if self._stop.is_set():
                raise Stopped
            with contextlib.suppress(FutureTimeoutError):
                return future.result(timeout=0.2)
            if future.done():
                return future.result()

    def _fetch(self, start: int, end: int) -> bytes:
        if start == end:
            return b""
        try:
            if self._file is None:
                self._file = self._open(start)
            pieces, missing = [], end - start
            if not self._sequential:
                self._file.seek(start)
            while missing and (piece := self._file.read(missing)):
                pieces.append(piece)
                missing -= len(piece)
        except Exception as error:
            self._drop_file()
            if isinstance(error, ValueError) and "range requests" in str(error) and not self._sequential:
                # A plain HTTP server: it only ever sends the whole object, so take it as one stream.
                self._sequential = True
                raise ConnectionError("no ranges here") from error
            raise
        if missing and self.size is not None:
            self._drop_file()
            raise ConnectionError(f"{end - start - missing:,} of {end - start:,} bytes came")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _open(self, start: int) -> Any:
        """Open the object again; it must be the one that was opened first.  Raises SourceChanged."""
        if self.num_retries:
            self.check_identity(self._look())
        if self.size is None:
            self._sequential = True
        if not self._sequential:
            try:
                return self._filesystem.open(self._path, "rb", cache_type="none", block_size=self._range_bytes)
            except TypeError:
                return self._filesystem.open(self._path, "rb")
        file = self._filesystem.open(self._path, "rb", block_size=0)
        while start and (piece := file.read(min(SKIP_BYTES, start))):
            start -= len(piece)
        return file

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()

    def _look(self) -> tuple[int | None, str, str]:
        """Return size, tag and time of the object as storage has them now, never from a cached listing."""
        self._filesystem.invalidate_cache(self._path)
        info = self._filesystem.info(self._path)
        if info.get("type") == "directory":
            raise ShardUnreadable(f"{self.url}: this is a folder, not an object. Name the tar files themselves.")
        tag = next((str(info[field]) for field in _TAG_FIELDS if info.get(field)), "")
        modified = next((str(info[field]) for field in _TIME_FIELDS if info.get(field)), "")
        return info.get("size"), tag, modified

    def check_identity(self, now: tuple[int | None, str, str]) -> None:
        if now != self._identity:
            raise self._changed(self._identity, now)

    def check_unchanged(self) -> None:
        self.check_identity(self._persistently(self._look))

    def check_last_range(self) -> None:
        if self._sequential:
            return
        if self._ahead is not None:
            # The file object serves one request at a time.
            with contextlib.suppress(ShardError):
                self._wait(self._ahead)
        for start, chunk in ((self._previous_start, self._previous), (self._chunk_start, self._chunk)):
            end = start + len(chunk)
            if self._persistently(lambda start=start, end=end: self._fetch(start, end)) != chunk:  # type: ignore[misc]
                raise ShardUnreadable(
                    f"{self.url}: bytes {start:,} to {end:,} came damaged and read differently the second time. "
                    "Check the network or proxy on the way; the shard is tried again."
                )

    def close(self) -> None:
        if not self.closed:
            if self._ahead is None or self._ahead.done():
                self._drop_file()
            self._chunk = self._previous = b""
        super().close()
