"""Stream the members of a tar archive, strictly: an archive that is damaged or ends early is always reported.

`tarfile`, and `webdataset` on top of it, end without a word at a bad header, at a cut between members and before a
second archive, and take ten times the time under the interpreter's lock.  This parser reads ustar with prefixes, GNU
long names, PAX headers (path and size), numbers in base 256 and old V7 headers.  Links, devices and sparse members are
named but never followed or filled in; names are text and never paths.

Messages of ArchiveErrors name no URL: they go into the failure table, whose bytes do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import adler32

from pipeline.byte_stream import SKIP_BYTES, ShardStream
from pipeline.media import media_kind_of_extension
from pipeline.sample import Member, MemberKind
from schemas.errors import ArchiveError, NotATar, TarCorrupt, TarTruncated, printable
from schemas.jobspec import LimitsSpec

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Of one PAX header or GNU long name; real ones have a few hundred."""
MAX_NAME_BYTES = 16 << 10
"""Linux opens no longer path than 4,096 bytes."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_ZEROS = bytes(SKIP_BYTES)

# Payloads of an unknown end are not allocated at once from this size on: the header may lie.
_TRUSTED_BYTES = 64 << 20

_FILES = b"0\x007"
_NO_PAYLOAD: dict[bytes, MemberKind] = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "device"}
_PASSED_OVER = b"DVNM"  # GNU's folder dumps, volume labels and continuations of another volume

_OTHER_FORMATS = {
    b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-zip", b"PAR1": "Parquet",
    b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


def read_members(stream: ShardStream, limits: LimitsSpec | None = None) -> Iterator[Member]:
    """Yield the members of an archive in order; folders are passed over.

    The payload of a media member over `limits.max_member_bytes`, or of another over `limits.max_sidecar_bytes`, is
    passed over in bounded memory and None.  Raises NotATar, TarTruncated, TarCorrupt and what the stream raises; the
    members before are good then.  A damaged archive is compared with its source once more before it is called so."""
    limits = limits or LimitsSpec()
    try:
        yield from _Parser(stream, limits.max_member_bytes, limits.max_sidecar_bytes).members()
        stream.check_source()
    except (ArchiveError, NotATar):
        stream.check_source(damaged=True)
        raise


@dataclass(slots=True)
class _Extensions:
    """What headers before a member's own say about it."""

    long_name: bytes | None = None
    pax: dict[bytes, bytes] = field(default_factory=dict)


