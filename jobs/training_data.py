"""The frames that a training file names: as batches, held in memory, or written for a machine without codecs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.display import describe_bytes, describe_seconds
from pipeline.frame_files import write_jpeg_frames
from pipeline.sources import expand_shards
from pipeline.training_batches import (
    Complaints,
    Kind,
    ShardSource,
    StreamedFrames,
    held_source,
    hold_frames,
    usable_cpus,
)
from schemas.errors import SpecError
from schemas.jobspec import ClipSpec, PreprocessSpec
from schemas.trainspec import TrainSpec
from tokenizer.frame_batches import Batches
from tokenizer.ranks import num_ranks, rank
from tokenizer.train_config import TrainConfig
from tokenizer.train_step import training_sizes
from tokenizer.trainer import held_batches


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run learns from and is measured on."""

    spec: TrainSpec
    config: TrainConfig
    tell: Callable[[str], None]
    """Hears of what is left out, and of progress."""
    storage_options: Mapping[str, Any] | None = None

    def open(self, device: torch.device) -> tuple[Batches, list[Tensor]]:
        """The batches of this process, and frames to validate on."""
        complaints = Complaints(self.tell)
        batches: Batches
        if self.spec.data.hold:
            batches = held_batches(self.config, self.held(complaints), device)
        else:
            batches = StreamedFrames(
                self.sources(),
                sampling=self.config.sampling,
                optimizer=self.config.optimizer,
                seed=self.config.run.seed,
                shuffle_samples=self.spec.data.shuffle_samples,
                complaints=complaints,
                rank=rank(),
                num_ranks=num_ranks(),
                pin=device.type == "cuda",
            )
        return batches, self.validation(complaints)

    def held(self, complaints: Complaints) -> list[Tensor]:
        """All frames to learn from, decoded: of pictures, then of clips."""
        held = []
        for source in self.sources():
            begun = time.monotonic()
            views = self.spec.data.hold_views if source.kind == "image" else 1
            larger = held_source(source, scale=self.spec.data.hold_scale)
            frames = hold_frames(
                replace(larger, preprocess=larger.preprocess.model_copy(update={"views": views})), complaints
            )
            held.append(frames)
            self.tell(
                f"Decoded {len(frames):,} {'views' if source.kind == 'image' else 'clips'} "
                f"({describe_bytes(frames.numel())}) in {describe_seconds(time.monotonic() - begun)}."
            )
        return held

    def validation(self, complaints: Complaints) -> list[Tensor]:
        """Frames to measure on: pictures, then clips, as far as the spec names them."""
        data = self.spec.data
        wanted: tuple[tuple[tuple[str, ...], Kind], ...] = (
            (data.validation_images, "image"),
            (data.validation_clips, "video"),
        )
        return [
            hold_frames(self._validation_source(shards, kind), complaints, most=data.validation_items)
            for shards, kind in wanted
            if shards
        ]

    def sources(self) -> list[ShardSource]:
        """Shards to learn from, pictures before clips."""
        data = self.spec.data
        wanted: tuple[tuple[tuple[str, ...], Kind], ...] = ((data.images, "image"), (data.clips, "video"))
        return [self._source(shards, kind) for shards, kind in wanted if shards]

    def _source(self, shards: tuple[str, ...], kind: Kind) -> ShardSource:
        """One random crop of each picture or clip."""
        data, (size, num_frames) = self.spec.data, training_sizes(self.config)
        return ShardSource(
            urls=expand_shards(shards, self.storage_options),
            kind=kind,
            preprocess=PreprocessSpec(
                size=size,
                crop="random",
                filter=data.filter,
                random_scale=data.random_scale,
                flip=data.flip,
                seed=self.config.run.seed,
                engine=_engine(data.filter),
            ),
            clips=ClipSpec(fps=data.fps, clip_frames=num_frames, stride=data.clip_stride, short_clips="drop"),
            limits=data.limits,
            clips_per_video=data.clips_per_video,
            num_threads=data.decode_threads or usable_cpus(),
            storage_options=self.storage_options,
        )

    def _validation_source(self, shards: tuple[str, ...], kind: Kind) -> ShardSource:
        """The middle square by Lanczos, and of a video its first clip."""
        preprocess = PreprocessSpec(size=training_sizes(self.config)[0], engine=_engine("lanczos"))
        return replace(self._source(shards, kind), preprocess=preprocess, clips_per_video=1)


def save_frames(data: TrainingData, folder: Path, *, most_bytes: int | None = None) -> None:
    """Decode what a training file holds into FOLDER, for `python -m tokenizer.trainer` on a machine without codecs.

    FOLDER/images.npy and clips.npy, the same under FOLDER/validation, and FOLDER/config.json.  With `most_bytes` the
    frames to learn from are JPEG in images.npz and clips.npz, which Pillow decodes there, at the best quality with
    which all of FOLDER takes at most so many bytes.  Raises SpecError where none is good enough."""
    complaints = Complaints(data.tell)
    held, validation = data.held(complaints), data.validation(complaints)
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    for frames in validation:
        np.save(folder / "validation" / f"{_stem(frames)}.npy", frames.contiguous().numpy())
    for old in ("images.npy", "clips.npy", "images.npz", "clips.npz"):
        (folder / old).unlink(missing_ok=True)
    if most_bytes is None:
        for frames in held:
            np.save(folder / f"{_stem(frames)}.npy", frames.contiguous().numpy())
    else:
        named = {folder / f"{_stem(frames)}.npz": frames.contiguous().numpy() for frames in held}
        quality, num_bytes = write_jpeg_frames(named, most_bytes - sum(frames.numel() for frames in validation))
        data.tell(f"Wrote {describe_bytes(num_bytes)} of JPEG at quality {quality}.")
    text = json.dumps(data.config.to_json_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _stem(frames: Tensor) -> str:
    return "images" if frames.shape[1] == 1 else "clips"


def _engine(filter: str) -> Any:
    # Training needs no bits that are the same everywhere, so an older torch may lend Pillow's resize.
    from pipeline.preprocess import check_engine

    try:
        check_engine(filter, "torch")  # type: ignore[arg-type]
    except SpecError:
        return "pillow"
    return "torch"
