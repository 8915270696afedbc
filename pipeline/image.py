"""Bytes of a picture -> its pixels as stored, and what it takes to show them right.

JPEG goes through simplejpeg, strictly; Pillow takes over for what that cannot handle, never for what it found damaged.
Every other format goes to the one Pillow class that its first bytes name, so that no decoder guesses.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageCms,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline import colour, png
from pipeline.jpeg import JpegHeader, exif_orientation, read_jpeg_header
from schemas.errors import (
    DecodeError,
    ImageTooLarge,
    ImageTooSmall,
    MediaCorrupt,
    MediaTruncated,
    MediaTruncatedKept,
    MediaUnsupported,
    SampleError,
)
from schemas.jobspec import LimitsSpec

Pixels = npt.NDArray[np.uint8]

# Classes, not names for Image.open: that one knows EPS, which starts an interpreter, and has a pixel limit of its own
# for the whole process.
_PILLOW_CLASSES: tuple[tuple[bytes, int, type[ImageFile.ImageFile]], ...] = (
    (b"GIF8", 0, GifImagePlugin.GifImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
    (b"II*\x00", 0, TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", 0, TiffImagePlugin.TiffImageFile),
    (b"II+\x00", 0, TiffImagePlugin.TiffImageFile),
    (b"MM\x00+", 0, TiffImagePlugin.TiffImageFile),
    (b"BM", 0, BmpImagePlugin.BmpImageFile),
    (b"ftypavif", 4, AvifImagePlugin.AvifImageFile),
    (b"ftypavis", 4, AvifImagePlugin.AvifImageFile),
    (b"\x00\x00\x00\x0cjP  ", 0, Jpeg2KImagePlugin.Jpeg2KImageFile),
    (b"\xff\x4f\xff\x51", 0, Jpeg2KImagePlugin.Jpeg2KImageFile),
    *((b"P%d" % kind, 0, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)


@dataclass(slots=True)
class Picture:
    """A decoded picture as it is stored; `orientation` and `to_srgb` are for later, when it is small."""

    pixels_HWC: Pixels
    """uint8 [H, W, 3]; writable."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    to_srgb: ImageCms.ImageCmsTransform | None = None
    """Colour conversion that is still to be applied."""
    warnings: list[SampleError] = field(default_factory=list)


def decode_picture(payload: bytes, limits: LimitsSpec, *, keep_truncated: bool = False) -> Picture:
    """Decode the first frame of a picture.

    Size limits are checked from the header, before pixels take memory.  With `keep_truncated` a picture that ends
    early is returned as far as it goes, with a warning.  Raises a DecodeError or LimitError."""
    if not payload:
        raise MediaTruncated("the picture is empty (0 bytes). Copy it again.")
    if payload.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(payload, limits, keep_truncated)
    if payload.startswith(png.SIGNATURE):
        return _decode_png(payload, limits, keep_truncated)
    for magic, offset, image_class in _PILLOW_CLASSES:
        if payload.startswith(magic, offset):
            return _decode_other(payload, image_class, limits, keep_truncated)
    raise MediaUnsupported(
        f"no picture format that can be decoded; it begins with {payload[:12]!r}. "
        "Convert it to JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or JPEG 2000."
    )


def check_size(width: int, height: int, limits: LimitsSpec, *, what: str = "picture") -> None:
    """Raise ImageTooLarge or ImageTooSmall for a declared size outside of the limits."""
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the {what} declares {width} x {height} = {width * height:,} pixels, "
            f"over limits.max_pixels ({limits.max_pixels:,})."
        )
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(f"the {what} declares {width} x {height}, over limits.max_side ({limits.max_side:,}).")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(f"the {what} is {width} x {height}, under limits.min_side ({limits.min_side}).")


def _decode_jpeg(payload: bytes, limits: LimitsSpec, keep_truncated: bool) -> Picture:
    header = read_jpeg_header(payload)
    check_size(header.width, header.height, limits)
    try:
        return _simplejpeg(payload, header, strict=True)
    except MediaTruncated as error:
        if not keep_truncated:
            raise
        picture = _simplejpeg(payload, header, strict=False)
        picture.warnings.append(MediaTruncatedKept(str(error)))
        return picture


def _simplejpeg(payload: bytes, header: JpegHeader, *, strict: bool) -> Picture:
    try:
        if header.channels == 4:
            stored_HWC = simplejpeg.decode_jpeg(payload, "CMYK", strict=strict)
            ink_HWC = 255 - stored_HWC if header.adobe else stored_HWC
            return Picture(colour.cmyk_to_rgb(ink_HWC, header.profile), header.orientation)
        pixels_HWC = simplejpeg.decode_jpeg(payload, "RGB", strict=strict)
    except ValueError as error:
        message = str(error)
    else:
        mode = "L" if header.channels == 1 else "RGB"
        to_srgb = colour.srgb_transform(header.profile, mode) if header.profile else None
        return Picture(pixels_HWC, header.orientation, to_srgb)
    if message.startswith("Premature end of JPEG file"):
        raise MediaTruncated("the JPEG ends before its last row. Copy it again.")
    if "subsampling" in message:  # 4:1:0 and other layouts that TurboJPEG does not know
        image = _load(_open(JpegImagePlugin.JpegImageFile, payload, "JPEG"), "JPEG")
        return _picture(image, header.orientation, header.profile)
    if "nsupported" in message:
        raise MediaUnsupported(f"the JPEG cannot be decoded: {message}. Convert it to baseline JPEG.")
    raise MediaCorrupt(f"the JPEG is damaged: {message}. Replace the file.")


