"""Decodes tokens back into pictures and clips, alone or beside their originals."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.contact_sheet import Tile, draw_sheet, png_bytes
from jobs.existing_job import existing_job
from pipeline.find_rows import FoundRow, find_rows, like_keys, list_token_files, read_row, why_missing
from pipeline.storage import Storage, open_storage
from schemas.errors import SampleError, ShardError, SourceChanged, SpecError
from schemas.job import Job

if TYPE_CHECKING:
    from tokenizer import BSQViT

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3]"""

DEFAULT_FRAMES_PER_SECOND = 8.0
STUB = "stub"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".gif", ".png")


def reconstruct(
    out: str,
    key: str,
    *,
    target: str | Path | None = None,
    clip: int = 0,
    view: int = 0,
    shard: int | None = None,
    generation: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Decode one view of one clip of a sample and return the file written: a picture, or for a clip a video.

    The suffix of `target` chooses: .png, .jpg or .webp for pictures; .mp4, .gif or .png (all frames on one sheet) for
    clips.  Without it the file is named after the key, in the working folder.  Raises SpecError for a key that is not
    there (naming ones like it) or that several shards have (naming them), and for a tokenizer that cannot decode."""
    storage = open_storage(out, storage_options)
    job = _read_decodable_job(storage)
    row = _choose_row(storage, key, clip, view, shard, generation)
    is_clip = row.values["frames"] > 1
    path = Path(target) if target is not None else _default_path(row, ".mp4" if is_clip else ".png")
    suffixes = CLIP_SUFFIXES if is_clip else IMAGE_SUFFIXES
    if path.suffix.lower() not in suffixes:
        what = f"a clip of {row.values['frames']} frames" if is_clip else "a picture"
        raise SpecError(f"{path}: {key!r} is {what}; name a file that ends in {', '.join(suffixes)}.")
    frames_THWC = TokenDecoder(storage, job, storage_options).frames(row)
    data = _encode_clip(frames_THWC, row, path, job) if is_clip else _encode_image(frames_THWC[0], path)
    open_storage(str(path.absolute().parent)).publish(path.name, data)
    return path


def side_by_side(
    out: str,
    target: str | Path,
    keys: Sequence[str] | None = None,
    count: int = 8,
    *,
    generation: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Draw originals above what their tokens decode to, with PSNR, as one PNG; of a clip its middle frame.

    `keys` names the samples (their first clip and view); without it `count` rows are taken, spread evenly over the
    dataset.  Originals are read again from the shards and preprocessed as the job did.  Raises SpecError for unknown
    keys, InputError when a shard cannot be read any more, and SpecError when its samples are others by now."""
    storage = open_storage(out, storage_options)
    job = _read_decodable_job(storage)
    if keys is not None:
        rows = [_choose_row(storage, key, 0, 0, None, generation) for key in keys]
    else:
        rows = _spread_rows(storage, count, generation)
    if not rows:
        raise SpecError(f"{storage.url}: the dataset has no rows, so there is nothing to draw.")
    originals = _read_originals(rows, job, storage_options)
    decoding = TokenDecoder(storage, job, storage_options)
    tiles = [_tile(row, originals[index], decoding.frames(row)) for index, row in enumerate(rows)]
    path = Path(target)
    open_storage(str(path.absolute().parent)).publish(path.name, png_bytes(draw_sheet(_title(job), tiles)))
    return path


def _tile(row: FoundRow, original_THWC: Frames, decoded_THWC: Frames) -> Tile:
    middle = len(decoded_THWC) // 2
    frame = f", frame {middle + 1} of {len(decoded_THWC)}" if len(decoded_THWC) > 1 else ""
    clip = f" clip {row.values['clip']}" if row.values["clip"] else ""
    view = f" view {row.values['view']}" if row.values["view"] else ""
    return Tile(
        [original_THWC[middle], decoded_THWC[middle]],
        [f"{row.values['key']}{clip}{view}", f"{describe_psnr(original_THWC, decoded_THWC)}{frame}"],
    )


def psnr(original: Frames, decoded: Frames) -> float:
    """Peak signal-to-noise ratio over all pixels of both, in dB; infinite for equal ones."""
    error = float(np.mean((original.astype(np.float64) - decoded.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def describe_psnr(original: Frames, decoded: Frames) -> str:
    """`psnr` for a caption."""
    decibels = psnr(original, decoded)
    return "identical" if decibels == math.inf else f"{decibels:.1f} dB"


def _title(job: Job) -> str:
    tokenizer = job.tokenizer
    rate = tokenizer.bits / tokenizer.patch_size**2
    name = tokenizer.config.get("preset", tokenizer.name)
    untrained = "" if tokenizer.config.get("trained") else ", RANDOM WEIGHTS (never trained)"
    return f"Above the original, below what its tokens decode to. {name}{untrained}, {rate:.2f} bits per pixel."


# --- which rows


def _read_decodable_job(storage: Storage) -> Job:
    job = existing_job(storage)
    if job.tokenizer.config.get("preset") == STUB:
        raise SpecError(f"{storage.url}: made with the stub of tests and benchmarks, whose tokens cannot be decoded.")
    return job


def _choose_row(
    storage: Storage, key: str, clip: int, view: int, shard: int | None, generation: int | None
) -> FoundRow:
    rows = find_rows(storage, key, shard=shard, generation=generation)
    if not rows:
        raise SpecError(_unknown_key(storage, key, shard, generation))
    shards = sorted({row.source.shard for row in rows})
    if len(shards) > 1:
        named = ", ".join(map(str, shards[:10]))
        raise SpecError(f"{storage.url}: {key!r} is in {len(shards)} shards: {named}. Name one with --shard.")
    for row in rows:
        if (row.values["clip"], row.values["view"]) == (clip, view):
            return row
    clips = sorted({row.values["clip"] for row in rows})
    views = sorted({row.values["view"] for row in rows})
    raise SpecError(
        f"{storage.url}: {key!r} has no clip {clip} with view {view}; its clips are {_span(clips)}, "
        f"its views {_span(views)}."
    )


def _unknown_key(storage: Storage, key: str, shard: int | None, generation: int | None) -> str:
    where = f"{storage.url}: no row has the key {key!r}" + (f" in shard {shard}" if shard is not None else "")
    if shard is not None and (elsewhere := find_rows(storage, key, generation=generation)):
        return f"{where}; it is in shard {elsewhere[0].source.shard}."
    if reason := why_missing(storage, key, generation=generation):
        return f"{where}; its sample failed ({reason})"
    names = like_keys(storage, key, generation=generation)
    return f"{where}. Keys like it: {', '.join(map(repr, names))}." if names else f"{where}, and none is like it."


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _spread_rows(storage: Storage, count: int, generation: int | None) -> list[FoundRow]:
    files = [source for source in list_token_files(storage, generation) if source.rows]
    total = sum(source.rows for source in files)
    count = min(count, total)
    wanted = [(2 * number + 1) * total // (2 * count) for number in range(count)]
    rows, first = [], 0
    for source in files:
        while wanted and wanted[0] < first + source.rows:
            rows.append(read_row(storage, source, wanted.pop(0) - first))
        first += source.rows
    return rows


# --- pixels


class TokenDecoder:
    """The dataset's own tokenizer, loaded when first needed."""

    def __init__(self, storage: Storage, job: Job, storage_options: Mapping[str, Any] | None) -> None:
        self._folder = storage.url_of(job.tokenizer.folder)
        self._job = job
        self._storage_options = storage_options
        self._load = lru_cache(maxsize=1)(self._load_model)

    def frames(self, row: FoundRow, most: int | None = None) -> Frames:
        """What the tokens of `row`, or of its first `most` frames, decode to, rounded to uint8.

        No frame depends on a later one, so that those that are left out change nothing."""
        import torch

        from tokenizer.codes import packed_size, unpack_bits
        from tokenizer.losses import to_uint8

        tokenizer = self._job.tokenizer
        grid_rows, grid_columns = tokenizer.grid
        num_frames = min(row.values["frames"], most or row.values["frames"])
        num_tokens = num_frames * grid_rows * grid_columns
        packed_O = np.frombuffer(row.values["tokens"], np.uint8)[: packed_size(num_tokens, tokenizer.bits)]
        bits_1NL = unpack_bits(packed_O[np.newaxis], num_tokens, tokenizer.bits)
        bits = torch.from_numpy(bits_1NL).reshape(1, num_frames, grid_rows, grid_columns, tokenizer.bits)
        pixels_THWC = self._load().decode(bits)[0]
        frames: Frames = to_uint8(pixels_THWC).numpy()
        return frames

    def _load_model(self) -> BSQViT:
        from tokenizer import from_pretrained

        return from_pretrained(self._folder, storage_options=self._storage_options)


def _read_originals(rows: Sequence[FoundRow], job: Job, storage_options: Mapping[str, Any] | None) -> dict[int, Frames]:
    """The frames that went into the encoder, by number in `rows`.  Raises for the first that cannot be read again."""
    from jobs.originals import read_originals

    originals: dict[int, Frames] = {}
    for index, frames in read_originals(rows, job, storage_options):
        if isinstance(frames, np.ndarray):
            originals[index] = frames
        elif isinstance(frames, ShardError) and not isinstance(frames, SourceChanged):
            raise frames
        elif isinstance(frames, SampleError):
            row = rows[index]
            raise SpecError(f"{row.source.url}: {row.values['key']!r} cannot be decoded any more ({frames}).")
        else:
            raise SpecError(str(frames)) from frames
    return originals


# --- files


def _default_path(row: FoundRow, suffix: str) -> Path:
    # A key is a path inside a tar and may hold anything; the file shall lie here.
    name = re.sub(r"[^\w.-]+", "_", row.values["key"]).strip("._") or "sample"
    name += "".join(f"-{part}{row.values[part]}" for part in ("clip", "view") if row.values[part])
    return Path(name[:120] + suffix)


def _encode_image(frame_HWC: Frames, path: Path) -> bytes:
    sink = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    if path.suffix.lower() == ".webp":
        options = {"lossless": True}
    Image.fromarray(frame_HWC).save(sink, Image.registered_extensions()[path.suffix.lower()], **options)
    return sink.getvalue()


def _encode_clip(frames_THWC: Frames, row: FoundRow, path: Path, job: Job) -> bytes:
    rate = _frames_per_second(row, job)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        from pipeline.write_video import encode_mp4

        return encode_mp4(frames_THWC, rate)
    if suffix == ".gif":
        first, *others = [Image.fromarray(frame_HWC) for frame_HWC in frames_THWC]
        sink = io.BytesIO()
        first.save(sink, "GIF", save_all=True, append_images=others, duration=round(1000 / rate), loop=0)
        return sink.getvalue()
    times = row.values["frame_times"] or [number / rate for number in range(len(frames_THWC))]
    start = row.values["start"] or 0.0
    tiles = [
        Tile([frame_HWC], [f"{start + seconds:.2f} s"]) for frame_HWC, seconds in zip(frames_THWC, times, strict=True)
    ]
    return png_bytes(draw_sheet(f"{row.values['key']}, clip {row.values['clip']}", tiles))


def _frames_per_second(row: FoundRow, job: Job) -> float:
    steps = np.diff(row.values["frame_times"] or [])
    if len(steps) and np.median(steps) > 0:
        return float(np.clip(1 / np.median(steps), 0.5, 240.0))
    return job.spec.clips.fps if isinstance(job.spec.clips.fps, float) else DEFAULT_FRAMES_PER_SECOND
