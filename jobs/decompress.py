"""Turns .bsq files back into tokens, pictures and clips: what `bsq decompress` does."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from jobs.coded_inputs import FRAMES_AT_ONCE, PackedClip, pack_clip
from jobs.compress import TokenSizes, require_fitting, require_free, safe_name, tokens_checksum
from jobs.share_bar import ShareBar
from pipeline.encode import choose_device
from pipeline.storage import open_storage
from pipeline.tiles import join_tiles
from pipeline.write_video import encode_mp4
from schemas.bsqfile import ARITHMETICS, FINGERPRINT_BYTES, MAX_FILE_BYTES, BsqFile, CodedItem, parse_bsq
from schemas.errors import SpecError, StreamError, printable
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import CheckpointFiles, build_model, read_checkpoint
from tokenizer.codes import MAX_INDEX_BITS, bits_to_indices
from tokenizer.losses import to_uint8
from tokenizer.prior_checkpoint import build_prior, prior_config, read_prior
from tokenizer.prior_coder import PriorCoder, StreamClips, cut_runs

DEFAULT_FRAMES_PER_SECOND = 8.0


CLIPS_AT_ONCE = 256
"""Clips of files that are decoded together."""


class NamedBsq(NamedTuple):
    """A parsed file, and what it is called in messages."""

    path: Path
    file: BsqFile


_NamedOutputs = tuple[NamedBsq, list[str]]


def decompress(
    paths: Sequence[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "default",
    prior: str = "default",
    tokens: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> list[Path]:
    """Write the pictures (PNG) and clips (MP4) of .bsq files into OUT, or with `tokens` their indices (.npy).

    Raises StreamError, naming the file, for one that is damaged, was made with other models, or on which this machine
    computes other probabilities.  Of such a file nothing is written."""
    if not paths:
        raise SpecError("No files are named. Give .bsq files: bsq decompress photo.bsq --out DIR")
    named = [read_bsq(Path(path)) for path in paths]
    names = [_output_names(each, tokens=tokens) for each in named]
    flat = [name for several in names for name in several]
    for name, times in Counter(flat).most_common(1):
        if times > 1:
            raise SpecError(f"{times:,} items of these files are named {name}. Decompress them into different folders.")
    require_free(Path(out), flat)
    prior_files = read_prior(prior, storage_options=storage_options)
    model_files = read_checkpoint(tokenizer, storage_options=storage_options)
    for each in named:
        _require_models(each, prior_files, model_files)
    device = _device_of(named)
    loaded = build_prior(prior_files, device=device)
    model = None if tokens else build_model(model_files, device=device)
    storage = open_storage(str(Path(out).absolute()))
    written: list[Path] = []
    with ShareBar(stream) as bar:
        for group in _groups(list(zip(named, names, strict=True))):
            coder = PriorCoder(loaded, lanes=group[0][0].file.lanes)
            decoded = decode_files(coder, [each.file for each, _ in group])
            for (each, item_names), clips in zip(group, decoded, strict=True):
                checked = require_same_tokens(each, clips)
                for item, name, several in zip(each.file.items, item_names, _of_items(each.file, checked), strict=True):
                    content = (
                        _token_bytes(each, item, several)
                        if model is None
                        else _media_bytes(model, each.file, item, several)
                    )
                    storage.publish(name, content)
                    written.append(Path(out) / name)
            bar.show(len(written) / len(flat), f"{len(written):,} of {len(flat):,} items decompressed")
    return written


def read_bsq(path: Path) -> NamedBsq:
    """Read and check a file.  Raises StreamError, in one line, where it cannot be used."""
    shown = printable(str(path))
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise StreamError(f"{shown}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read.")
        content = path.read_bytes()
    except OSError as error:
        raise StreamError(f"{shown}: cannot be read ({error.strerror or type(error).__name__}).") from error
    return NamedBsq(path, parse_bsq(content, shown))


def decode_files(coder: PriorCoder, files: Sequence[BsqFile]) -> list[list[PackedClip] | None]:
    """The clips of files with as many lanes as `coder`; None for a file with a stream that no encoder writes.

    Streams whose lanes leave room for each other are decoded together."""
    blocks: list[list[_PlacedStream]] = []
    for number, file in enumerate(files):
        frames = [clip for item in file.items for clip in file.clips(item)]
        runs = cut_runs(frames, file.first_lane, file.lanes)
        for order, (run, stream) in enumerate(zip(runs, file.streams, strict=True)):
            placed = _PlacedStream(number, order, run, stream)
            for block in blocks:
                if all(_may_go_together(placed.run, other.run) for other in block):
                    block.append(placed)
                    break
            else:
                blocks.append([placed])
    decoded: dict[tuple[int, int], list[PackedClip] | None] = {}
    arguments = [([each.run for each in block], [each.stream for each in block]) for block in blocks]
    for block, clips in zip(blocks, coder.decode(arguments), strict=True):
        for placed, several in zip(block, clips, strict=True):
            decoded[placed.file, placed.number] = None if several is None else [pack_clip(bits) for bits in several]
    return [
        _joined([decoded[number, order] for order in range(len(file.streams))]) for number, file in enumerate(files)
    ]


def _joined(streams: Sequence[list[PackedClip] | None]) -> list[PackedClip] | None:
    clips: list[PackedClip] = []
    for each in streams:
        if each is None:
            return None
        clips += each
    return clips


class _PlacedStream(NamedTuple):
    file: int
    number: int
    run: StreamClips
    stream: bytes


def _may_go_together(one: StreamClips, other: StreamClips) -> bool:
    """Whether two streams use different lanes, and are about as long."""
    apart = one.end_lane <= other.first_lane or other.end_lane <= one.first_lane
    return apart and max(one.frames) == max(other.frames)


def _groups(files: list[_NamedOutputs]) -> Iterator[list[_NamedOutputs]]:
    """Neighbouring files that are decoded together: of one number of lanes, and about `CLIPS_AT_ONCE` clips."""
    group: list[_NamedOutputs] = []
    for each in files:
        if group and (
            each[0].file.lanes != group[0][0].file.lanes
            or sum(named.file.num_clips for named, _ in group) >= CLIPS_AT_ONCE
        ):
            yield group
            group = []
        group.append(each)
    yield group


def _require_models(named: NamedBsq, prior_files: CheckpointFiles, model_files: CheckpointFiles) -> None:
    shown, file = printable(str(named.path)), named.file
    for what, files, wanted in (("prior", prior_files, file.prior), ("tokenizer", model_files, file.tokenizer)):
        found = bytes.fromhex(files.weight_sha256())[:FINGERPRINT_BYTES]
        if found != wanted:
            raise StreamError(
                f"{shown}: made with {what} {wanted.hex()[:8]}, and {files.where} is {found.hex()[:8]}. "
                f"Name the one it was made with: --{what} DIR"
            )
    prior, model = prior_config(prior_files), model_files.config()
    sizes = TokenSizes.of_model(model, model_files.weight_sha256())
    require_fitting(prior, prior_files.where, sizes, shown)
    if (file.bits, file.grid, file.patch) != sizes[:3] or file.clip_frames > min(prior.max_frames, model.max_frames):
        raise StreamError(f"{shown}: its tokens are not of the sizes of its models. The file is damaged or hostile.")


def _device_of(named: Sequence[NamedBsq]) -> torch.device:
    """The kind of device that made the streams.  Raises StreamError where they differ, SpecError without such a one."""
    arithmetic = named[0].file.arithmetic
    for each in named:
        if each.file.arithmetic != arithmetic:
            raise StreamError(
                f"{printable(str(each.path))}: coded on {ARITHMETICS[each.file.arithmetic]}, others before it on "
                f"{ARITHMETICS[arithmetic]}. Decompress them one after the other."
            )
    return choose_device(ARITHMETICS[arithmetic].split()[0])


def require_same_tokens(named: NamedBsq, clips: list[PackedClip] | None) -> list[PackedClip]:
    """The clips of a file, if they are those that were coded.  Raises StreamError."""
    if clips is None or tokens_checksum(clips) != named.file.tokens_crc32:
        raise StreamError(
            f"{printable(str(named.path))}: its tokens come out differently here. It was coded on "
            f"{ARITHMETICS[named.file.arithmetic]} of another machine or torch, whose probabilities differ in the last "
            "digit; decompress it there."
        )
    return clips


def _of_items(file: BsqFile, clips: Sequence[PackedClip]) -> Iterator[Sequence[PackedClip]]:
    start = 0
    for item in file.items:
        count = len(file.clips(item))
        yield clips[start : start + count]
        start += count


def item_bits(file: BsqFile, item: CodedItem, clips: Sequence[PackedClip]) -> Iterator[npt.NDArray[np.bool_]]:
    """Bits of each stretch of time of an item, for all its tiles: bool [N, T, h, w, L]."""
    rows, columns = file.tiles(item)
    for first in range(0, len(clips), rows * columns):
        yield np.stack([clip.bits(file.grid, file.bits) for clip in clips[first : first + rows * columns]])


def item_frames(model: BSQViT, file: BsqFile, item: CodedItem, clips: Sequence[PackedClip]) -> npt.NDArray[np.uint8]:
    """The frames that the tokens of an item decode to, uint8 [T, H, W, 3]."""
    device = next(model.parameters()).device
    parts = []
    for bits_NThwL in item_bits(file, item, clips):
        at_once = max(1, FRAMES_AT_ONCE // bits_NThwL.shape[1])
        tiles = [
            to_uint8(model.decode(each.to(device))).cpu() for each in torch.split(torch.from_numpy(bits_NThwL), at_once)
        ]
        parts.append(join_tiles(torch.cat(tiles).numpy(), item.height, item.width))
    frames: npt.NDArray[np.uint8] = np.concatenate(parts)
    return frames


def _media_bytes(model: BSQViT, file: BsqFile, item: CodedItem, clips: Sequence[PackedClip]) -> bytes:
    frames_THWC = item_frames(model, file, item, clips)
    if item.frames > 1:
        return encode_mp4(frames_THWC, 1e6 / item.step_us if item.step_us else DEFAULT_FRAMES_PER_SECOND)
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frames_THWC[0])).save(sink, "PNG")
    return sink.getvalue()


def _token_bytes(named: NamedBsq, item: CodedItem, clips: Sequence[PackedClip]) -> bytes:
    """Indices of all tokens of an item on one grid, int64 [T, rows, columns], as .npy."""
    if named.file.bits > MAX_INDEX_BITS:
        raise SpecError(f"{printable(str(named.path))}: tokens of {named.file.bits} bits have no indices.")
    rows, columns = (count * side for count, side in zip(named.file.tiles(item), named.file.grid, strict=True))
    parts = [
        join_tiles(bits_to_indices(bits_NThwL)[..., np.newaxis], rows, columns)[..., 0]
        for bits_NThwL in item_bits(named.file, item, clips)
    ]
    sink = io.BytesIO()
    np.save(sink, np.concatenate(parts))
    return sink.getvalue()


def _output_names(named: NamedBsq, *, tokens: bool) -> list[str]:
    names = [safe_name(item.name or named.path.stem) for item in named.file.items]
    return [
        name + (".npy" if tokens else ".png" if item.frames == 1 else ".mp4")
        for name, item in zip(names, named.file.items, strict=True)
    ]