def _decode_png(payload: bytes, limits: LimitsSpec, keep_truncated: bool) -> Picture:
    parts = png.read_png(payload)
    check_size(parts.width, parts.height, limits)
    warnings: list[SampleError] = []
    if parts.truncated:
        message = f"the PNG ends at byte {len(payload):,}, before its closing chunk. Copy it again."
        if not keep_truncated:
            raise MediaTruncated(message)
        warnings.append(MediaTruncatedKept(message))
    image = _open(PngImagePlugin.PngImageFile, parts.payload, "PNG")
    check_size(*image.size, limits)
    image = _load(image, "PNG", partly=parts.truncated)
    if "transparency" in image.info:
        image.info["transparency"] = colour.key_of_png(image.info["transparency"], image.mode, parts.depth)
    picture = _picture(image, exif_orientation(parts.exif), parts.profile)
    picture.warnings = warnings
    return picture


def _decode_other(
    payload: bytes, image_class: type[ImageFile.ImageFile], limits: LimitsSpec, keep_truncated: bool
) -> Picture:
    name = image_class.format or "picture"
    if (early := _declared_size(payload)) is not None:
        check_size(*early, limits)
    if name == "WEBP" and struct.unpack_from("<I", payload, 4)[0] + 8 > len(payload):
        raise MediaTruncated(f"the WebP ends at byte {len(payload):,}, before its last chunk. Copy it again.")
    if name == "TIFF" and _tiff_directory(payload) + 2 > len(payload):
        raise MediaTruncated(f"the TIFF ends at byte {len(payload):,}, before its directory. Copy it again.")
    image = _open(image_class, payload, name)
    check_size(*image.size, limits)
    # Pillow turns a TIFF while loading it; its EXIF block then still holds the old orientation.
    exif = image.info.get("exif", b"") if name != "TIFF" else b""
    profile = image.info.get("icc_profile")
    warnings: list[SampleError] = []
    try:
        image = _load(image, name)
    except MediaTruncated as error:
        if not keep_truncated:
            raise
        image = _load(image, name, partly=True)
        warnings.append(MediaTruncatedKept(str(error)))
    picture = _picture(image, exif_orientation(exif.removeprefix(b"Exif\0\0")), profile)
    picture.warnings = warnings
    return picture


def _declared_size(payload: bytes) -> tuple[int, int] | None:
    """Return the size that a GIF or WebP header names: Pillow takes memory for the canvas when it opens them."""
    if payload.startswith(b"GIF8") and len(payload) >= 10:
        return struct.unpack_from("<HH", payload, 6)
    if len(payload) < 30 or payload[8:12] != b"WEBP":
        return None
    if payload[12:16] == b"VP8X":
        return int.from_bytes(payload[24:27], "little") + 1, int.from_bytes(payload[27:30], "little") + 1
    if payload[12:16] == b"VP8L":
        (packed,) = struct.unpack_from("<I", payload, 21)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", payload, 26)
    return width & 0x3FFF, height & 0x3FFF


def _tiff_directory(payload: bytes) -> int:
    order: Literal["little", "big"] = "little" if payload.startswith(b"II") else "big"
    big = payload[2:4] in (b"+\0", b"\0+")
    return int.from_bytes(payload[8:16] if big else payload[4:8], order)


def _open(image_class: type[ImageFile.ImageFile], payload: bytes, name: str) -> ImageFile.ImageFile:
    try:
        return image_class(io.BytesIO(payload))
    except MemoryError:
        raise
    except Exception as error:  # on damaged headers Pillow raises nearly everything
        raise _explain(error, name) from error


def _load(image: ImageFile.ImageFile, name: str, *, partly: bool = False) -> ImageFile.ImageFile:
    """Decode the pixels; with `partly` what is missing at the end stays black."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # and on damaged data
        explained = _explain(error, name)
        if not partly or not isinstance(explained, MediaTruncated):
            raise explained from error
        # The rows that came are in the picture already; without tiles there is nothing left to decode.  Pillow's own
        # switch for this holds for the whole process.
        image.tile = []
        image.load()
    return image


def _explain(error: Exception, name: str) -> DecodeError:
    message = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if isinstance(error.__cause__ or error, EOFError) or "truncated" in message.lower():
        return MediaTruncated(f"the {name} ends before its last row ({message}). Copy it again.")
    return MediaCorrupt(f"the {name} cannot be decoded ({message}). Replace the file or convert it.")


def _picture(image: ImageFile.ImageFile, orientation: int, profile: bytes | None) -> Picture:
    if image.mode == "CMYK":
        return Picture(colour.cmyk_to_rgb(np.asarray(image), profile), orientation)
    mode = "L" if image.mode.startswith(("L", "1", "I")) and image.mode != "LAB" else "RGB"
    try:
        pixels_HWC = colour.to_rgb(image)
    except ValueError as error:
        raise MediaUnsupported(f"the {image.format} cannot be shown in 8 bits: {error}. Convert it.") from error
    return Picture(pixels_HWC, orientation, colour.srgb_transform(profile, mode) if profile else None)