class _Parser:
    def __init__(self, stream: ShardStream, max_member_bytes: int, max_sidecar_bytes: int) -> None:
        self._stream = stream
        self._max_member_bytes = max_member_bytes
        self._max_sidecar_bytes = max_sidecar_bytes
        self._global_pax: dict[bytes, bytes] = {}
        self._offset = 0
        self._member: str | None = None

    def members(self) -> Iterator[Member]:
        try:
            yield from self._members()
        except ArchiveError as error:
            # Damage that the stream found, in a payload or in a header whose name is known.
            if self._member is not None and error.member is None:
                error.member, error.sure = self._member, True
            raise

    def _members(self) -> Iterator[Member]:
        read = self._stream.read
        always_read = min(self._max_member_bytes, self._max_sidecar_bytes, _TRUSTED_BYTES)
        known_end = self._stream.end
        extensions: _Extensions | None = None
        padding = 0
        while True:
            header = read(padding + BLOCK_BYTES)
            if len(header) < padding + BLOCK_BYTES:
                raise self._short_header(self._offset + len(header))
            header = header[padding:]
            position = self._offset + padding
            if header[0] == 0 and header == _ZERO_BLOCK:
                if extensions:
                    raise TarCorrupt(
                        f"An extended header before byte {position:,} belongs to no member. Write the shard again.",
                        offset=position,
                    )
                self._check_end(position)
                return
            # Adler-32's low half is one more than the sum of the bytes, modulo 65,521, which 256 bytes cannot reach.
            total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
            stored = header[148:156]
            if _number(stored) != total - sum(stored) + 8 * 32 and not _has_signed_checksum(header):
                raise self._bad_header(header, position)
            kind_flag = header[156:157]
            size = _number(header[124:136])
            if kind_flag in b"xXgLK":
                if size is None or size > MAX_EXTENSION_BYTES:
                    raise TarCorrupt(
                        f"The extended header at byte {position:,} claims {_shown(size)} bytes; at most "
                        f"{MAX_EXTENSION_BYTES:,} are taken. Write the shard again with shorter names.",
                        offset=position,
                    )
                extensions = self._read_extension(kind_flag, size, position, extensions or _Extensions())
                padding = -size % BLOCK_BYTES
                continue

            end_of_name = header.find(b"\0", 0, 100)
            raw_name = header[: end_of_name if end_of_name >= 0 else 100]
            if header[345] and header[257:263] == b"ustar\0":
                raw_name = header[345:500].partition(b"\0")[0] + b"/" + raw_name
            sparse_size: int | None = None
            if extensions or self._global_pax:
                pax = {**self._global_pax, **extensions.pax} if extensions else self._global_pax
                raw_name = pax.get(b"path") or (extensions and extensions.long_name) or raw_name
                if pax.get(b"size"):
                    size = _pax_number(pax[b"size"])
                if b"GNU.sparse" in pax:
                    raw_name = pax.get(b"GNU.sparse.name") or raw_name
                    sparse_size = _pax_number(pax[b"GNU.sparse"]) or 0
                extensions = None
            self._member = name = raw_name.decode("utf-8", "backslashreplace")
            if len(raw_name) > MAX_NAME_BYTES:
                raise TarCorrupt(
                    f"The name of the member at byte {position:,} has {len(raw_name):,} bytes; at most "
                    f"{MAX_NAME_BYTES:,} are taken. Write the shard again with shorter names.",
                    offset=position,
                )
            if size is None:
                raise TarCorrupt(
                    f"The size of member {name!r} at byte {position:,} is no number. Copy or write the shard again.",
                    offset=position,
                    member=name,
                    sure=True,
                )
            self._offset = position + BLOCK_BYTES

            if kind_flag in _FILES and sparse_size is None and size <= always_read and not name.endswith("/"):
                if known_end is not None and self._offset + size > known_end:
                    raise self._short_payload(name, size, known_end)
                payload = read(size) if size else b""
                if len(payload) < size:
                    raise self._short_payload(name, size, self._offset + len(payload))
                member = Member(name, "file", size, self._offset, payload)
                self._offset += size
                padding = -size % BLOCK_BYTES
            else:
                rare = self._rare_member(header, name, size, sparse_size)
                padding = 0 if header[156:157] in _NO_PAYLOAD or header[156:157] == b"5" else -size % BLOCK_BYTES
                if rare is None:
                    self._member = None
                    continue
                member = rare
            self._member = None
            yield member

    def _rare_member(self, header: bytes, name: str, size: int, sparse_size: int | None) -> Member | None:
        """Return a member that is large or no plain file, its payload read or passed over; None for a folder."""
        kind_flag = header[156:157]
        if kind_flag in _NO_PAYLOAD:
            return Member(name, _NO_PAYLOAD[kind_flag], size, self._offset, None)
        if kind_flag == b"5":
            return None
        if kind_flag == b"S":
            sparse_size = _number(header[483:495]) or 0
            has_more = header[482] != 0
            while has_more:
                block = self._stream.read(BLOCK_BYTES)
                if len(block) < BLOCK_BYTES:
                    raise self._short_payload(name, size, self._offset + len(block))
                self._offset += BLOCK_BYTES
                has_more = block[504] != 0
        offset = self._offset
        if sparse_size is not None:
            self._skip(name, size)
            return Member(name, "sparse", sparse_size, offset, None)
        if name.endswith("/") or kind_flag in _PASSED_OVER:
            self._skip(name, size)
            return None
        if kind_flag not in _FILES:
            self._skip(name, size)
            return Member(name, "device", size, offset, None)
        is_media = media_kind_of_extension(name.rpartition("/")[2].partition(".")[2]) is not None
        if size > (self._max_member_bytes if is_media else self._max_sidecar_bytes):
            self._skip(name, size)
            return Member(name, "file", size, offset, None)
        return Member(name, "file", size, offset, self._read_large(name, size))

    def _read_large(self, name: str, size: int) -> bytes:
        end = self._stream.end
        if end is not None:
            if self._offset + size > end:
                raise self._short_payload(name, size, end)
            payload = self._stream.read(size)
        else:
            pieces, missing = [], size
            while missing and (piece := self._stream.read(min(missing, _TRUSTED_BYTES))):
                pieces.append(piece)
                missing -= len(piece)
            payload = b"".join(pieces)
        if len(payload) < size:
            raise self._short_payload(name, size, self._offset + len(payload))
        self._offset += size
        return payload

    def _skip(self, name: str, size: int) -> None:
        num_skipped = self._stream.skip(size)
        if num_skipped < size:
            raise self._short_payload(name, size, self._offset + num_skipped)
        self._offset += size

    def _read_extension(self, kind_flag: bytes, size: int, position: int, extensions: _Extensions) -> _Extensions:
        payload = self._stream.read(size)
        self._offset = position + BLOCK_BYTES + size
        if len(payload) < size:
            end = position + BLOCK_BYTES + len(payload)
            raise TarTruncated(
                f"The archive ends at byte {end:,} inside an extended header, {size - len(payload):,} bytes short. "
                "Copy the shard again; the samples before that are kept.",
                offset=end,
            )
        if kind_flag == b"L":
            extensions.long_name = payload.partition(b"\0")[0]
        elif kind_flag == b"g":
            _update_pax(self._global_pax, payload, position)
        elif kind_flag in b"xX":
            _update_pax(extensions.pax, payload, position)
        return extensions

    def _check_end(self, position: int) -> None:
        """Two blocks of zeros end an archive, and nothing but zeros may follow them."""
        second = self._stream.read(BLOCK_BYTES)
        if len(second) < BLOCK_BYTES:
            raise TarTruncated(
                f"The archive ends at byte {position + BLOCK_BYTES + len(second):,} within its two closing blocks. "
                "Copy the shard again; the samples before that are kept.",
                offset=position,
                sure=True,
            )
        offset = position + BLOCK_BYTES
        if second != _ZERO_BLOCK:
            raise TarCorrupt(
                f"A block of zeros stands alone at byte {position:,}. Copy or write the shard again; the samples "
                "before that are kept.",
                offset=position,
            )
        offset += BLOCK_BYTES
        try:
            while piece := self._stream.read(SKIP_BYTES):
                if piece != (_ZEROS if len(piece) == SKIP_BYTES else _ZEROS[: len(piece)]):
                    offset += (len(piece) - len(piece.lstrip(b"\0"))) // BLOCK_BYTES * BLOCK_BYTES
                    raise TarCorrupt(
                        f"More data follows the end of the archive at byte {offset:,}, as when one archive is appended "
                        "to another. Join them with `tar --concatenate`, or list them as two shards.",
                        offset=offset,
                    )
                offset += len(piece)
        except ArchiveError as error:
            error.sure = True
            raise

    def _short_header(self, end: int) -> ArchiveError | NotATar:
        if self._offset == 0:
            found = f"only {end:,} bytes" if end else "nothing: the file is empty"
            return NotATar(f"{self._stream.url}: no tar archive, found {found}. Copy the shard again.")
        return TarTruncated(
            f"The archive ends at byte {end:,} without its two closing blocks. "
            "Copy the shard again; the samples before that are kept.",
            offset=end,
        )

    def _bad_header(self, header: bytes, position: int) -> ArchiveError | NotATar:
        is_tar = header[257:262] == b"ustar"
        if position == 0 and not is_tar:
            other = next((name for magic, name in _OTHER_FORMATS.items() if header.startswith(magic)), None)
            found = f"this is {other}" if other else f"it begins with {printable(header[:24])!r}"
            return NotATar(
                f"{self._stream.url}: no tar archive, {found}. Give plain tar, or tar compressed with gzip or zstd."
            )
        raw_name = header[:100].partition(b"\0")[0]
        name = printable(raw_name)
        return TarCorrupt(
            f"The header at byte {position:,} is damaged: its checksum is wrong. "
            "Copy the shard again; the samples before that are kept.",
            offset=position,
            member=name if is_tar and raw_name.isascii() and name.isprintable() else None,
        )

    def _short_payload(self, name: str, size: int, end: int) -> TarTruncated:
        missing = self._offset + size - end
        return TarTruncated(
            f"The archive ends at byte {end:,} inside member {name!r}, {missing:,} bytes short. "
            "Copy the shard again; the samples before that are kept.",
            offset=end,
            member=name,
            sure=True,
        )


