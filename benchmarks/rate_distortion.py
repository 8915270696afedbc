"""Compare .bsq files with codecs: quality against bits per pixel, in one run, on the same pixels.

python -m benchmarks.rate_distortion --photos 'val-photos/*.tar' --clips 'val-clips/*.tar' \
    --model TOKENIZER PRIOR --out benchmarks/results/rate-distortion

Every picture is the middle square and every clip the first frames of its video, brought to the tokenizer's size by
Lanczos.  The tokens of each are coded, decoded and compared bit by bit; pixels are rounded before they are measured.
Codecs are asked for a list of payload rates, picture by picture.  Rates are means of bits per pixel over all items,
quality means of each item's.  Writes OUT.md, OUT.json and OUT-photos.svg, OUT-clips.svg."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from jobs.coded_inputs import TokenizedItem, pack_clip
from jobs.compress import encode_files, tokens_checksum
from jobs.decompress import decode_files, item_frames
from pipeline.codec_rates import Codec, clip_codecs, code_nearest, h265_codecs, picture_codecs
from pipeline.sources import expand_shards
from pipeline.training_batches import Complaints, ShardSource, hold_frames
from schemas.bsqfile import FINGERPRINT_BYTES, BsqFile, CodedItem
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tokenizer.checkpoint import build_model, read_checkpoint
from tokenizer.losses import ms_ssim, psnr
from tokenizer.prior_checkpoint import build_prior, read_prior
from tokenizer.prior_coder import PriorCoder

RATES = {"photos": (0.1, 0.14, 0.2, 0.28, 0.4, 0.56), "clips": (0.03, 0.06, 0.1, 0.16, 0.28)}
"""Bits per pixel of payload that codecs are asked for, besides those of the models."""
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#16a3a3", "#e0a100", "#444444")
WIDTH, HEIGHT, MARGIN = 560, 340, 48

Frames = npt.NDArray[np.uint8]


@dataclass
class Point:
    """One method at one rate, over all items."""

    method: str
    payload_bpp: float
    file_bpp: float
    psnr: float
    ms_ssim: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", nargs="*", default=[])
    parser.add_argument("--clips", nargs="*", default=[])
    parser.add_argument("--model", nargs=2, action="append", required=True, metavar=("TOKENIZER", "PRIOR"))
    parser.add_argument("--limit", type=int, default=10_000, help="the most items of each kind")
    parser.add_argument("--codec-limit", type=int, default=10_000, help="the most items for codecs")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    text, points = [], {}
    for kind, shards in (("photos", given.photos), ("clips", given.clips)):
        if not shards:
            continue
        found: list[Point] = []
        for tokenizer, prior in given.model:
            items = list(read_items(shards, kind, tokenizer, given.limit))
            found += model_points(items, tokenizer, prior, given.lanes)
        codecs = picture_codecs() if kind == "photos" else [*clip_codecs(), *h265_codecs()]
        rates = apart([*(point.payload_bpp for point in found), *RATES[kind]])
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            asked = [(codec, rate) for codec in codecs for rate in rates]
            found += pool.map(partial(codec_point, items[: given.codec_limit]), *zip(*asked, strict=True))
        points[kind] = found
        text.append(table(kind, len(items), found))
        for measure in ("psnr", "ms_ssim"):
            Path(f"{given.out}-{kind}-{measure}.svg").write_text(plot(found, kind, measure), encoding="utf-8")
    Path(f"{given.out}.md").write_text("\n".join(text), encoding="utf-8")
    values = {kind: [asdict(point) for point in found] for kind, found in points.items()}
    Path(f"{given.out}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


def apart(rates: Sequence[float]) -> list[float]:
    """Rates in order, without those that are within 4 % of one before them in the list."""
    kept: list[float] = []
    for rate in rates:
        if all(abs(math.log(rate / other)) > 0.04 for other in kept):
            kept.append(rate)
    return sorted(kept)


def read_items(shards: Sequence[str], kind: str, tokenizer: str, limit: int) -> Iterator[Frames]:
    """Frames [T, S, S, 3] of each item."""
    config = read_checkpoint(tokenizer).config()
    source = ShardSource(
        urls=expand_shards(shards, None),
        kind="image" if kind == "photos" else "video",
        preprocess=PreprocessSpec(size=config.image_size),
        clips=ClipSpec(fps="source", clip_frames=config.max_frames, stride=config.max_frames, short_clips="drop"),
        limits=LimitsSpec(),
        clips_per_video=1,
        num_threads=1,
        storage_options=None,
    )
    yield from hold_frames(source, Complaints(print), most=limit).numpy()


def model_points(items: Sequence[Frames], tokenizer: str, prior_name: str, lanes: int) -> list[Point]:
    """The tokens as they are, with a prior in a file each, and in one pack; all the same pixels."""
    model_files, prior_files = read_checkpoint(tokenizer), read_prior(prior_name)
    model, config = build_model(model_files), model_files.config()
    coder = PriorCoder(build_prior(prior_files), lanes=lanes)
    size, clip_frames = config.image_size, min(config.max_frames, coder.prior.config.max_frames)
    tokenized = [
        TokenizedItem(
            CodedItem(size, size, len(frames), name=f"{number:06d}"),
            [
                pack_clip(model.encode(torch.from_numpy(frames[np.newaxis, first : first + clip_frames]))[0].numpy())
                for first in range(0, len(frames), clip_frames)
            ],
        )
        for number, frames in enumerate(items)
    ]
    base = BsqFile(
        items=(),
        streams=(),
        tokenizer=bytes.fromhex(model_files.weight_sha256())[:FINGERPRINT_BYTES],
        prior=bytes.fromhex(prior_files.weight_sha256())[:FINGERPRINT_BYTES],
        bits=config.bits_per_token,
        grid=config.grid,
        patch=config.patch_size,
        clip_frames=clip_frames,
        lanes=lanes,
    )
    singles = encode_files(coder, base, [[each] for each in tokenized], is_pack=False)
    (pack,) = encode_files(coder, base, [tokenized], is_pack=True)
    for each, clips in zip(tokenized, decode_files(coder, singles), strict=True):
        assert clips is not None and tokens_checksum(clips) == tokens_checksum(each.clips), each.item.name
    (unpacked,) = decode_files(coder, [pack])
    assert unpacked is not None and tokens_checksum(unpacked) == pack.tokens_crc32
    made = [item_frames(model, base, each.item, each.clips) for each in tokenized]
    quality = mean_quality(items, made)
    pixels = sum(math.prod(frames.shape[:3]) for frames in items)
    raw = 8 * sum(len(clip.packed) for each in tokenized for clip in each.clips) / pixels
    coded = 8 * sum(file.payload_bytes for file in singles) / pixels
    files = 8 * sum(len(file.to_bytes()) for file in singles) / pixels
    packed, pack_file = 8 * pack.payload_bytes / pixels, 8 * len(pack.to_bytes()) / pixels
    bits = 8 * pack.payload_bytes / pack.num_tokens
    name = f"bsqtok {config.bits_per_token} bits"
    print(f"{len(items)} items lossless; {bits:.3f} of {config.bits_per_token} bits per token with {prior_name}")
    return [
        Point(f"{name}, no prior", raw, raw, *quality),
        Point(f"{name}, prior", coded, files, *quality),
        Point(f"{name}, prior, pack", packed, pack_file, *quality),
    ]


def codec_point(items: Sequence[Frames], codec: Codec, rate: float) -> Point:
    """A codec near a rate of payload."""
    made, sums = [], defaultdict(float)
    for frames in items:
        pixels = math.prod(frames.shape[:3])
        (coded,) = code_nearest(codec, frames, round(rate * pixels / 8), ["payload"])
        made.append(coded.frames_THWC)
        sums["payload"] += 8 * coded.payload_bytes
        sums["file"] += 8 * coded.file_bytes
        sums["pixels"] += pixels
    return Point(
        codec.name, sums["payload"] / sums["pixels"], sums["file"] / sums["pixels"], *mean_quality(items, made)
    )


def mean_quality(items: Sequence[Frames], made: Sequence[Frames]) -> tuple[float, float]:
    """Mean over items of PSNR and of MS-SSIM with 7 taps; of a clip the mean over its frames."""
    scores = []
    for original, other in zip(items, made, strict=True):
        pair = [torch.from_numpy(np.ascontiguousarray(each)) for each in (other, original)]
        planar = [each.permute(0, 3, 1, 2).float() for each in pair]
        similarity = ms_ssim(planar[0], planar[1], data_range=255.0, taps=7)
        scores.append((float(psnr(*pair).mean()), float(similarity.mean())))
    means = np.array(scores).mean(0)
    return float(means[0]), float(means[1])


def table(kind: str, count: int, points: Sequence[Point]) -> str:
    """Markdown, by method and rate."""
    lines = [
        f"## {kind}, {count}", "",
        "| method | payload, bits/pixel | file, bits/pixel | PSNR, dB | MS-SSIM (7 taps) |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {each.method} | {each.payload_bpp:.3f} | {each.file_bpp:.3f} | {each.psnr:.2f} | {each.ms_ssim:.3f} |"
        for each in points
    ]
    return "\n".join([*lines, ""])


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, evenly spaced, from not above `low` to not below `high`."""
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 6) for number in range(first, last + 1)]


