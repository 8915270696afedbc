"""Measures how well a tokenizer reconstructs the pictures and clips of shards, beside codecs at equal bytes.

    read and decode -> tokens -> pixels again -> measures         what does `bsq evaluate`
                    \\-> each codec at the tokens' bytes -> measures

Frames are passed through once and not kept; the few that the pictures show are read again at the end."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from torch import Tensor

from jobs.begin import created_by
from jobs.evaluation_sheet import ShownItem, draw_items
from jobs.share_bar import ShareBar
from pipeline.codec_rates import Codec, Coded, CountedBytes, clip_codecs, code_nearest, picture_codecs
from pipeline.credentials import printable_url
from pipeline.decoded_clips import ClipReader, DecodedClip
from pipeline.encode import choose_device
from pipeline.sources import expand_shards
from pipeline.storage import open_storage
from pipeline.training_batches import Complaints, usable_cpus
from schemas.errors import CheckpointError, SpecError
from schemas.evaluation import (
    CodesRecord,
    EvaluationReport,
    GroupRecord,
    ItemRecord,
    KindRecord,
    MethodRecord,
    SpreadRecord,
    TokenizerSummary,
)
from schemas.jobspec import ClipSpec, Filter, PreprocessSpec
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import build_model, read_checkpoint
from tokenizer.code_usage import CodeCounts
from tokenizer.codes import packed_size
from tokenizer.config import BSQViTConfig
from tokenizer.frechet import FeatureStatistics
from tokenizer.losses import to_uint8
from tokenizer.metrics import FeatureNetworks, QualityMeter

FRAMES_OF_IMAGE_TOKENIZER = 16
"""Frames of a video that a tokenizer for images is given, one by one."""
WAYS: tuple[CountedBytes, ...] = ("payload", "file")
REPORT_FILE = "evaluation.json"

KindName = Literal["images", "clips"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured, and how."""

    filter: Filter = "lanczos"
    """How originals are resized to the tokenizer's size."""
    crop: Literal["center", "exact"] = "center"
    fps: float | Literal["source"] = "source"
    """Frames per second picked from a video."""
    clips_per_video: int = 1
    limit: int | None = None
    """The most pictures, and the most videos, that are read; None: all."""
    codecs: bool = True
    """Measure codecs at equal bytes too."""
    batch: int = 32
    """Frames that the tokenizer is given together."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    """That decode and code; 0: one for each usable CPU."""
    networks: Mapping[str, str] = field(default_factory=dict)
    """Where weights lie: `lpips` a folder, `inception` and `i3d` a file each."""


def evaluate(
    tokenizer: str,
    shards: Sequence[str],
    out: str | os.PathLike[str],
    options: EvaluationOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> EvaluationReport:
    """Measure a tokenizer and write OUT/evaluation.json, images.png and clips.png.

    Raises CheckpointError for a tokenizer or weights that cannot be used, and SpecError where nothing could be read."""
    options = options or EvaluationOptions()
    files = read_checkpoint(tokenizer, storage_options=storage_options)
    config = files.config()
    device = _device(options.device)
    dtype = _compute_dtype(options.dtype, device)
    networks = FeatureNetworks(**options.networks, device=device)
    reader = clip_reader(shards, config, options, storage_options)
    model = build_model(files, device=device, compute_dtype=dtype)
    with ShareBar(stream) as bar:
        complaints = Complaints(bar.tell)
        kinds = measure(reader, model, networks, options, complaints, bar)
        if not kinds:
            raise SpecError(
                f"{printable_url(reader.urls[0])}: no picture or video of {len(reader.urls):,} shards could be "
                "measured. Look at the lines above."
            )
        pictures = {kind.name: _draw(kind, reader, model, tokenizer, Path(out), options) for kind in kinds}
    report = EvaluationReport(
        created_by=created_by(),
        tokenizer=TokenizerSummary(name=tokenizer, weight_sha256=files.weight_sha256(), config=config.to_json_dict()),
        shards=[printable_url(url) for url in reader.urls],
        crop=options.crop,
        filter=options.filter,
        engine=reader.preprocess.engine,
        fps=reader.clips.fps,
        clip_frames=int(reader.clips.clip_frames),
        clips_per_video=reader.clips_per_video,
        limit=options.limit,
        arithmetic={"device": device.type, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
                    "machine": platform.machine()},
        networks=dict(options.networks),
        left_out=complaints.num_failed,
        results=[kind.record(pictures[kind.name]) for kind in kinds],
    )  # fmt: skip
    open_storage(str(Path(out).absolute())).publish(REPORT_FILE, report.model_dump_json(indent=2).encode() + b"\n")
    return report


def clip_reader(
    shards: Sequence[str],
    config: BSQViTConfig,
    options: EvaluationOptions,
    storage_options: Mapping[str, Any] | None = None,
) -> ClipReader:
    """What reads the originals at a tokenizer's size.  Raises SpecError for shards that are not there."""
    return ClipReader(
        urls=expand_shards(list(shards), storage_options),
        preprocess=PreprocessSpec(size=config.image_size, crop=options.crop, filter=options.filter),
        clips=ClipSpec(
            fps=options.fps, clip_frames=config.max_frames if config.max_frames > 1 else FRAMES_OF_IMAGE_TOKENIZER
        ),
        clips_per_video=options.clips_per_video,
        most=options.limit,
        num_threads=options.threads or usable_cpus(),
        storage_options=storage_options,
    )