def plain_header(header: bytes) -> tuple[str, int] | None:
    """Name and size that a header block gives a plain file; None where it is no header of one.

    For reading a member again at its offset: what an extended header before it said is not in it."""
    stored = header[148:156]
    if len(header) < BLOCK_BYTES or header[156:157] not in (b"0", b"\0", b"7"):
        return None
    if _number(stored) != sum(header) - sum(stored) + 8 * 32 and not _has_signed_checksum(header):
        return None
    raw_name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        raw_name = header[345:500].partition(b"\0")[0] + b"/" + raw_name
    size = _number(header[124:136])
    return None if size is None else (raw_name.decode("utf-8", "backslashreplace"), size)


def _number(field: bytes) -> int | None:
    """Return the value of a numeric field, octal or in base 256; None when it holds neither."""
    digits = field.rstrip(b"\0 ")
    if digits.isdigit():
        return _octal(digits)
    if field[0] & 0x80:
        # 0xff begins a negative number, and sizes from 2**63 on are no file's.
        value = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        return value if 0 <= value < 1 << 63 else None
    digits = field.partition(b"\0")[0].strip(b" ")
    return _octal(digits) if digits else 0


def _octal(digits: bytes) -> int | None:
    # int() would also take signs, underscores and a 0o in front.
    if not digits.isdigit():
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _pax_number(value: bytes) -> int | None:
    return int(value) if value.isdigit() and len(value) < 20 else None


