"""Trains a tokenizer from an endless source of batches, also as `python -m tokenizer.trainer`.

Besides what every run writes (`tokenizer/train_loop.py`):

    OUT/tokenizer/, OUT/best/  the averaged weights as a tokenizer: the newest and the best
    OUT/pictures/step-N.png    originals above reconstructions
    OUT/curve.svg              PSNR over the steps"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from schemas.errors import BsqError, SpecError, printable
from tokenizer.checkpoint import save_checkpoint
from tokenizer.code_start import NUM_FITTED, CodeLearner
from tokenizer.frame_batches import Batches, HeldFrames, centre_frames, read_arrays
from tokenizer.losses import ms_ssim, psnr, to_uint8
from tokenizer.ranks import joined_batch, joined_ranks, num_ranks, rank
from tokenizer.train_config import TrainConfig, train_config
from tokenizer.train_curve import draw_curve
from tokenizer.train_log import Observer, TrainReport, describe_report, picture_grid, write_png
from tokenizer.train_loop import TrainLoop, stopping_on_signals
from tokenizer.train_step import Learner, starting_model, training_sizes

NUM_PICTURES = 8


class Trainer(TrainLoop[Tensor]):
    """One run of training a tokenizer."""

    newest = "tokenizer"

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        out: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        validation: Sequence[Tensor] = (),
        observer: Observer = lambda report: None,
        data: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`validation`: uint8 [N, T, S, S, 3] each, measured with the averaged weights.  `data`: settings that decide
        what is drawn, as JSON types; a run goes on with the same alone.

        In several processes each has its own `batches`; the first alone writes and is observed."""
        device = torch.device(device)
        self.config = config
        kind = CodeLearner if config.losses.transform_code else Learner
        self.learner = kind(config, starting_model(config, device), device)
        super().__init__(config, self.learner, batches, out, device=device, observer=observer, data=data)
        self._validation = validation
        self._dead: list[int] = []

    def begin(self, *, resume: bool) -> None:
        """Take the output folder as every run does; a transform code is fitted to the first pictures drawn."""
        super().begin(resume=resume)
        if isinstance(self.learner, CodeLearner) and not self.learner.is_prepared:
            self.tell(f"Fitting a transform code to {NUM_FITTED:,} pictures.")
            drawn: list[Tensor] = []
            while sum(frames.shape[0] * frames.shape[1] for frames in drawn) < NUM_FITTED:
                drawn.append(joined_batch(self._batches.next_batch().to(self.device)))
            self.learner.prepare(torch.cat([frames.flatten(0, 1).unsqueeze(1) for frames in drawn]))

    def export(self, name: str) -> None:
        """Write the model as a tokenizer."""
        save_checkpoint(self.learner.model, self.out / name, trained=True)

    def take_interval(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Usage of codes, and the entropy of each channel in bits."""
        channel_bits, code_usage = self.learner.usage.take()
        self._report_dead(channel_bits)
        values = {"code_usage": code_usage, "least_channel_bits": min(channel_bits)}
        shown = {f"channel_bits/{number:02d}": bits for number, bits in enumerate(channel_bits)}
        return {**values, **shown}, {**values, "channel_bits": [round(bits, 4) for bits in channel_bits]}

    def interval_counts(self) -> dict[str, Tensor]:
        """How often bits and codes have occurred."""
        return self.learner.usage.counts()

    def _report_dead(self, channel_bits: list[float]) -> None:
        least = self.config.run.dead_channel_bits
        # While the learning rate still rises the codebook is only beginning to fill.
        early = self.step <= self.config.optimizer.warmup_steps
        dead = [] if early else [number for number, bits in enumerate(channel_bits) if bits < least]
        if dead and dead != self._dead:
            names = ", ".join(map(str, dead))
            self.tell(
                f"{len(dead)} of {len(channel_bits)} channels are almost constant, under {least} bit ({names}): the "
                "codebook is partly dead. Raise losses.entropy_weight or losses.quantizer.gamma."
            )
        self._dead = dead

    def draw(self, batch: Tensor) -> Path:
        """Originals above reconstructions, of the validation where there is one; and the curve of PSNR, as SVG."""
        draw_curve(self.out / "log.jsonl", self.out / "curve.svg", "PSNR, dB", None, ("psnr", "val_psnr"))
        shown = self._validation[0].to(self.device) if self._validation else batch
        clips = shown[:NUM_PICTURES]
        with self.averaged():
            made = self._reconstruct(clips)
        # Of clips the middle frame.
        middle = clips.shape[1] // 2
        pixels = [list(to_uint8(each[:, middle]).cpu().numpy()) for each in (clips, made)]
        path = self.out / "pictures" / f"step-{self.step:08d}.png"
        write_png(path, picture_grid(*pixels))
        return path

    def measure(self) -> tuple[dict[str, float], float]:
        """PSNR and MS-SSIM of what is validated on; the mean PSNR ranks."""
        values: dict[str, float] = {}
        for number, frames in enumerate(self._validation):
            scores = [self._score(clips.to(self.device)) for clips in torch.split(frames, NUM_PICTURES)]
            name = "images" if frames.shape[1] == 1 else "clips"
            name += "" if number == 0 or f"val_psnr_{name}" not in values else f"_{number}"
            for metric, each in zip(("psnr", "ms_ssim_w7"), zip(*scores, strict=True), strict=True):
                values[f"val_{metric}_{name}"] = float(torch.cat(each).mean())
        if values:
            ranked = [value for name, value in values.items() if "psnr" in name]
            values["val_psnr"] = sum(ranked) / len(ranked)
        return values, values.get("val_psnr", 0.0)

    def _score(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """PSNR of each frame of each clip and MS-SSIM, both of rounded pixels, mean over a clip's frames."""
        made = to_uint8(self._reconstruct(clips))
        pictures = [each.flatten(0, 1) for each in (made, clips)]
        planar = [each.permute(0, 3, 1, 2).float() for each in pictures]
        similarity = ms_ssim(planar[0], planar[1], data_range=255.0, taps=7)
        return psnr(pictures[0], pictures[1]), similarity

    @torch.no_grad()
    def _reconstruct(self, clips: Tensor) -> Tensor:
        model = self.learner.model
        return model.decode(model.encode(clips))


def held_batches(config: TrainConfig, arrays: Sequence[Any], device: torch.device) -> HeldFrames:
    """This process's batches of decoded frames, uint8 [N, T, H, W, 3] each, kept on the device."""
    image_size, max_frames = training_sizes(config)
    return HeldFrames(
        arrays,
        image_size=image_size,
        max_frames=max_frames,
        sampling=config.sampling,
        optimizer=config.optimizer,
        seed=config.run.seed,
        device=device,
        rank=rank(),
        num_ranks=num_ranks(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from arrays that are decoded already, on a machine that has torch, NumPy and safetensors only."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.trainer", description=main.__doc__)
    parser.add_argument("--frames", required=True, help="folder of .npy, or one .npz or .npy: uint8 [N, T, H, W, 3]")
    parser.add_argument("--validation", help="the same for validation; left out, nothing is validated")
    parser.add_argument("--config", required=True, help="JSON file of settings; {} is the paper's recipe")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT, or begin it")
    given = parser.parse_args(arguments)
    try:
        config = train_config(_read_json(Path(given.config)), given.config)
        with joined_ranks(config.run.device) as device:
            batches = held_batches(config, read_arrays(given.frames), device)
            image_size, max_frames = training_sizes(config)
            validation = [
                centre_frames(array, image_size=image_size, max_frames=max_frames)
                for array in (read_arrays(given.validation) if given.validation else ())
            ]
            trainer = Trainer(config, batches, given.out, device=device, validation=validation, observer=_print_report)
            trainer.begin(resume=given.resume)
            with stopping_on_signals(trainer):
                trainer.run()
    except BsqError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{printable(str(path))}: no readable JSON ({error}).") from error


def _print_report(report: TrainReport) -> None:
    line = report.line or (describe_report(report) if report.values else None)
    if line:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
