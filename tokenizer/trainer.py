"""Trains a tokenizer from an endless source of batches: the loop, its checkpoints, and `python -m tokenizer.trainer`.

    OUT/config.json            the run's settings
    OUT/log.jsonl              one line for every log interval
    OUT/states/state-N.safetensors   everything that a resumed run needs, the last few
    OUT/tokenizer/, OUT/best/  the averaged weights as a tokenizer: the newest and the best
    OUT/pictures/step-N.png    originals above reconstructions

The run is the same whether it was interrupted or not: on a CPU its losses are equal to the last digit."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.errors import BsqError, Interrupted, SpecError, printable
from tokenizer.checkpoint import save_checkpoint
from tokenizer.frame_batches import Batches, HeldFrames, centre_frames, read_arrays
from tokenizer.losses import ms_ssim, psnr, to_uint8
from tokenizer.train_config import TrainConfig, train_config
from tokenizer.train_log import Observer, StepLog, TrainReport, describe_report, picture_grid, write_png
from tokenizer.train_state import (
    TrainState,
    find_states,
    load_optimizer,
    load_random,
    load_state,
    optimizer_tensors,
    random_tensors,
    save_state,
    state_path,
)
from tokenizer.train_step import Learner, joined_ranks, num_ranks, rank, starting_model, training_sizes

MAX_SKIPPED_IN_A_ROW = 20
"""Updates without a finite gradient before the run ends: by then the weights themselves are the likely cause."""
NUM_PICTURES = 8


class TrainingDiverged(BsqError):
    """Losses or gradients are no numbers any more."""


class Trainer:
    """One run of training."""

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        out: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        validation: Sequence[Tensor] = (),
        observer: Observer = lambda report: None,
    ) -> None:
        """`validation`: uint8 [N, T, S, S, 3] each, measured with the averaged weights.

        In several processes each has its own `batches`; the first alone writes and is observed."""
        self.config, self.out, self.device = config, Path(out), torch.device(device)
        self.step = 0
        """Updates done."""
        self.learner = Learner(config, starting_model(config, self.device), self.device)
        self._batches, self._validation = batches, validation
        self._is_first = rank() == 0
        self._observer: Observer = observer if self._is_first else lambda report: None
        self._best = -math.inf
        self._stop = False
        self._skipped = 0
        self._dead: list[int] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._samples = 0

    def stop(self) -> None:
        """Ask the run to save and end after the update that it is at."""
        self._stop = True

    def begin(self, *, resume: bool) -> None:
        """Take the output folder: a new one, or with `resume` also one that holds a run, which goes on.

        Raises SpecError where the folder holds a run and `resume` was not asked for, or one with other settings."""
        states = find_states(self.out / "states")
        if states and not resume:
            raise SpecError(f"{printable(str(self.out))} holds a run. Add --resume to go on, or name another folder.")
        if states:
            self._restore(load_state(states[-1]), states[-1])
            self._tell(f"Going on after step {self.step:,}.")
        if self._is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.config.to_json_dict(), indent=2) + "\n"
            (self.out / "config.json").write_text(text, encoding="utf-8")
            self._log = StepLog(self.out / "log.jsonl", self.step)

    def run(self) -> None:
        """Train to the last step.  Raises Interrupted after a signal, with everything saved, or TrainingDiverged."""
        run, steps = self.config.run, self.config.optimizer.steps
        begun, first, logged = time.monotonic(), self.step, time.monotonic()
        frames: Tensor | None = None
        while self.step < steps:
            frames = self._batches.next_batch().to(self.device, non_blocking=True)
            self._collect(self.learner.update(frames, self.step), len(frames))
            self.step += 1
            if self.step % run.log_every == 0 or self.step == steps:
                now = time.monotonic()
                eta = (now - begun) / (self.step - first) * (steps - self.step)
                self._report(now - logged, eta)
                logged = now
            if self.step % run.picture_every == 0 or self.step == steps:
                self._draw(frames)
            validated = self.step % run.validate_every == 0 or self.step == steps
            if validated:
                self._validate()
            stopped = self._stop_asked()
            if self.step % run.save_every == 0 or self.step == steps or stopped:
                self.save()
            if stopped and self.step < steps:
                raise Interrupted(
                    f"Saved after step {self.step:,} of {steps:,}. Add --resume to go on: {printable(str(self.out))}"
                )

    def save(self) -> None:
        """Write the training state and the averaged weights."""
        sources: list[Any] = [self._batches.state()]
        if num_ranks() > 1:
            sources = [None] * num_ranks()
            dist.all_gather_object(sources, self._batches.state())
        if not self._is_first:
            return
        learner = self.learner
        tensors = {f"model.{name}": value for name, value in learner.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in learner.average.state().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(learner.optimizer).items()}
        if learner.discriminator is not None and learner.discriminator_optimizer is not None:
            tensors |= {f"discriminator.{name}": value for name, value in learner.discriminator.state_dict().items()}
            moments = optimizer_tensors(learner.discriminator_optimizer)
            tensors |= {f"discriminator_optimizer.{name}": value for name, value in moments.items()}
        tensors |= {f"random.{name}": value for name, value in random_tensors().items()}
        values = {
            "step": self.step,
            "ema_updates": learner.average.num_updates,
            "best": self._best if math.isfinite(self._best) else None,
            "config": self.config.to_json_dict(),
            "batches": sources,
        }
        save_state(
            state_path(self.out / "states", self.step), TrainState(tensors, values), keep=self.config.run.keep_last
        )
        self._export("tokenizer")

    def _restore(self, state: TrainState, path: Path) -> None:
        if self.config.require_same_run(state.values["config"], printable(str(path))):
            self._tell(f"The run ends at step {self.config.optimizer.steps:,} now; the schedule follows.")
        learner = self.learner
        learner.model.load_state_dict(state.part("model"))
        learner.average.load(state.part("ema"), state.values["ema_updates"])
        load_optimizer(learner.optimizer, state.part("optimizer"))
        if learner.discriminator is not None and learner.discriminator_optimizer is not None:
            learner.discriminator.load_state_dict(state.part("discriminator"))
            load_optimizer(learner.discriminator_optimizer, state.part("discriminator_optimizer"))
        load_random(state.part("random"))
        self.step = state.values["step"]
        self._best = -math.inf if state.values["best"] is None else state.values["best"]
        sources = state.values["batches"]
        same = all(source == sources[0] for source in sources)
        if len(sources) != num_ranks() and not same:
            raise SpecError(
                f"{printable(str(path))}: saved by {len(sources)} processes whose data are at different places; "
                f"there are {num_ranks()} now. Resume with as many."
            )
        self._batches.load(sources[0] if same else sources[rank()])

    def _collect(self, metrics: dict[str, Tensor], num_samples: int) -> None:
        self._samples += num_samples * num_ranks()
        if float(metrics["skipped"]):
            self._skipped += 1
            if self._skipped == 1:
                self._tell(
                    "A gradient is not finite (NaN or infinity): the update was left out. If this goes on, lower "
                    "optimizer.learning_rate or set run.dtype to float32."
                )
            if self._skipped == MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"No finite gradient in {self._skipped} updates up to step {self.step:,}. Resume from the last "
                    "state in a new folder with a lower optimizer.learning_rate, or with run.dtype float32."
                )
            return
        self._skipped = 0
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _report(self, seconds: float, eta_seconds: float) -> None:
        channel_bits, code_usage = self.learner.usage.take()
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        values["samples_per_second"] = self._samples / max(seconds, 1e-9)
        values["code_usage"] = code_usage
        values["least_channel_bits"] = min(channel_bits)
        self._sums, self._counts, self._samples = {}, {}, 0
        if self._is_first:
            self._log.write(self.step, {**values, "channel_bits": [round(bits, 4) for bits in channel_bits]})
        scalars = {**values, **{f"channel_bits/{number:02d}": bits for number, bits in enumerate(channel_bits)}}
        self._observer(TrainReport(self.step, self.config.optimizer.steps, scalars, eta_seconds))
        self._report_dead(channel_bits)

    def _report_dead(self, channel_bits: list[float]) -> None:
        least = self.config.run.dead_channel_bits
        # While the learning rate still rises the codebook is only beginning to fill.
        early = self.step <= self.config.optimizer.warmup_steps
        dead = [] if early else [number for number, bits in enumerate(channel_bits) if bits < least]
        if dead and dead != self._dead:
            names = ", ".join(map(str, dead))
            self._tell(
                f"{len(dead)} of {len(channel_bits)} channels are almost constant, under {least} bit ({names}): the "
                "codebook is partly dead. Raise losses.entropy_weight or losses.quantizer.gamma."
            )
        self._dead = dead

    def _draw(self, frames: Tensor) -> None:
        if not self._is_first:
            return
        shown = self._validation[0].to(self.device) if self._validation else frames
        clips = shown[:NUM_PICTURES]
        made = self._reconstruct(clips)
        # Of clips the middle frame.
        middle = clips.shape[1] // 2
        pixels = [list(to_uint8(each[:, middle]).cpu().numpy()) for each in (clips, made)]
        path = self.out / "pictures" / f"step-{self.step:08d}.png"
        write_png(path, picture_grid(*pixels))
        self._observer(TrainReport(self.step, self.config.optimizer.steps, picture=path))

    def _validate(self) -> None:
        if not self._is_first:
            return
        values: dict[str, float] = {}
        for number, frames in enumerate(self._validation):
            scores = [self._score(clips.to(self.device)) for clips in torch.split(frames, NUM_PICTURES)]
            name = "images" if frames.shape[1] == 1 else "clips"
            name += "" if number == 0 or f"val_psnr_{name}" not in values else f"_{number}"
            for metric, each in zip(("psnr", "ms_ssim_w7"), zip(*scores, strict=True), strict=True):
                values[f"val_{metric}_{name}"] = float(torch.cat(each).mean())
        if not values:
            return
        ranked = [value for name, value in values.items() if "psnr" in name]
        values["val_psnr"] = sum(ranked) / len(ranked)
        self._log.write(self.step, values)
        self._observer(TrainReport(self.step, self.config.optimizer.steps, values))
        if values["val_psnr"] > self._best:
            self._best = values["val_psnr"]
            self._export("best")

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
        with self._averaged():
            frames: Tensor = model.autoencode(clips).frames
        return frames

    def _export(self, name: str) -> None:
        with self._averaged():
            save_checkpoint(self.learner.model, self.out / name, trained=True)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.config.optimizer.ema:
                stack.enter_context(self.learner.average.applied(self.learner.model))
            yield

    def _stop_asked(self) -> bool:
        if num_ranks() == 1:
            return self._stop
        # Whichever process heard the signal, all end after the same step.
        flag = torch.tensor(float(self._stop), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    def _tell(self, line: str) -> None:
        self._observer(TrainReport(self.step, self.config.optimizer.steps, line=line))


class Stoppable(Protocol):
    """What a signal can ask to end."""

    def stop(self) -> None:
        """Save and end soon."""


@contextmanager
def stopping_on_signals(trainer: Stoppable) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the run with everything saved; a second signal ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stop()
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