def _shown(size: int | None) -> str:
    return "no number of" if size is None else f"{size:,}"


def _has_signed_checksum(header: bytes) -> bool:
    """Some old writers summed the bytes as signed ones."""
    summed = header[:148] + b" " * 8 + header[156:]
    return _number(header[148:156]) == sum(byte - 256 if byte > 127 else byte for byte in summed)


def _update_pax(pax: dict[bytes, bytes], payload: bytes, position: int) -> None:
    """Take in the records that matter; any of GNU's sparse records leaves the true size under b"GNU.sparse"."""
    offset = 0
    while offset < len(payload):
        length_end = payload.find(b" ", offset, offset + 20)
        digits = payload[offset:length_end] if length_end > 0 else b""
        end = offset + int(digits) if digits.isdigit() else 0
        key, equals, value = payload[length_end + 1 : end - 1].partition(b"=")
        if end <= length_end or end > len(payload) or payload[end - 1] != 0x0A or not equals:
            raise TarCorrupt(
                f"The extended header at byte {position:,} holds a record that cannot be read. "
                "Copy or write the shard again; the samples before that are kept.",
                offset=position,
            )
        if key in (b"path", b"size", b"GNU.sparse.name"):
            pax[key] = value
        if key.startswith(b"GNU.sparse."):
            is_size = key in (b"GNU.sparse.realsize", b"GNU.sparse.size")
            pax[b"GNU.sparse"] = value if is_size else pax.get(b"GNU.sparse", b"0")
        offset = end
