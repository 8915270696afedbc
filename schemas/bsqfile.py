"""The .bsq container: tokens of pictures and clips, coded with a prior.  docs/formats.md describes it.

Everything is checked before memory is taken for it: a file cannot make a reader hold more than the limits here.
Standard library only."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from schemas.errors import StreamError, printable

MAGIC = b"BSQ"
VERSION = 1
FIXED = struct.Struct("<3sBBBB8s8sII")
"""Magic, version, kind, lanes, first lane, tokenizer, prior, checksum of the tokens, checksum of the file."""
FINGERPRINT_BYTES = 8
ARITHMETICS = ("cpu float32", "cuda float32")
"""What made the probabilities, by number."""
SUFFIX = ".bsq"

MAX_FILE_BYTES = 256 << 20
MAX_TABLE_BYTES = 32 << 20
"""Of the table of a pack, inflated."""
MAX_ITEMS = 1 << 20
MAX_SIDE = 65_535
MAX_FRAMES = 1 << 16
MAX_ITEM_PIXELS = 1 << 27
"""Of one picture, or of all frames of one clip: 400 MB decoded."""
MAX_TOKENS = 1 << 27
"""Of a whole file: 300 MB packed, at 18 bits."""
MAX_STREAMS = 1 << 18
"""An empty stream takes next to nothing of a file, and a hundred bytes of whoever reads it."""
MAX_NAME_BYTES = 1024
MAX_BITS, MAX_GRID_SIDE, MAX_PATCH = 64, 255, 4096

_PACK = 0x80
_CRC_OFFSET = FIXED.size - 4


@dataclass(frozen=True, slots=True)
class CodedItem:
    """One picture or clip of a file."""

    width: int
    height: int
    frames: int = 1
    start_ms: int = 0
    """Time of the first frame in the source, milliseconds."""
    step_us: int = 0
    """From one frame to the next, microseconds; 0 where it is not known."""
    name: str = ""
    """In a pack; a file with one item takes its name from the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BsqFile:
    """A whole file, parsed."""

    items: tuple[CodedItem, ...]
    streams: tuple[bytes, ...]
    """What the range coder wrote, one stream for each block of lanes."""
    tokenizer: bytes
    """The first 8 bytes of the tokenizer's weight hash."""
    prior: bytes
    """The first 8 bytes of the prior's weight hash."""
    bits: int
    """L: bits of one token."""
    grid: tuple[int, int]
    """Rows and columns of tokens in one frame of a clip."""
    patch: int
    """Side of a token's patch in pixels."""
    clip_frames: int
    """The most frames of one clip; longer items are cut."""
    lanes: int
    first_lane: int = 0
    """The lane of the first clip."""
    arithmetic: int = 0
    """Number of what made the probabilities, in `ARITHMETICS`."""
    tokens_crc32: int = 0
    """CRC-32 of the packed tokens of all clips, in order."""
    is_pack: bool = False

    @property
    def tile_px(self) -> tuple[int, int]:
        """Height and width of the frames that the tokenizer takes."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    def tiles(self, item: CodedItem) -> tuple[int, int]:
        """Rows and columns of tiles that an item is cut into."""
        height, width = self.tile_px
        return -(-item.height // height), -(-item.width // width)

    def clips(self, item: CodedItem) -> list[int]:
        """Frames of each of the item's clips: for each stretch of time its tiles, row by row."""
        rows, columns = self.tiles(item)
        return [
            min(self.clip_frames, item.frames - first)
            for first in range(0, item.frames, self.clip_frames)
            for _ in range(rows * columns)
        ]

    @property
    def num_clips(self) -> int:
        return sum(self._count_clips(item) for item in self.items)

    @property
    def num_tokens(self) -> int:
        """Tokens of all clips, those of padded margins too."""
        tiles = sum(item.frames * self.tiles(item)[0] * self.tiles(item)[1] for item in self.items)
        return tiles * self.grid[0] * self.grid[1]

    @property
    def num_pixels(self) -> int:
        return sum(item.width * item.height * item.frames for item in self.items)

    @property
    def payload_bytes(self) -> int:
        return sum(map(len, self.streams))

    @property
    def num_streams(self) -> int:
        """Streams that a file with these clips has."""
        return -(-(self.first_lane + self.num_clips) // self.lanes)

    def _count_clips(self, item: CodedItem) -> int:
        rows, columns = self.tiles(item)
        return rows * columns * -(-item.frames // self.clip_frames)

    def to_bytes(self) -> bytes:
        """The file.  Raises StreamError where it passes a limit, so that what is written can be read."""
        _check(self, "the file")
        table = b"".join(map(_varint, (self.bits, *self.grid, self.patch, self.clip_frames)))
        table += b"".join(map(_varint, (len(self.items),))) if self.is_pack else b""
        table += b"".join(_item_bytes(item, named=self.is_pack) for item in self.items)
        # The last stream takes what is left.
        table += b"".join(_varint(len(each)) for each in self.streams[:-1])
        if len(table) > MAX_TABLE_BYTES:
            raise StreamError(f"the table takes {len(table):,} bytes; at most {MAX_TABLE_BYTES:,}. Make several packs.")
        if self.is_pack:
            deflated = zlib.compress(table, 9)
            table = _varint(len(deflated)) + deflated
        fixed = FIXED.pack(
            MAGIC,
            VERSION,
            self.arithmetic | (_PACK if self.is_pack else 0),
            self.lanes,
            self.first_lane,
            self.tokenizer,
            self.prior,
            self.tokens_crc32,
            0,
        )
        content = fixed + table + b"".join(self.streams)
        if len(content) > MAX_FILE_BYTES:
            raise StreamError(f"the file takes {len(content):,} bytes; at most {MAX_FILE_BYTES:,}. Make several.")
        return content[:_CRC_OFFSET] + struct.pack("<I", zlib.crc32(content)) + content[FIXED.size :]


def parse_bsq(content: bytes, where: str) -> BsqFile:
    """Read a file.  Raises StreamError, in one line, where it is cut, garbled, of another version or beyond limits."""
    if len(content) > MAX_FILE_BYTES:
        raise StreamError(f"{where}: {len(content):,} bytes; at most {MAX_FILE_BYTES:,} are read.")
    if content[: len(MAGIC)] != MAGIC:
        raise StreamError(f"{where}: no .bsq file; it begins with {content[:3]!r}.")
    if len(content) < FIXED.size:
        raise StreamError(f"{where}: cut off after {len(content)} bytes. Copy the file again.")
    _, version, kind, lanes, first_lane, tokenizer, prior, tokens_crc32, crc32 = FIXED.unpack_from(content)
    if version != VERSION:
        raise StreamError(f"{where}: format version {version}; this bsqtok reads version {VERSION}. Update bsqtok.")
    if zlib.crc32(content[:_CRC_OFFSET] + bytes(4) + content[FIXED.size :]) != crc32:
        raise StreamError(f"{where}: the file is damaged or cut off (its checksum differs). Copy it again.")
    is_pack = bool(kind & _PACK)
    table = _Reader(content, FIXED.size, where)
    payload = table
    if is_pack:
        length = table.varint(MAX_TABLE_BYTES)
        start = table.take(length)
        payload, table = table, _Reader(_inflate(content[start : start + length], where), 0, where)
    bits, rows, columns = table.varint(MAX_BITS), table.varint(MAX_GRID_SIDE), table.varint(MAX_GRID_SIDE)
    patch, clip_frames = table.varint(MAX_PATCH), table.varint(MAX_FRAMES)
    num_items = table.varint(MAX_ITEMS) if is_pack else 1
    parsed = BsqFile(
        items=tuple(_read_item(table, named=is_pack) for _ in range(num_items)),
        streams=(),
        tokenizer=tokenizer,
        prior=prior,
        bits=bits,
        grid=(rows, columns),
        patch=patch,
        clip_frames=clip_frames,
        lanes=lanes,
        first_lane=first_lane,
        arithmetic=kind & ~_PACK,
        tokens_crc32=tokens_crc32,
        is_pack=is_pack,
    )
    _check(parsed, where, streams=False)
    sizes = [table.varint(MAX_FILE_BYTES) for _ in range(parsed.num_streams - 1)]
    if table is not payload and not table.is_at_end:
        raise StreamError(f"{where}: the table holds more than it says. The file is damaged.")
    starts = [payload.take(size) for size in sizes]
    last = payload.position
    streams = [content[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return BsqFile(**{**_fields(parsed), "streams": (*streams, content[last:])})  # type: ignore[arg-type]


def _fields(parsed: BsqFile) -> dict[str, object]:
    return {name: getattr(parsed, name) for name in BsqFile.__slots__}


def _check(file: BsqFile, where: str, *, streams: bool = True) -> None:
    """Raise StreamError for what no file may say."""
    if file.arithmetic >= len(ARITHMETICS):
        raise StreamError(f"{where}: arithmetic number {file.arithmetic} is not known to this bsqtok. Update bsqtok.")
    tile = file.tile_px
    in_range = (
        1 <= file.lanes <= 255
        and 0 <= file.first_lane < file.lanes
        and 1 <= file.bits <= MAX_BITS
        and min(file.grid) >= 1
        and max(file.grid) <= MAX_GRID_SIDE
        and 1 <= file.patch <= MAX_PATCH
        and 1 <= file.clip_frames <= MAX_FRAMES
        and 1 <= len(file.items) <= MAX_ITEMS
        and len(file.tokenizer) == len(file.prior) == FINGERPRINT_BYTES
        and (file.is_pack or len(file.items) == 1)
    )
    if not in_range or max(tile) > MAX_SIDE:
        raise StreamError(f"{where}: it names sizes that cannot be. The file is damaged or hostile.")
    for item in file.items:
        shown = f"{where}: {printable(item.name)!r} is" if item.name else f"{where}: it is"
        size = f"{item.width:,} x {item.height:,} px, {item.frames:,} frames"
        if not (1 <= item.width <= MAX_SIDE and 1 <= item.height <= MAX_SIDE and 1 <= item.frames <= MAX_FRAMES):
            raise StreamError(f"{shown} {size}; at most {MAX_SIDE:,} px a side and {MAX_FRAMES:,} frames.")
        tiles = file.tiles(item)
        if tiles[0] * tile[0] * tiles[1] * tile[1] * item.frames > MAX_ITEM_PIXELS:
            raise StreamError(f"{shown} {size}, in tiles; at most {MAX_ITEM_PIXELS:,} pixels in all.")
    if file.num_tokens > MAX_TOKENS:
        raise StreamError(f"{where}: {file.num_tokens:,} tokens; at most {MAX_TOKENS:,}. Make several files.")
    if file.num_streams > MAX_STREAMS:
        raise StreamError(f"{where}: {file.num_streams:,} streams; at most {MAX_STREAMS:,}. Use more lanes.")
    if streams and len(file.streams) != file.num_streams:
        raise StreamError(f"{where}: {len(file.streams)} streams in the place of {file.num_streams}.")


def _item_bytes(item: CodedItem, *, named: bool) -> bytes:
    name = item.name.encode("utf-8", "backslashreplace")[:MAX_NAME_BYTES]
    parts = [_varint(len(name)) + name] if named else []
    parts += map(_varint, (item.width, item.height, item.frames))
    if item.frames > 1:
        # Zigzag, for a clip may begin before 0.
        start = item.start_ms * 2 if item.start_ms >= 0 else -item.start_ms * 2 - 1
        parts += map(_varint, (start, item.step_us))
    return b"".join(parts)


def _read_item(table: _Reader, *, named: bool) -> CodedItem:
    name = ""
    if named:
        length = table.varint(MAX_NAME_BYTES)
        start = table.take(length)
        name = table.content[start : start + length].decode("utf-8", "backslashreplace")
    width, height, frames = table.varint(1 << 32), table.varint(1 << 32), table.varint(1 << 32)
    if frames <= 1:
        return CodedItem(width, height, frames, name=name)
    start, step_us = table.varint(1 << 48), table.varint(1 << 48)
    return CodedItem(width, height, frames, -((start + 1) // 2) if start & 1 else start // 2, step_us, name)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


class _Reader:
    """Reads numbers one after another, and never behind the end."""

    def __init__(self, content: bytes, position: int, where: str) -> None:
        self.content, self.position, self._where = content, position, where

    @property
    def is_at_end(self) -> bool:
        return self.position == len(self.content)

    def varint(self, most: int) -> int:
        """A number up to `most`."""
        value = 0
        for shift, octet in enumerate(self.content[self.position : self.position + 10]):
            value |= (octet & 0x7F) << 7 * shift
            if not octet & 0x80:
                self.position += shift + 1
                if value > most:
                    raise StreamError(
                        f"{self._where}: it names the number {value:,} where at most {most:,} is allowed."
                    )
                return value
        raise StreamError(f"{self._where}: cut off inside its table. The file is damaged.")

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin; they are passed over."""
        if count > len(self.content) - self.position:
            raise StreamError(f"{self._where}: cut off; {count:,} more bytes are missing. Copy the file again.")
        start, self.position = self.position, self.position + count
        return start


def _inflate(deflated: bytes, where: str) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        table = decompressor.decompress(deflated, MAX_TABLE_BYTES)
    except zlib.error as error:
        raise StreamError(f"{where}: the table cannot be inflated ({error}). The file is damaged.") from error
    if not decompressor.eof or decompressor.unused_data:
        raise StreamError(f"{where}: the table is cut off or inflates to more than {MAX_TABLE_BYTES:,} bytes.")
    return table
