"""Compresses pictures, clips and rows of datasets into .bsq files: what `bsq compress` does.

INPUT... -> tokens of clips (jobs/coded_inputs.py) -> lanes of blocks -> streams -> OUT/*.bsq"""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from jobs.coded_inputs import MediaReader, PackedClip, TokenizedItem, read_rows
from jobs.share_bar import ShareBar
from pipeline.dataset import TokenDataset
from pipeline.dataset_files import JOB_NAME, read_job
from pipeline.encode import choose_device
from pipeline.storage import open_storage
from schemas.bsqfile import FINGERPRINT_BYTES, SUFFIX, BsqFile
from schemas.errors import OutputNotOurs, SpecError, printable
from tokenizer.checkpoint import build_model, read_checkpoint
from tokenizer.config import BSQViTConfig
from tokenizer.prior_checkpoint import build_prior, read_prior
from tokenizer.prior_coder import DEFAULT_LANES, Block, PriorCoder, StreamClips, cut_runs
from tokenizer.prior_config import PriorConfig

PACK_NAME = f"pack{SUFFIX}"
MAX_FILE_NAME_BYTES = 200
"""Of a file's name without its ending; file systems take 255 bytes, also of the name while it is written."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """How to compress."""

    tokenizer: str = "default"
    prior: str = "default"
    pack: bool = False
    """One file for all inputs."""
    fps: float | Literal["source"] = "source"
    limit: int | None = None
    """The most rows of each dataset; None: all."""
    lanes: int | None = None
    """Clips that are coded side by side; None: 32, or as many as there are."""
    device: str = "cpu"


class WrittenFile(NamedTuple):
    """A file, and what is in it."""

    path: Path
    file: BsqFile
    num_bytes: int


def compress(
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    options: CompressOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> list[WrittenFile]:
    """Compress inputs, paths of pictures and clips and folders or URLs of datasets, into OUT.

    Raises SpecError for an input that cannot be read, CheckpointError for models that cannot be used or do not belong
    to each other, OutputNotOurs where a file is there already; then nothing is written."""
    options = options or CompressOptions()
    if not inputs:
        raise SpecError("No inputs are named. Give pictures, clips or datasets: bsq compress photo.png --out DIR")
    prior_files = read_prior(options.prior, storage_options=storage_options)
    prior = build_prior(prior_files, device=choose_device(options.device))
    with ShareBar(stream) as bar:
        tokenized = _Tokenizing(options, prior.config, prior_files.where, storage_options, bar)
        items = list(tokenized.read(inputs))
        if tokenized.sizes is None or not items:
            raise SpecError(f"{inputs[0]}: the dataset has no rows.")
        num_clips = sum(len(each.clips) for each in items)
        coder = PriorCoder(prior, lanes=options.lanes or min(DEFAULT_LANES, num_clips))
        sizes = tokenized.sizes
        base = BsqFile(
            items=(),
            streams=(),
            tokenizer=bytes.fromhex(sizes.sha256)[:FINGERPRINT_BYTES],
            prior=bytes.fromhex(prior_files.weight_sha256())[:FINGERPRINT_BYTES],
            bits=sizes.bits,
            grid=sizes.grid,
            patch=sizes.patch,
            clip_frames=max(clip.frames for each in items for clip in each.clips),
            lanes=coder.lanes,
            arithmetic=0 if prior.place.device.type == "cpu" else 1,
        )
        names = [PACK_NAME] if options.pack else _file_names(items)
        require_free(Path(out), names)
        groups = [items] if options.pack else [[each] for each in items]
        files = encode_files(coder, base, groups, is_pack=options.pack, bar=bar)
    storage = open_storage(str(Path(out).absolute()))
    written = []
    for name, file in zip(names, files, strict=True):
        content = file.to_bytes()
        storage.publish(name, content)
        written.append(WrittenFile(Path(out) / name, file, len(content)))
    return written


class TokenSizes(NamedTuple):
    """What the tokens of a tokenizer are."""

    bits: int
    grid: tuple[int, int]
    patch: int
    sha256: str

    @classmethod
    def of_model(cls, config: BSQViTConfig, sha256: str) -> TokenSizes:
        return cls(config.bits_per_token, config.grid, config.patch_size, sha256)


class _Tokenizing:
    """Reads inputs, all of one tokenizer."""

    def __init__(
        self,
        options: CompressOptions,
        prior: PriorConfig,
        prior_name: str,
        storage_options: Mapping[str, Any] | None,
        bar: ShareBar,
    ) -> None:
        self.sizes: TokenSizes | None = None
        """Known after the first input."""
        self._options, self._prior, self._prior_name = options, prior, prior_name
        self._storage_options, self._bar = storage_options, bar
        self._reader: MediaReader | None = None

    def read(self, inputs: Sequence[str]) -> Iterator[TokenizedItem]:
        """The items of all inputs.  Raises SpecError for one that cannot be read or is of another tokenizer."""
        for number, each in enumerate(inputs):
            if not Path(each).is_file() and open_storage(each, self._storage_options).exists(JOB_NAME):
                yield from self._rows(each)
            else:
                yield self._media_reader().read(Path(each))
            self._bar.show((number + 1) / len(inputs) / 2, f"{number + 1:,} of {len(inputs):,} inputs tokenized")

    def _media_reader(self) -> MediaReader:
        if self._reader is None:
            files = read_checkpoint(self._options.tokenizer, storage_options=self._storage_options)
            config = files.config()
            self._take(TokenSizes.of_model(config, files.weight_sha256()), self._options.tokenizer)
            self._reader = MediaReader(
                model=build_model(files, device=choose_device(self._options.device)),
                clip_frames=min(config.max_frames, self._prior.max_frames),
                fps=self._options.fps,
            )
        return self._reader

    def _rows(self, url: str) -> Iterator[TokenizedItem]:
        columns = ["key", "clip", "view", "frames"]
        dataset = TokenDataset(
            url, columns=columns, view="packed", views="all", storage_options=dict(self._storage_options or {})
        )
        job = read_job(open_storage(url, self._storage_options))
        assert job is not None
        info, patch = dataset.info, job.tokenizer.patch_size
        self._take(TokenSizes(info.bits, info.grid, patch, info.weight_sha256), info.url)
        yield from read_rows(dataset, patch, self._options.limit, self._prior.max_frames)

    def _take(self, sizes: TokenSizes, where: str) -> None:
        require_fitting(self._prior, self._prior_name, sizes, where)
        if self.sizes not in (None, sizes):
            raise SpecError(f"{where}: its tokens are of another tokenizer than those of the inputs before it.")
        self.sizes = sizes


def require_fitting(prior: PriorConfig, prior_name: str, sizes: TokenSizes, where: str) -> None:
    """Raise SpecError unless a prior is for the tokens of a tokenizer."""
    if prior.tokenizer_sha256 not in ("", sizes.sha256):
        raise SpecError(
            f"the prior {prior_name} is for tokens of tokenizer {prior.tokenizer_sha256[:8]}; those of {where} are of "
            f"{sizes.sha256[:8]}. Name the prior that belongs to it with --prior."
        )
    if (prior.bits_per_token, prior.grid) != (sizes.bits, sizes.grid):
        raise SpecError(
            f"the prior {prior_name} is for {prior.bits_per_token} bits on a grid of {prior.grid}; tokens of {where} "
            f"have {sizes.bits} bits on {sizes.grid}."
        )


def encode_files(
    coder: PriorCoder,
    base: BsqFile,
    groups: Sequence[Sequence[TokenizedItem]],
    *,
    is_pack: bool,
    bar: ShareBar | None = None,
) -> list[BsqFile]:
    """One file for each group of items, `base` with what they hold.

    Clips fill lanes one after another, and those of the next file go on there."""
    clips = [[clip for each in group for clip in each.clips] for group in groups]
    first_lanes = [0] * len(groups)
    coded: list[list[bytes]] = [[] for _ in groups]
    blocks: list[list[_PlacedClips]] = []
    cursor = 0
    # Files of one length together: a lane whose clip has ended costs as much as one that goes on.
    for number in sorted(range(len(groups)), key=lambda each: max(clip.frames for clip in clips[each])):
        first_lanes[number], taken = cursor % coder.lanes, 0
        for run in cut_runs([clip.frames for clip in clips[number]], first_lanes[number], coder.lanes):
            if run.first_lane == 0:
                blocks.append([])
            blocks[-1].append(_PlacedClips(number, run, clips[number][taken : taken + len(run.frames)]))
            taken += len(run.frames)
        cursor += taken
    for done, (block, streams) in enumerate(zip(blocks, coder.encode(_unpacked(blocks, base)), strict=True)):
        for placed, content in zip(block, streams, strict=True):
            coded[placed.file].append(content)
        if bar is not None:
            bar.show(0.5 + (done + 1) / len(blocks) / 2, f"{done + 1:,} of {len(blocks):,} blocks coded")
    return [
        replace(
            base,
            items=tuple(each.item for each in group),
            streams=tuple(coded[number]),
            first_lane=first_lanes[number],
            tokens_crc32=tokens_checksum(clips[number]),
            is_pack=is_pack,
        )
        for number, group in enumerate(groups)
    ]


class _PlacedClips(NamedTuple):
    file: int
    run: StreamClips
    clips: list[PackedClip]


def _unpacked(blocks: Sequence[Sequence[_PlacedClips]], base: BsqFile) -> Iterator[tuple[Block, list[list[Any]]]]:
    for block in blocks:
        yield [each.run for each in block], [[clip.bits(base.grid, base.bits) for clip in each.clips] for each in block]


def tokens_checksum(clips: Iterable[PackedClip]) -> int:
    """CRC-32 of the packed tokens of clips, one after another."""
    crc32 = 0
    for clip in clips:
        crc32 = zlib.crc32(clip.packed.tobytes(), crc32)
    return crc32


def _file_names(items: Sequence[TokenizedItem]) -> list[str]:
    """Names of one file for each item.  Raises SpecError where two would be the same."""
    names = [safe_name(each.item.name) + SUFFIX for each in items]
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise SpecError(f"Two inputs would be written to {name}. Use --pack, or compress them one at a time.")
    return names


def safe_name(name: str) -> str:
    """A name for a file: a key may hold anything, and shall lead to no other folder."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")
    return plain.encode()[:MAX_FILE_NAME_BYTES].decode(errors="ignore") or "item"


def require_free(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputNotOurs where a file is there already."""
    for name in names:
        if (folder / name).exists():
            raise OutputNotOurs(f"{printable(str(folder / name))} is there already. Remove it, or name another folder.")


def describe_file(file: BsqFile, num_bytes: int) -> str:
    """What a file takes, in words."""
    return (
        f"{num_bytes:,} bytes, {8 * num_bytes / file.num_pixels:.3f} bits per pixel, "
        f"{8 * file.payload_bytes / file.num_tokens:.2f} of {file.bits} bits per token"
    )
