"""Is a member an image or a video?  By content; the extension decides only what the content leaves open.

Standard library only: grouping needs it in processes that never decode.
"""

from __future__ import annotations

from typing import Literal

MediaKind = Literal["image", "video"]

_IMAGE_WORDS = """
jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k jpx avif avifs heic heif jxl svg eps psd
tga ico qoi exr hdr img image
"""
_VIDEO_WORDS = """
mp4 m4v mov qt mkv webm avi ts mts m2ts 3gp 3g2 mpg mpeg wmv asf flv f4v ogv vob h264 264 h265 265 hevc av1 ivf y4m
video
"""

IMAGE_EXTENSIONS = frozenset(_IMAGE_WORDS.split())
"""Lower case, without the dot.  Also formats that are not decoded: `MediaUnsupported` says more than `NoMedia`."""

VIDEO_EXTENSIONS = frozenset(_VIDEO_WORDS.split())
"""Lower case, without the dot.  Also containers that are not opened, for the same reason."""

_IMAGE_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"II+\x00",  # BigTIFF
    b"MM\x00+",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",  # JPEG 2000 file
    b"\xff\x4f\xff\x51",  # JPEG 2000 code stream
    b"\xff\x0a",  # JPEG XL code stream
    b"\x00\x00\x00\x0cJXL \r\n\x87\n",
    b"8BPS",  # Photoshop
    b"%!PS",  # PostScript: recognised so that it can be refused by name
)
_VIDEO_MAGIC = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"YUV4MPEG2 ",
    b"DKIF",  # IVF
)
_IMAGE_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_QUICKTIME_BOXES = frozenset((b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof", b"styp", b"sidx"))
_TS_PACKET = 188
_M2TS_PACKET = 192


def media_kind_of_extension(extension: str) -> MediaKind | None:
    """Return what an extension such as "jpg", "seg.PNG" or "mp4" announces; None for any other."""
    last = extension.rpartition(".")[2].lower()
    if last in IMAGE_EXTENSIONS:
        return "image"
    return "video" if last in VIDEO_EXTENSIONS else None


def sniff_media(payload: bytes) -> MediaKind | None:
    """Return what the first bytes say that a payload is; None where they leave it open.

    Formats that cannot be decoded (HEIC, PostScript, WMV) are recognised too, so that they are refused by name.
    A GIF is left open: named .gif it is a picture, named .mp4 a film."""
    head = payload[:16]
    if head.startswith(_IMAGE_MAGIC):
        return "image"
    if head.startswith(_VIDEO_MAGIC):
        return "video"
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"AVI "):
        return "image" if head[8:12] == b"WEBP" else "video"
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in _IMAGE_BRANDS else "video"
    if head[4:8] in _QUICKTIME_BOXES:
        return "video"
    if _is_bitmap(payload) or _is_netpbm(head):
        return "image"
    return "video" if _is_transport_stream(payload) else None


def _is_bitmap(payload: bytes) -> bool:
    # "BM" alone begins many texts; the size of the header that follows takes few values.
    return payload[:2] == b"BM" and payload[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x34\0\0\0", b"\x38\0\0\0",
                                                       b"\x40\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")  # fmt: skip


def _is_netpbm(head: bytes) -> bool:
    return len(head) > 3 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#"


def _is_transport_stream(payload: bytes) -> bool:
    for first, step in ((0, _TS_PACKET), (4, _M2TS_PACKET)):
        marks = payload[first : first + 5 * step : step]
        if len(marks) >= 2 and set(marks) == {0x47}:
            return True
    return False
