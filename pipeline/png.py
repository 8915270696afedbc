"""A PNG taken apart: checked chunk by chunk, and put together again from what its pixels need.

Pillow does not check the sum of the pixel data, and opens chunks that can inflate to gigabytes.  Standard library only.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from schemas.errors import MediaCorrupt, MediaTruncated

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Everything else (text, times, the frames of an animation) is left away: the default picture is what is decoded.
_PIXEL_CHUNKS = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"))
_MAX_PROFILE_BYTES = 4 << 20


@dataclass(slots=True)
class PngParts:
    width: int
    height: int
    depth: int
    """Bits of one value."""
    payload: bytes
    """A PNG with the same pixels and nothing else."""
    exif: bytes = b""
    profile: bytes | None = None
    truncated: bool = False
    """The file ends before its last chunk does."""


def read_png(payload: bytes) -> PngParts:
    """Check every chunk that matters and return the parts.  A file that ends early has `truncated` set.

    Raises MediaCorrupt for a wrong checksum or order and a second header, MediaTruncated where not even the size is
    there."""
    if payload[12:16] != b"IHDR" and len(payload) >= 16:
        raise MediaCorrupt("the PNG does not begin with its header chunk. Replace the file.")
    if len(payload) < 33:
        raise MediaTruncated(f"the PNG ends at byte {len(payload):,}, inside its header. Copy it again.")
    width, height, depth = struct.unpack_from(">IIB", payload, 16)
    parts = PngParts(width, height, depth, b"")
    kept: list[bytes | memoryview] = [SIGNATURE]
    position = len(SIGNATURE)
    view = memoryview(payload)
    while True:
        if position + 12 > len(payload):
            parts.truncated = True
            break
        length, kind = struct.unpack_from(">I4s", payload, position)
        end = position + 12 + length
        if end > len(payload):
            parts.truncated = True
            if kind == b"IDAT":
                kept.append(view[position:])
            break
        if kind == b"IHDR" and position > len(SIGNATURE):  # decoders differ in which one they take
            raise MediaCorrupt(f"the PNG has a second header chunk at byte {position:,}. Replace the file.")
        if kind in _PIXEL_CHUNKS:
            (declared,) = struct.unpack_from(">I", payload, end - 4)
            if zlib.crc32(view[position + 4 : end - 4]) != declared:
                raise MediaCorrupt(
                    f"the PNG chunk {kind.decode()} at byte {position:,} has a wrong checksum. Replace the file."
                )
            kept.append(view[position:end])
        elif kind == b"eXIf":
            parts.exif = payload[position + 8 : end - 4]
        elif kind == b"iCCP":
            parts.profile = _inflate_profile(payload[position + 8 : end - 4])
        if kind == b"IEND":
            break
        position = end
    parts.payload = b"".join(kept)
    return parts


def _inflate_profile(chunk: bytes) -> bytes | None:
    _, _, rest = chunk.partition(b"\0")
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(rest[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else profile
