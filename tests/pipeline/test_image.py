"""Pictures come out upright, in 8-bit sRGB on white, or with the reason why not."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.decode import Decoder
from pipeline.image import decode_picture
from pipeline.sample import Member
from schemas.errors import (
    ImageTooLarge,
    ImageTooSmall,
    MediaCorrupt,
    MediaTruncated,
    MediaUnsupported,
    SampleError,
)
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec

LIMITS = LimitsSpec()


def photo(height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth picture without symmetry, its values well inside of 0 to 255."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(9 * x + 5 * y + phase) + 0.2 * np.sin(30 * x * y + phase) for phase in (0.0, 1.0, 2.0)]
    return (127 + 90 * np.stack(waves, axis=-1)).clip(10, 245).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def upright(payload: bytes, name: str = "0.jpg", **preprocess) -> np.ndarray:
    decoder = Decoder(PreprocessSpec(size=32, **preprocess), ClipSpec(clip_frames=4), LIMITS)
    return decoder.upright(Member(name, "file", len(payload), 0, payload))


def first_view(payload: bytes, **preprocess):
    decoder = Decoder(PreprocessSpec(size=32, **preprocess), ClipSpec(clip_frames=4), LIMITS)
    return next(decoder.views("key", Member("0.jpg", "file", len(payload), 0, payload)))


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---- orientation

STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_every_orientation_shows_the_same_upright_picture(orientation, format):
    original = photo()
    stored = np.ascontiguousarray(STORED[orientation](original))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    payload = encode(stored, format, exif=exif_with(orientation), **options)
    assert largest_difference(upright(payload), original) <= (4 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_random_crop_is_the_same_square_however_the_picture_is_stored(orientation):
    original = photo()
    options = {"crop": "random", "seed": 5}
    plain = first_view(encode(original, "PNG"), **options)
    stored = np.ascontiguousarray(STORED[orientation](original))
    turned = first_view(encode(stored, "PNG", exif=exif_with(orientation)), **options)
    assert (turned.crop, turned.width, turned.height) == (plain.crop, 128, 96)
    # The filter's weights are rounded, so that a mirrored row may differ by one level.
    assert largest_difference(turned.frames_TCHW.numpy(), plain.frames_TCHW.numpy()) <= 1


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\0" * 3])
def test_a_broken_exif_block_is_ignored(exif):
    payload = encode(photo(), "JPEG", quality=95)
    broken = payload[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + payload[2:]
    assert np.array_equal(upright(broken), upright(payload))


# ---- colour


def test_deep_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 128 * 96).round().astype(np.uint16).reshape(96, 128)
    for format in ("PNG", "TIFF"):
        shown = upright(encode(Image.fromarray(ramp), format))
        assert largest_difference(shown, np.repeat(np.round(ramp / 257)[..., None], 3, axis=2)) <= 1
        assert (shown.min(), shown.max()) == (0, 255)


def test_transparency_is_laid_on_white():
    colour = photo()
    alpha = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (96, 1))
    on_white = colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    rgba = np.dstack([colour, alpha])
    assert largest_difference(upright(encode(rgba, "PNG")), on_white) <= 1
    assert largest_difference(upright(encode(rgba, "WEBP", lossless=True, exact=True)), on_white) <= 1
    grey = colour[..., :1]
    la = Image.merge("LA", [Image.fromarray(grey[..., 0]), Image.fromarray(alpha)])
    grey_on_white = grey * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert largest_difference(upright(encode(la, "PNG")), np.repeat(grey_on_white, 3, axis=2)) <= 1


def test_palette_and_colour_key_transparency_are_laid_on_white():
    palette = Image.fromarray(np.arange(96 * 128, dtype=np.uint8).reshape(96, 128) % 4).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 90, 90])
    shown = upright(encode(palette, "PNG", transparency=bytes([0, 255, 51, 255])))
    assert shown[0, :4].tolist() == [[255, 255, 255], [0, 200, 0], [204, 204, 244], [90, 90, 90]]

    rgb = Image.fromarray(np.tile(np.array([[1, 2, 3], [9, 8, 7]], np.uint8), (96, 64, 1)))
    shown = upright(encode(rgb, "PNG", transparency=(1, 2, 3)))
    assert shown[0, :2].tolist() == [[255, 255, 255], [9, 8, 7]]

    deep = np.tile(np.array([257, 514], np.uint16), (96, 64))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 128, 96, 16, 0, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    body = (
        png_chunk(b"tRNS", struct.pack(">H", 257)) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    )
    assert upright(b"\x89PNG\r\n\x1a\n" + header + body)[0, :2].tolist() == [[255, 255, 255], [2, 2, 2]]


@pytest.mark.parametrize(("channels", "depth"), [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (3, 8), (3, 16)])
def test_the_transparent_value_of_a_png_counts_in_its_own_depth(channels, depth):
    most = (1 << depth) - 1
    key = most // 2
    values = np.tile(np.repeat([key, key + 1], channels), 8)
    bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
    row = np.packbits(bits.astype(np.uint8)).tobytes()
    payload = b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, content)
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", 16, 8, depth, channels - 1, 0, 0, 0)),
            (b"tRNS", struct.pack(">H", key) * channels),
            (b"IDAT", zlib.compress((b"\0" + row) * 8)),
            (b"IEND", b""),
        )
    )
    shown = upright(payload)
    assert shown.shape == (8, 16, 3)
    assert (shown[:, 0::2] == 255).all()
    assert (shown[:, 1::2] == ((key + 1) * 255 + most // 2) // most).all()


def test_one_bit_becomes_black_and_white():
    bits = np.indices((96, 128)).sum(axis=0) % 2 == 0
    shown = upright(encode(Image.fromarray(bits), "PNG"))
    assert np.array_equal(shown, np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=2))


def test_cmyk_with_adobe_inversion_has_the_colours_of_its_source():
    cmyk = Image.fromarray(photo()).convert("CMYK")
    payload = encode(cmyk, "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in payload
    assert largest_difference(upright(payload), np.asarray(cmyk.convert("RGB"))) <= 12
    assert largest_difference(upright(encode(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB"))) == 0


def profile_with_gamma(gamma: float) -> bytes:
    """sRGB's primaries with another tone curve: a profile that moves every middle grey."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    for tag in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * tag)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 16] = b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", round(gamma * 65536))
            struct.pack_into(">I", profile, 132 + 12 * tag + 8, 16)
    return bytes(profile)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_foreign_profile_is_converted_and_srgb_or_junk_is_not(format):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    grey = np.full((64, 64, 3), 128, np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # 128 with gamma 1.0 is linear light 0.502, which sRGB writes as 188.
    shown = upright(encode(grey, format, icc_profile=profile_with_gamma(1.0), **options))
    assert largest_difference(shown, np.full_like(grey, 188)) <= 2
    view = first_view(encode(grey, format, icc_profile=profile_with_gamma(1.0), **options))
    assert abs(int(view.frames_TCHW[0, 0, 16, 16]) - 188) <= 2
    for harmless in (srgb, b"junk" * 100, b"x", profile_with_gamma(1.0)[:200]):
        assert largest_difference(upright(encode(grey, format, icc_profile=harmless, **options)), grey) <= 1


def test_only_the_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(photo() // divisor) for divisor in (1, 2, 3)]
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        payload = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert largest_difference(upright(payload), photo()) == 0


def test_content_decides_and_not_the_name():
    picture = photo()
    assert np.array_equal(upright(encode(picture, "PNG"), name="0.jpg"), picture)
    assert np.array_equal(upright(encode(picture, "PNG"), name="0.mp4"), picture)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "JPEG"])
