"""Colours into 8-bit sRGB on white: embedded profiles, transparency, deep and CMYK pictures."""

from __future__ import annotations

import functools
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Pixels = npt.NDArray[np.uint8]

MAX_PROFILE_BYTES = 4 << 20
_MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# A profile that moves no colour of a 9x9x9 cube by more than this is sRGB under another name.
_SRGB_TOLERANCE = 2


@functools.lru_cache(maxsize=32)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what turns `mode` ("RGB", "L", "CMYK") pixels with an ICC profile into sRGB.

    None for a profile that is sRGB anyway, broken, too large, or made for another mode: then nothing is converted."""
    if not 128 <= len(profile) <= MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODE_OF_SPACE.get(source.profile.xcolor_space.strip()) != mode:
            return None
        # NOCACHE: without it a transform keeps the last colour, which threads must not share.
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.NOCACHE,
        )
        if mode == "RGB" and _keeps_colours(transform):
            return None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def apply_transform(transform: ImageCms.ImageCmsTransform, pixels_HWC: Pixels) -> Pixels:
    """Return RGB pixels converted to sRGB; a grey profile reads the first channel."""
    source = pixels_HWC[..., 0] if transform.input_mode == "L" else pixels_HWC
    return np.array(transform.apply(Image.fromarray(np.ascontiguousarray(source))))


def to_rgb(image: Image.Image) -> Pixels:
    """Return a loaded Pillow picture of any mode as uint8 [H, W, 3], transparency laid on white.

    Raises ValueError for modes without a defined range (32-bit integers, floating point)."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        return _deep_grey_to_rgb(np.asarray(image), transparency)
    if mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits in a wider type
        return _deep_grey_to_rgb(np.asarray(image).clip(0, 65535), transparency)
    if mode in ("I", "F"):
        raise ValueError(f"pixels of mode {mode!r} have no defined range")
    if image.has_transparency_data:
        rgba = image if mode == "RGBA" else image.convert("RGBA")
        on_white = Image.new("RGB", image.size, (255, 255, 255))
        on_white.paste(rgba, mask=rgba.getchannel("A"))
        return np.array(on_white)
    return np.array(image if mode == "RGB" else image.convert("RGB"))


def key_of_png(transparency: object, mode: str, depth: int) -> object:
    """Return the value that stands for transparent in a PNG of `depth` bits as Pillow loads such a value."""
    if mode == "L" and isinstance(transparency, int):
        most = (1 << depth) - 1
        return (transparency & most) * 255 // most
    if mode == "RGB" and isinstance(transparency, tuple):
        return tuple(value >> 8 if depth == 16 else value & 255 for value in transparency)
    return transparency


def cmyk_to_rgb(pixels_HWC: Pixels, profile: bytes | None) -> Pixels:
    """Return CMYK pixels (0 = no ink) as sRGB, through the profile if one fits."""
    image = Image.frombuffer("CMYK", (pixels_HWC.shape[1], pixels_HWC.shape[0]), np.ascontiguousarray(pixels_HWC))
    transform = srgb_transform(profile, "CMYK") if profile else None
    return np.array(transform.apply(image) if transform else image.convert("RGB"))


def _deep_grey_to_rgb(values_HW: npt.NDArray[np.integer], transparent: object) -> Pixels:
    # Divided by 257 with rounding, so that 0 -> 0 and 65535 -> 255; converting would clip at 255 instead.
    grey = ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values_HW == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _keeps_colours(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    moved = apply_transform(transform, cube).astype(np.int16) - cube
    return int(np.abs(moved).max()) <= _SRGB_TOLERANCE
