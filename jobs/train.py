"""Wires a training file to its data and shows how the run goes: what `bsq train` does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np
import torch
from torch import Tensor

from jobs.display import BAR_WIDTH, LINE_EVERY_SECONDS, describe_bytes, describe_seconds
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
from schemas.trainspec import TrainDataSpec, TrainSpec, read_train_spec
from tokenizer.frame_batches import Batches
from tokenizer.train_config import TrainConfig, train_config
from tokenizer.train_log import Observer, TrainReport, describe_report
from tokenizer.train_step import joined_ranks, num_ranks, rank, training_sizes
from tokenizer.trainer import Trainer, held_batches, stopping_on_signals

if TYPE_CHECKING:
    from rich.console import RenderableType


def train(path: Path, *, resume: bool = False, out: str | None = None, stream: TextIO | None = None) -> Path:
    """Run a training file to its end and return the folder of the tokenizer.

    Raises SpecError for a file that cannot be meant, and Interrupted after a signal, with everything saved."""
    spec = read_train_spec(path)
    config = train_config(spec.training(), str(path))
    folder = out or spec.out
    if not folder or "://" in folder:
        raise SpecError(f"{path}: out is {folder!r}; name a local folder for the run, there or with --out.")
    with joined_ranks(config.run.device) as device, TrainDisplay(stream) as display:
        tell = display.tell if rank() == 0 else lambda line: None
        batches, validation = open_data(spec, config, device, Complaints(tell), tell)
        observers: list[Observer] = [display.observe, *tensorboard_observers(Path(folder), tell)]

        def observe(report: TrainReport) -> None:
            for each in observers:
                each(report)

        trainer = Trainer(config, batches, folder, device=device, validation=validation, observer=observe)
        trainer.begin(resume=resume)
        with stopping_on_signals(trainer):
            trainer.run()
    return Path(folder) / "tokenizer"


def save_frames(path: Path, folder: Path, *, stream: TextIO | None = None) -> None:
    """Decode what a training file holds into FOLDER, for `python -m tokenizer.trainer` on a machine without codecs.

    FOLDER/images.npy and clips.npy, the same under FOLDER/validation, and FOLDER/config.json."""
    spec = read_train_spec(path)
    config = train_config(spec.training(), str(path))
    with TrainDisplay(stream) as display:
        complaints = Complaints(display.tell)
        held = hold_sources(spec, config, complaints, display.tell)
        for where, arrays in ((folder, held), (folder / "validation", validation_frames(spec, config, complaints))):
            for frames in arrays:
                where.mkdir(parents=True, exist_ok=True)
                name = "images.npy" if frames.shape[1] == 1 else "clips.npy"
                np.save(where / name, frames.contiguous().numpy())
    (folder / "config.json").write_text(json.dumps(config.to_json_dict(), indent=2) + "\n", encoding="utf-8")


def open_data(
    spec: TrainSpec, config: TrainConfig, device: torch.device, complaints: Complaints, tell: Callable[[str], None]
) -> tuple[Batches, list[Tensor]]:
    """The batches of this process, and frames to validate on."""
    batches: Batches
    if spec.data.hold:
        batches = held_batches(config, hold_sources(spec, config, complaints, tell), device)
    else:
        batches = StreamedFrames(
            shard_sources(spec, config),
            sampling=config.sampling,
            optimizer=config.optimizer,
            seed=config.run.seed,
            shuffle_samples=spec.data.shuffle_samples,
            complaints=complaints,
            rank=rank(),
            num_ranks=num_ranks(),
            pin=device.type == "cuda",
        )
    return batches, validation_frames(spec, config, complaints)


def hold_sources(
    spec: TrainSpec, config: TrainConfig, complaints: Complaints, tell: Callable[[str], None]
) -> list[Tensor]:
    """All frames to learn from, decoded: of pictures, then of clips."""
    held = []
    for source in shard_sources(spec, config):
        begun = time.monotonic()
        views = spec.data.hold_views if source.kind == "image" else 1
        larger = held_source(source, scale=spec.data.hold_scale)
        frames = hold_frames(
            replace(larger, preprocess=larger.preprocess.model_copy(update={"views": views})), complaints
        )
        held.append(frames)
        tell(
            f"Decoded {len(frames):,} {'views' if source.kind == 'image' else 'clips'} "
            f"({describe_bytes(frames.numel())}) in {describe_seconds(time.monotonic() - begun)}."
        )
    return held


def validation_frames(spec: TrainSpec, config: TrainConfig, complaints: Complaints) -> list[Tensor]:
    """Frames to measure on: pictures, then clips, as far as the spec names them."""
    data = spec.data
    wanted: tuple[tuple[tuple[str, ...], Kind], ...] = (
        (data.validation_images, "image"),
        (data.validation_clips, "video"),
    )
    return [
        hold_frames(
            validation_source(data, shards, kind, training_sizes(config)), complaints, most=data.validation_items
        )
        for shards, kind in wanted
        if shards
    ]


def shard_sources(spec: TrainSpec, config: TrainConfig) -> list[ShardSource]:
    """Shards to learn from, pictures before clips."""
    wanted: tuple[tuple[tuple[str, ...], Kind], ...] = ((spec.data.images, "image"), (spec.data.clips, "video"))
    sizes = training_sizes(config)
    return [shard_source(spec.data, shards, kind, sizes, config.run.seed) for shards, kind in wanted if shards]


def shard_source(
    data: TrainDataSpec, shards: tuple[str, ...], kind: Kind, sizes: tuple[int, int], seed: int
) -> ShardSource:
    """Shards to learn from: one random crop of each picture or clip."""
    size, num_frames = sizes
    return ShardSource(
        urls=expand_shards(shards),
        kind=kind,
        preprocess=PreprocessSpec(
            size=size,
            crop="random",
            filter=data.filter,
            random_scale=data.random_scale,
            flip=data.flip,
            seed=seed,
            engine=_engine(data.filter),
        ),
        clips=ClipSpec(fps=data.fps, clip_frames=num_frames, stride=data.clip_stride, short_clips="drop"),
        limits=data.limits,
        clips_per_video=data.clips_per_video,
        num_threads=data.decode_threads or usable_cpus(),
    )


def validation_source(data: TrainDataSpec, shards: tuple[str, ...], kind: Kind, sizes: tuple[int, int]) -> ShardSource:
    """Shards to measure on: the middle square by Lanczos, and of a video its first clip."""
    source = shard_source(data, shards, kind, sizes, 0)
    preprocess = PreprocessSpec(size=sizes[0], engine=_engine("lanczos"))
    return replace(source, preprocess=preprocess, clips_per_video=1)


def _engine(filter: str) -> Any:
    # Training needs no bits that are the same everywhere, so an older torch may lend Pillow's resize.
    from pipeline.preprocess import check_engine

    try:
        check_engine(filter, "torch")  # type: ignore[arg-type]
    except SpecError:
        return "pillow"
    return "torch"


def tensorboard_observers(folder: Path, tell: Callable[[str], None]) -> list[Observer]:
    """What writes scalars and pictures for TensorBoard; nothing where it is not installed."""
    if rank() != 0:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell("TensorBoard is not installed; the numbers are in log.jsonl alone (pip install tensorboard).")
        return []
    writer: Any = None

    def observe(report: TrainReport) -> None:
        nonlocal writer
        if writer is None:
            # What an interrupted run wrote after its last state is dropped: it is done again.
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=report.step)
        for name, value in report.values.items():
            writer.add_scalar(name, value, report.step)
        if report.picture is not None:
            from PIL import Image

            with Image.open(report.picture) as picture:
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                writer.add_image("reconstructions", pixels.view(picture.height, picture.width, 3), report.step,
                                 dataformats="HWC")  # fmt: skip
        writer.flush()

    return [observe]


class TrainDisplay:
    """A bar with the time left on a terminal, lines elsewhere; other processes than the first show nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last = -LINE_EVERY_SECONDS
        self._live: Any = None
        self._report: TrainReport | None = None
        if rank() == 0 and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live("starting ...", console=console, auto_refresh=False, transient=True)

    def observe(self, report: TrainReport) -> None:
        """Show new numbers, a line, or where a picture lies."""
        if report.line is not None:
            self.tell(report.line)
        if report.picture is not None:
            self.tell(f"step {report.step:,}: {report.picture}")
        if "val_psnr" in report.values:
            self.tell(describe_report(report))
        elif report.values:
            self._show(report)

    def tell(self, line: str) -> None:
        """Show something that happened."""
        if self._live is not None:
            self._live.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)
        elif rank() == 0:
            self._stream.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            self._stream.flush()

    def _show(self, report: TrainReport) -> None:
        if self._live is not None:
            self._live.update(_panel(report), refresh=True)
        elif time.monotonic() - self._last >= LINE_EVERY_SECONDS or report.step == report.steps:
            self._last = time.monotonic()
            self.tell(f"{describe_report(report)}{_time_left(report)}")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _time_left(report: TrainReport) -> str:
    return f", {describe_seconds(report.eta_seconds)} left" if report.eta_seconds else ""


def _panel(report: TrainReport) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=report.steps, completed=report.step, width=BAR_WIDTH)
    table.add_row(bar, Text(f"{describe_report(report)}{_time_left(report)}"))
    return table
