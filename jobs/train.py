"""Wires a training file to its data and shows how the run goes: what `bsq train` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch

from jobs.display import describe_seconds
from jobs.screen import Screen
from jobs.training_data import TrainingData, save_frames
from schemas.errors import SpecError
from schemas.trainspec import TrainSpec, read_train_spec
from tokenizer.ranks import joined_ranks, rank
from tokenizer.train_config import TrainConfig, train_config
from tokenizer.train_log import Observer, TrainReport, describe_report
from tokenizer.train_loop import stopping_on_signals
from tokenizer.trainer import Trainer


def train(
    path: Path,
    *,
    resume: bool = False,
    out: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run a training file to its end and return the folder of the tokenizer.

    Raises SpecError for a file that cannot be meant, and Interrupted after a signal, with everything saved."""
    spec, config, folder = read_run(path, out)
    with joined_ranks(config.run.device) as device, TrainDisplay(stream) as display:
        observe: Observer = display.observe if rank() == 0 else lambda report: None
        train_here(spec, config, folder, device, observe, resume=resume, storage_options=storage_options)
    return folder / "tokenizer"


def read_run(path: Path, out: str | None) -> tuple[TrainSpec, TrainConfig, Path]:
    """What a training file says, and the folder of the run.  Raises SpecError, in one line, for what is wrong."""
    spec = read_train_spec(path)
    config = train_config(spec.training(), str(path))
    folder = out or spec.out
    if not folder or "://" in folder:
        raise SpecError(f"{path}: out is {folder!r}; name a local folder for the run, there or with --out.")
    return spec, config, Path(folder)


def train_here(
    spec: TrainSpec,
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    observe: Observer,
    *,
    resume: bool,
    storage_options: Mapping[str, Any] | None = None,
    stopping: Callable[[Trainer], AbstractContextManager[None]] = stopping_on_signals,
) -> None:
    """This process's part of a run, whoever started it; `observe` hears of everything, `stopping` may end it."""

    def tell(line: str) -> None:
        observe(TrainReport(0, config.optimizer.steps, line=line))

    data = TrainingData(spec=spec, config=config, tell=tell, storage_options=storage_options)
    batches, validation = data.open(device)
    observers = [observe, *tensorboard_observers(folder, tell)]

    def observe_all(report: TrainReport) -> None:
        for each in observers:
            each(report)

    trainer = Trainer(
        config, batches, folder, device=device, validation=validation, observer=observe_all, data=spec.data.drawing()
    )
    trainer.begin(resume=resume)
    with stopping(trainer):
        trainer.run()


def decode_ahead(
    path: Path,
    folder: Path,
    *,
    most_bytes: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Decode what a training file holds into FOLDER; see `jobs.training_data.save_frames`."""
    spec = read_train_spec(path)
    config = train_config(spec.training(), str(path))
    with TrainDisplay(stream) as display:
        data = TrainingData(spec=spec, config=config, tell=display.tell, storage_options=storage_options)
        save_frames(data, folder, most_bytes=most_bytes)


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
            # What an interrupted run wrote after its last state is dropped: it is done again.  A report without
            # values tells of the state that the run goes on from, whose step is done.
            first = report.step if report.values else report.step + 1
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
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


class TrainDisplay(Screen):
    """Shows a run with the time left; other processes than the first show nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream, silent=rank() != 0)

    def observe(self, report: TrainReport) -> None:
        """Show new numbers, a line, or where a picture lies."""
        if report.line is not None:
            self.tell(report.line)
        if report.picture is not None:
            self.tell(f"step {report.step:,}: {report.picture}")
        if "val_psnr" in report.values or "val_bits" in report.values:
            self.tell(describe_report(report))
        elif report.values:
            line = describe_report(report)
            if report.eta_seconds:
                line += f", {describe_seconds(report.eta_seconds)} left"
            self.draw(report.step / report.steps, [line], last=report.step == report.steps)
