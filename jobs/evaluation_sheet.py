"""An evaluation for people: a table of lines, and a picture of the best, median and worst items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from jobs.contact_sheet import Tile, draw_sheet, png_bytes
from schemas.evaluation import EvaluationReport, KindRecord, MethodRecord
from tokenizer.config import BSQViTConfig
from tokenizer.metrics import ms_ssim_form, picture_scores

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3]"""


@dataclass(frozen=True, slots=True)
class ShownItem:
    """An item and what became of it."""

    word: str
    """best, median or worst."""
    key: str
    clip: int
    original_THWC: Frames
    versions: Mapping[str, Frames]
    """By method, the tokens first."""


def draw_items(items: Sequence[ShownItem], tokenizer: str, config: BSQViTConfig, filter: str) -> bytes:
    """Draw items as a PNG: the original, below it what the tokens decode to, below that the codec; of clips the
    middle frame, with the numbers of the whole clip."""
    methods = list(items[0].versions)
    rate = config.bits_per_token / config.patch_size**2
    below = "what the tokens decode to" + "".join(f", {name} at as many payload bytes" for name in methods[1:])
    trained = "" if config.trained else ", RANDOM WEIGHTS (never trained)"
    measure = ms_ssim_form(config.image_size)[0]
    title = (
        f"From above: the original, {below}. Best, median and worst by PSNR. {tokenizer}{trained}, {rate:.3f} bits per "
        f"pixel, {config.image_size} px by {filter}; dB is PSNR, the other number {measure}."
    )
    return png_bytes(draw_sheet(title, [_tile(item, measure) for item in items]))


def _tile(item: ShownItem, measure: str) -> Tile:
    middle = len(item.original_THWC) // 2
    captions = [f"{item.word}: {item.key}" + (f" clip {item.clip}" if item.clip else "")]
    for name, frames_THWC in item.versions.items():
        pair = torch.from_numpy(np.stack([item.original_THWC, frames_THWC]))
        scores = picture_scores(pair[0], pair[1])
        captions.append(f"{name} {float(scores['psnr'].mean()):.1f} dB, {float(scores[measure].mean()):.3f}")
    pictures = [np.ascontiguousarray(item.original_THWC[middle])]
    return Tile([*pictures, *(frames_THWC[middle] for frames_THWC in item.versions.values())], captions)


def describe_report(report: EvaluationReport) -> str:
    """The results in a few lines and a table for each kind."""
    config = report.tokenizer.config
    trained = "" if config.get("trained") else ", random weights (it was never trained)"
    lines = [f"{report.tokenizer.name}: weights {report.tokenizer.weight_sha256[:8]}{trained}"]
    for result in report.results:
        lines += ["", *_describe_kind(result, report)]
    if report.left_out:
        lines += ["", f"{report.left_out:,} samples or shards could not be read and are not in these numbers."]
    return "\n".join(lines)


def _describe_kind(result: KindRecord, report: EvaluationReport) -> Iterator[str]:
    size = report.tokenizer.config["image_size"]
    frames = f" of {result.frames / result.items:.3g} frames" if result.kind == "clips" else ""
    yield (
        f"{result.items:,} {result.kind}{frames}, {size} px by {report.filter} ({report.engine}), {report.crop} crop; "
        "mean ± standard deviation"
    )
    measures = list(result.methods[0].measures)
    frechet = list(result.methods[0].frechet)
    rows = [["", "payload", "file", "bits/pixel", *measures, *frechet]]
    rows += [_cells(method, measures, frechet) for method in result.methods if method.equal != "file"]
    whole = [method for method in result.methods if method.equal == "file"]
    if whole:
        rows.append(["at equal file size:"])
        rows += [_cells(method, measures, frechet) for method in whole]
    yield from _table(rows)
    codes = result.codes
    used = "; ".join(
        f"{group.used:,} of {group.codes:,} codes, {group.entropy_bits:.2f} bits" for group in codes.groups
    )
    yield f"{codes.tokens:,} tokens: least channel entropy {codes.least_channel_entropy_bits:.3f} bit; groups: {used}"


def _cells(method: MethodRecord, measures: Sequence[str], frechet: Sequence[str]) -> list[str]:
    rate = method.file_bits_per_pixel if method.equal == "file" else method.payload_bits_per_pixel
    cells = [
        method.method,
        f"{method.payload_bytes_per_frame:,.0f}",
        f"{method.file_bytes_per_frame:,.0f}",
        f"{rate:.3f}",
    ]
    for name in measures:
        spread = method.measures[name]
        digits = 2 if name == "psnr" or name.endswith("_db") else 3
        cells.append(f"{spread.mean:.{digits}f} ± {spread.std:.{digits}f}")
    return cells + [f"{method.frechet[name]:.2f}" for name in frechet]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [
        max(len(row[column]) for row in rows if column < len(row) and len(row) > 1)
        for column in range(max(map(len, rows)))
    ]
    for row in rows:
        if len(row) == 1:
            yield f"  {row[0]}"
            continue
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(["  " + first, *others]).rstrip()
