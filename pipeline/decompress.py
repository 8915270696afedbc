"""Readers of compressed shards: gzip of any number of members, Zstandard of any number of frames.

All that comes before a damage is given out; then GzipCorrupt says where it is.  Memory stays bounded whatever the
stream declares."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, Any, cast

from schemas.errors import GzipCorrupt, ShardUnreadable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Per step of decompression.  Input is kept small because zlib copies what it has not used, once for each member of a
# gzip stream, and a hostile stream has thousands of them; output, because 32 kB of input can make 32 MB.
COMPRESSED_BYTES = 32 << 10
DECOMPRESSED_BYTES = 1 << 20

# zstd's own default limit for streams written without --long; a hostile frame could ask for gigabytes.
MAX_ZSTD_WINDOW_BYTES = 128 << 20

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class GzipReader(io.RawIOBase):
    """Gzip of any number of members, as parallel compressors write it; every CRC and length is checked."""

    def __init__(self, source: io.BufferedReader[Any]) -> None:
        self._source = source
        self._member: Any = zlib.decompressobj(wbits=31)
        self._member_began = True
        self._input: bytes = b""
        self._position = 0
        self._damage: GzipCorrupt | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._damage is not None:
                raise self._damage
            if not self._input:
                self._input = self._source.read1(COMPRESSED_BYTES)
            if not self._member_began:
                # Between members: padding of zeros is allowed, as gzip allows it.
                self._input = self._input.lstrip(b"\0")
                if not self._input and self._source.peek(1):
                    continue
                if not self._input:
                    return 0
                self._member, self._member_began = zlib.decompressobj(wbits=31), True
            if not self._input:
                raise GzipCorrupt(
                    f"The gzip stream ends early, after {self._position:,} decompressed bytes. Copy the shard again.",
                    offset=self._position,
                )
            output = self._decompress(min(len(view), DECOMPRESSED_BYTES))
            if self._member.eof:
                self._input, self._member_began = self._member.unused_data, False
            else:
                self._input = self._member.unconsumed_tail
            if output:
                view[: len(output)] = output
                self._position += len(output)
                return len(output)

    def _decompress(self, max_length: int) -> bytes:
        """Return output from `self._input`; where it is damaged, first all that comes before the damage."""
        # zlib throws away what it made in the call that fails, samples among it, so the call must be repeatable.
        before = self._member.copy()
        try:
            return cast(bytes, self._member.decompress(self._input, max_length))
        except zlib.error as error:
            good = _longest_output(before, self._input, max_length)
            offset = self._position + len(good)
            self._damage = GzipCorrupt(
                f"The gzip stream is damaged after {offset:,} decompressed bytes ({str(error).rpartition(': ')[2]}). "
                "Copy or compress the shard again.",
                offset=offset,
            )
            if not good:
                raise self._damage from error
            return good


def _longest_output(member: Any, data: bytes, max_length: int) -> bytes:
    """Return the most output that `member` gives for damaged `data` without failing, found by bisection."""
    longest = b""
    low, high = 1, max_length
    while low <= high:
        length = (low + high) // 2
        try:
            longest = member.copy().decompress(data, length)
            low = length + 1
        except zlib.error:
            high = length - 1
    return longest


class ZstdReader(io.RawIOBase):
    """Zstandard of any number of frames.  A cut between blocks shows as an early end, which the tar parser reports."""

    def __init__(self, source: io.BufferedReader[Any], url: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ShardUnreadable(
                f"{url}: the shard is compressed with zstd, which needs another package. Run `pip install zstandard`."
            ) from error
        self._error: type[Exception] = zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(source, read_size=COMPRESSED_BYTES, read_across_frames=True)
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        try:
            length = int(self._reader.readinto(buffer))
        except self._error as error:
            raise GzipCorrupt(
                f"The zstd stream is damaged after {self._position:,} decompressed bytes ({error}). "
                "Copy or compress the shard again.",
                offset=self._position,
            ) from error
        self._position += length
        return length


def sniff_compression(head: bytes) -> str:
    """Return "gzip", "zstd" or "" by the first four bytes."""
    if head[:2] == _GZIP_MAGIC:
        return "gzip"
    return "zstd" if head[:4] == _ZSTD_MAGIC else ""