def test_every_format_is_read(format):
    picture = Image.fromarray(photo()).quantize(64).convert("RGB")
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    shown = upright(encode(picture, format, **options), name="0.jpg")
    assert largest_difference(shown, np.asarray(picture)) <= (6 if format == "JPEG" else 0)


# ---- damage


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_pictures_cut_short_are_truncated(format, share):
    options = {"compression": "tiff_lzw"} if format == "TIFF" else {}  # then its directory comes last
    payload = encode(photo(), format, **options)
    with pytest.raises(MediaTruncated, match="Copy it again"):
        decode_picture(payload[: max(40, int(len(payload) * share))], LIMITS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_truncated_pictures_are_kept_with_a_warning_where_asked(format):
    payload = encode(photo(400, 400), format)
    cut = payload[: len(payload) * 2 // 3]
    view = first_view(cut, truncated="keep")
    assert [warning.error for warning in view.warnings] == ["MediaTruncatedKept"]
    kept = upright(cut, truncated="keep")
    whole = upright(payload)
    assert largest_difference(kept[:100], whole[:100]) == 0
    assert largest_difference(kept[-50:], whole[-50:]) > 50


def test_keeping_truncated_pictures_does_not_hide_damage():
    payload = bytearray(encode(photo(400, 400), "PNG"))
    payload[len(payload) // 2] ^= 1
    with pytest.raises(MediaCorrupt, match="checksum"):
        decode_picture(bytes(payload), LIMITS, keep_truncated=True)


def test_damage_inside_of_a_jpeg_is_found():
    payload = bytearray(encode(photo(), "JPEG", quality=90))
    middle = len(payload) // 2
    payload[middle : middle + 200] = b"\xff\x00" * 100
    with pytest.raises(MediaCorrupt):
        decode_picture(bytes(payload), LIMITS)


@pytest.mark.parametrize(
    "payload", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF0000WEBP"]
)
def test_headers_alone_are_failures(payload):
    with pytest.raises((MediaTruncated, MediaCorrupt, MediaUnsupported)):
        decode_picture(payload, LIMITS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_random_damage_never_gives_anything_but_a_picture_or_a_sample_error(format):
    payload = encode(photo(40, 50), format)
    generator = np.random.default_rng(1)
    num_handled = 0
    for _ in range(150):
        damaged = bytearray(payload)
        for position in generator.integers(0, len(damaged), 4):
            damaged[position] = generator.integers(0, 256)
        try:
            picture = decode_picture(bytes(damaged), LimitsSpec(max_pixels=1_000_000))
            assert picture.pixels_HWC.dtype == np.uint8
            assert picture.pixels_HWC.shape[2] == 3
            num_handled += 1
        except SampleError as error:
            assert error.stage in ("decode", "limit")
            str(error).encode()
            num_handled += 1
    assert num_handled == 150


def test_a_hostile_jpeg_of_segments_ends_quickly():
    with pytest.raises(MediaCorrupt, match="segments"):
        decode_picture(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000, LIMITS)


@pytest.mark.parametrize(
    "payload",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg></svg>", b"<!DOCTYPE html>", b"%PDF-1.4", b"\0\0\0\x18ftypheic" + b"\0" * 40],
)
def test_foreign_content_is_refused_by_name(payload):
    with pytest.raises(MediaUnsupported, match="begins with"):
        decode_picture(payload, LIMITS)


# ---- limits


def declared(width: int, height: int) -> dict[str, bytes]:
    """Small files whose headers declare a size."""
    jpeg = bytearray(encode(photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, frame + 5, height, width)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    gif = bytearray(encode(photo(), "GIF"))
    struct.pack_into("<HH", gif, 6, width, height)
    bmp = bytearray(encode(photo(), "BMP"))
    struct.pack_into("<ii", bmp, 18, width, height)
    webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
    webp += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    ppm = b"P6 %d %d 255\n" % (width, height)
    return {"jpeg": bytes(jpeg), "png": png, "gif": bytes(gif), "bmp": bytes(bmp), "webp": webp + bytes(8), "ppm": ppm}


@pytest.mark.parametrize("format", ["jpeg", "png", "gif", "bmp", "webp", "ppm"])
def test_too_many_pixels_are_refused_from_the_header(format):
    payload = declared(30_000, 30_000)[format]
    tracemalloc.start()
    with pytest.raises(ImageTooLarge, match=r"900,000,000 pixels, over limits.max_pixels"):
        decode_picture(payload, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_a_second_header_does_not_bypass_the_limits():
    payload = encode(photo(), "PNG")
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0))
    with pytest.raises(MediaCorrupt, match="second header chunk at byte 33"):
        decode_picture(payload[:33] + header + payload[33:], LIMITS)


def test_sides_have_limits_too():
    with pytest.raises(ImageTooLarge, match="max_side"):
        decode_picture(encode(photo(10, 300), "PNG"), LimitsSpec(max_side=299))
    with pytest.raises(ImageTooSmall, match="min_side"):
        decode_picture(encode(photo(7, 300), "JPEG"), LIMITS)
    assert decode_picture(encode(photo(8, 300), "JPEG"), LIMITS).pixels_HWC.shape == (8, 300, 3)


def test_compressed_text_and_profiles_of_a_png_are_never_inflated_without_bound():
    payload = encode(photo(), "PNG")
    bomb = zlib.compress(bytes(60 << 20))
    chunks = png_chunk(b"zTXt", b"a\0\0" + bomb) + png_chunk(b"iCCP", b"a\0\0" + bomb)
    tracemalloc.start()
    picture = decode_picture(payload[:33] + chunks + payload[33:], LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(picture.pixels_HWC, photo())
    assert peak < 20e6


def test_small_pictures_are_scaled_up():
    view = first_view(encode(photo(18, 24), "PNG"))
    assert view.frames_TCHW.shape == (1, 3, 32, 32)
    assert view.crop == (3, 0, 18, 18)