def plot(points: Sequence[Point], kind: str, measure: str) -> str:
    """SVG: a line for each codec, a mark for each model."""
    rates = ticks(0, max(point.payload_bpp for point in points))
    values = [getattr(point, measure) for point in points]
    levels = ticks(min(values), max(values))
    x_high, low, high = rates[-1], levels[0], levels[-1]

    def place(point: Point) -> tuple[float, float]:
        y = MARGIN + (HEIGHT - 2 * MARGIN) * (high - getattr(point, measure)) / (high - low)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * point.payload_bpp / x_high, 1), round(y, 1)

    title = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM, 7 taps"}[measure]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 150} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{kind}: {title} against bits per pixel of payload</text>',
    ]
    for value in levels:
        y = place(Point("", 0, 0, value, value))[1]
        parts.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for rate in rates:
        x = place(Point("", rate, 0, low, low))[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{rate:g}</text>')
    methods: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        methods[point.method].append(point)
    for number, (name, several) in enumerate(methods.items()):
        colour, places = COLOURS[number % len(COLOURS)], [place(point) for point in several]
        path = "L".join(f"{x} {y}" for x, y in sorted(places))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}"/>')
        # A model has one rate: a large mark, and no line.
        radius = 3 if len(several) > 1 else 6
        parts += [f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}" fill-opacity="0.8"/>' for x, y in places]
        parts.append(f'<text x="{WIDTH - 40}" y="{MARGIN + 18 * number}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
