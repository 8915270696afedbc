"""What a JPEG says about itself before its pixels: size, orientation, colour.  Standard library only."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from schemas.errors import MediaCorrupt, MediaTruncated, MediaUnsupported

# Real files have some tens of segments; a hostile one has a quarter of a million in each MB.
_MAX_SEGMENTS = 4096
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))
# Baseline, extended, progressive: Huffman and arithmetic.  The others are lossless or hierarchical.
_DECODABLE_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))
_OTHER_FRAMES = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF))
_MAX_PROFILE_BYTES = 4 << 20
_ORIENTATION_TAG = 0x0112
_TYPE_SHORT = 3


@dataclass(slots=True)
class JpegHeader:
    width: int = 0
    height: int = 0
    channels: int = 0
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 where there is none or it is no valid one."""
    profile: bytes | None = None
    """Embedded ICC profile, joined from its parts."""
    adobe: bool = False
    """Has an Adobe marker: then CMYK values are stored inverted."""


def read_jpeg_header(payload: bytes) -> JpegHeader:
    """Read every segment up to the first scan.

    Raises MediaTruncated, MediaCorrupt, or MediaUnsupported (12 bits, lossless, height that comes later)."""
    header = JpegHeader()
    profile_parts: dict[int, bytes] = {}
    position = 2
    for _ in range(_MAX_SEGMENTS):
        # The decoder passes over stray bytes between segments and then reports them; so they are no error here.
        position = payload.find(b"\xff", position)
        while position >= 0 and payload[position + 1 : position + 2] == b"\xff":
            position += 1
        if position < 0 or position + 4 > len(payload):
            raise MediaTruncated(f"the JPEG ends at byte {len(payload):,}, before its first scan. Copy it again.")
        marker = payload[position + 1]
        if marker in _STANDALONE or marker == 0:
            position += 2
            continue
        if marker == 0xD9:
            raise MediaCorrupt(f"the JPEG closes at byte {position:,} without any scan. Replace the file.")
        (length,) = struct.unpack_from(">H", payload, position + 2)
        start, end = position + 4, position + 2 + length
        if length < 2:
            raise MediaCorrupt(f"the JPEG segment at byte {position:,} declares {length} bytes. Replace the file.")
        if end > len(payload):
            raise MediaTruncated(f"the JPEG ends at byte {len(payload):,}, inside its header. Copy it again.")
        if marker == 0xDA:
            if not header.channels:
                raise MediaCorrupt(f"the JPEG has a scan at byte {position:,} but no frame header. Replace the file.")
            header.profile = _join_profile(profile_parts)
            return header
        if marker in _DECODABLE_FRAMES and not header.channels:
            _read_frame_header(payload, start, end, header)
        elif marker in _OTHER_FRAMES:
            raise MediaUnsupported(
                f"the JPEG is lossless or hierarchical (marker FF{marker:02X}). Convert it to baseline JPEG."
            )
        elif marker == 0xE1 and header.orientation == 1 and payload.startswith(b"Exif\0\0", start):
            header.orientation = exif_orientation(payload[start + 6 : end])
        elif marker == 0xE2 and payload.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
            profile_parts.setdefault(payload[start + 12], payload[start + 14 : end])
        elif marker == 0xEE and payload.startswith(b"Adobe", start):
            header.adobe = True
        position = end
    raise MediaCorrupt(f"the JPEG has more than {_MAX_SEGMENTS:,} segments before its first scan. Replace the file.")


def exif_orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that an EXIF block names; 1 for a block that is broken or names none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if kind == _TYPE_SHORT and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _read_frame_header(payload: bytes, start: int, end: int, header: JpegHeader) -> None:
    if end - start < 6:
        raise MediaCorrupt(f"the JPEG frame header at byte {start:,} is too short. Replace the file.")
    precision, header.height, header.width, header.channels = struct.unpack_from(">BHHB", payload, start)
    if precision != 8:
        raise MediaUnsupported(f"the JPEG has {precision} bits a sample, only 8 can be decoded. Convert it.")
    if header.height == 0:
        raise MediaUnsupported("the JPEG names its height only after the first scan. Save it again.")
    if header.width == 0 or header.channels not in (1, 3, 4):
        raise MediaCorrupt(
            f"the JPEG declares a width of {header.width} and {header.channels} components. Replace the file."
        )


def _join_profile(parts: dict[int, bytes]) -> bytes | None:
    if not parts or sum(map(len, parts.values())) > _MAX_PROFILE_BYTES:
        return None
    return b"".join(part for _, part in sorted(parts.items()))