def measure(
    reader: ClipReader,
    model: BSQViT,
    networks: FeatureNetworks,
    options: EvaluationOptions,
    complaints: Complaints,
    bar: ShareBar,
) -> list[KindMeter]:
    """Pass everything through the tokenizer and the codecs once; a meter for each kind that there is."""
    meters = {
        "image": KindMeter("images", model, networks, picture_codecs() if options.codecs else (), options),
        "video": KindMeter("clips", model, networks, clip_codecs() if options.codecs else (), options),
    }
    with ThreadPoolExecutor(reader.num_threads, thread_name_prefix="codec") as pool:
        try:
            for clip in reader.read(complaints):
                meters[clip.kind].take(clip, pool)
                bar.show(clip.share_read, _words(meters))
            for meter in meters.values():
                meter.flush()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [meter for meter in meters.values() if meter.items]


def reconstruct(model: BSQViT, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [B, T, H, W, 3] after the tokenizer, and the bits [B, T, h, w, L]; both on the CPU.

    A tokenizer for images takes the frames of a clip one by one.  Raises CheckpointError where it makes no numbers."""
    num_clips, num_frames = frames_BTHWC.shape[:2]
    alone = num_frames > model.config.max_frames
    given = frames_BTHWC.flatten(0, 1).unsqueeze(1) if alone else frames_BTHWC
    bits = model.encode(given.to(next(model.parameters()).device))
    pixels = model.decode(bits)
    if not bool(pixels.isfinite().all()):
        raise CheckpointError("The tokenizer's reconstructions hold NaN or infinity; its weights cannot be used.")
    shape = (num_clips, num_frames)
    return to_uint8(pixels).cpu().reshape(*shape, *pixels.shape[2:]), bits.cpu().reshape(*shape, *bits.shape[2:])


class KindMeter:
    """The measures of pictures, or of clips."""

    def __init__(
        self,
        name: KindName,
        model: BSQViT,
        networks: FeatureNetworks,
        codecs: Sequence[Codec],
        options: EvaluationOptions,
    ) -> None:
        self.name = name
        self.items: list[DecodedClip] = []
        """Without their frames."""
        self.tokens = QualityMeter(networks)
        self.frames = 0
        self._model, self._networks, self._options = model, networks, options
        self._codecs = [(codec, [CodecMeter(codec, way, networks) for way in WAYS]) for codec in codecs]
        self._codes = CodeCounts(model.config.bits_per_token, model.config.group_size)
        self._originals: dict[str, FeatureStatistics] = {}
        self._token_bytes = 0
        self._waiting: list[tuple[DecodedClip, list[Future[list[Coded]]]]] = []

    def take(self, clip: DecodedClip, pool: ThreadPoolExecutor) -> None:
        """Measure a clip, now or with others."""
        frames_THWC = clip.frames_TCHW.permute(0, 2, 3, 1)
        if self._waiting and len(self._waiting[0][0].frames_TCHW) != len(frames_THWC):
            self.flush()
        coded = [
            pool.submit(code_nearest, codec, frames_THWC.contiguous().numpy(), self._clip_bytes(len(frames_THWC)), WAYS)
            for codec, _ in self._codecs
        ]
        self._waiting.append((clip, coded))
        if len(self._waiting) * len(frames_THWC) >= self._options.batch:
            self.flush()

    def flush(self) -> None:
        """Measure what waits."""
        if not self._waiting:
            return
        clips = [clip for clip, _ in self._waiting]
        originals_BTHWC = torch.stack([clip.frames_TCHW for clip in clips]).permute(0, 1, 3, 4, 2)
        made_BTHWC, bits = reconstruct(self._model, originals_BTHWC)
        self.tokens.add(originals_BTHWC, made_BTHWC)
        self._codes.add(bits)
        self._token_bytes += len(clips) * self._clip_bytes(originals_BTHWC.shape[1])
        for name, features in self._networks.features(originals_BTHWC).items():
            self._originals.setdefault(name, FeatureStatistics()).add(features)
        for number, (_, meters) in enumerate(self._codecs):
            coded = [futures[number].result() for _, futures in self._waiting]
            for way, meter in enumerate(meters):
                meter.add(originals_BTHWC, [each[way] for each in coded])
        self.frames += len(clips) * originals_BTHWC.shape[1]
        empty = torch.empty(0)
        self.items += [dataclasses.replace(clip, frames_TCHW=empty.expand(len(clip.frames_TCHW), 0)) for clip in clips]
        self._waiting.clear()

    def record(self, picture: str | None) -> KindRecord:
        """The results."""
        rate = 8 / self._model.config.image_size**2
        tokens = MethodRecord(
            method="tokens",
            description=f"BSQ, {self._model.config.bits_per_token} bits for each patch",
            filter=self._options.filter,
            payload_bytes_per_frame=self._token_bytes / self.frames,
            file_bytes_per_frame=self._token_bytes / self.frames,
            payload_bits_per_pixel=self._token_bytes / self.frames * rate,
            file_bits_per_pixel=self._token_bytes / self.frames * rate,
            **_measured(self.tokens, self._originals),
        )
        channel_bits = self._codes.channel_bits()
        return KindRecord(
            kind=self.name,
            items=len(self.items),
            frames=self.frames,
            methods=[tokens, *self._codec_records(rate)],
            codes=CodesRecord(
                tokens=self._codes.num_tokens,
                channel_entropy_bits=channel_bits,
                least_channel_entropy_bits=min(channel_bits),
                groups=[GroupRecord(**dataclasses.asdict(group)) for group in self._codes.groups()],
            ),
            picture=picture,
            per_item=[
                ItemRecord(
                    shard=item.shard,
                    key=item.key,
                    clip=item.clip,
                    frames=len(item.frames_TCHW),
                    measures={name: values[number] for name, values in self.tokens.values.items()},
                )
                for number, item in enumerate(self.items)
            ],
        )

    def _codec_records(self, rate: float) -> Iterator[MethodRecord]:
        for _, meters in self._codecs:
            for meter in meters:
                yield MethodRecord(
                    method=meter.codec.name,
                    description=meter.codec.description,
                    equal=meter.counted,
                    filter=self._options.filter,
                    payload_bytes_per_frame=meter.payload_bytes / self.frames,
                    file_bytes_per_frame=meter.file_bytes / self.frames,
                    payload_bits_per_pixel=meter.payload_bytes / self.frames * rate,
                    file_bits_per_pixel=meter.file_bytes / self.frames * rate,
                    **_measured(meter.quality, self._originals),
                )

    def _clip_bytes(self, num_frames: int) -> int:
        config = self._model.config
        return packed_size(num_frames * config.tokens_per_frame, config.bits_per_token)

    def shown(self) -> list[tuple[str, int]]:
        """Items for the picture: the best, those around the median and the worst by PSNR, as (word, number)."""
        ranked = sorted(range(len(self.items)), key=lambda number: -self.tokens.values["psnr"][number])
        count = min(4, math.ceil(len(ranked) / 3))
        middle = (len(ranked) - count) // 2
        parts = {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[-count:]}
        taken: set[int] = set()
        chosen = []
        for word, numbers in parts.items():
            chosen += [(word, number) for number in numbers if number not in taken]
            taken.update(numbers)
        return chosen


class CodecMeter:
    """The measures of one codec at equal payload, or at equal file size."""

    def __init__(self, codec: Codec, counted: CountedBytes, networks: FeatureNetworks) -> None:
        self.codec, self.counted = codec, counted
        self.quality = QualityMeter(networks)
        self.payload_bytes = self.file_bytes = 0

    def add(self, originals_BTHWC: Tensor, coded: Sequence[Coded]) -> None:
        """Measure a batch."""
        self.quality.add(originals_BTHWC, torch.from_numpy(np.stack([each.frames_THWC for each in coded])))
        self.payload_bytes += sum(each.payload_bytes for each in coded)
        self.file_bytes += sum(each.file_bytes for each in coded)


def _measured(meter: QualityMeter, originals: Mapping[str, FeatureStatistics]) -> dict[str, Any]:
    spreads = {name: SpreadRecord(**dataclasses.asdict(spread)) for name, spread in meter.spreads().items()}
    return {"measures": spreads, "frechet": meter.frechet_distances(originals)}


def _words(meters: Mapping[str, KindMeter]) -> str:
    parts = []
    for meter in meters.values():
        if meter.items:
            psnr = float(np.mean(meter.tokens.values["psnr"]))
            parts.append(f"{len(meter.items):,} {meter.name}, PSNR {psnr:.2f} dB")
    return "; ".join(parts) or "reading"


def _draw(
    kind: KindMeter, reader: ClipReader, model: BSQViT, tokenizer: str, out: Path, options: EvaluationOptions
) -> str:
    """Draw the best, median and worst items of a kind; returns the file's name."""
    chosen = kind.shown()
    wanted: dict[int, set[int]] = {}
    for _, number in chosen:
        wanted.setdefault(kind.items[number].shard, set()).add(kind.items[number].position)
    quiet = Complaints(lambda line: None)
    found = {
        (clip.shard, clip.position, clip.clip): clip
        for clip in dataclasses.replace(reader, most=None).read(quiet, only=wanted)
    }
    codecs = (picture_codecs() if kind.name == "images" else clip_codecs())[:1] if options.codecs else []
    items = []
    for word, number in chosen:
        item = kind.items[number]
        clip = found[item.shard, item.position, item.clip]
        original_1THWC = clip.frames_TCHW.permute(0, 2, 3, 1).unsqueeze(0)
        made_1THWC, bits = reconstruct(model, original_1THWC)
        num_bytes = packed_size(bits.numel() // bits.shape[-1], bits.shape[-1])
        versions = {"tokens": made_1THWC[0].numpy()}
        for codec in codecs:
            (coded,) = code_nearest(codec, original_1THWC[0].contiguous().numpy(), num_bytes, ["payload"])
            versions[codec.name] = coded.frames_THWC
        items.append(ShownItem(word, item.key, item.clip, original_1THWC[0].numpy(), versions))
    name = f"{kind.name}.png"
    picture = draw_items(items, tokenizer, model.config, options.filter)
    open_storage(str(out.absolute())).publish(name, picture)
    return name


def _device(asked: str) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_device(asked)


def _compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if asked == "bfloat16" and not has_bf16:
        raise SpecError("This GPU has no bfloat16. Give --dtype float32.")
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32
