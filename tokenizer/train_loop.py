"""The loop that trains a model from an endless source of batches: its log, states, moving average and signals.

    OUT/config.json            the run's settings
    OUT/data.json              how its frames are decoded, where a training file says so
    OUT/log.jsonl              one line for every log interval, and one for each validation
    OUT/states/state-N.safetensors   everything that a resumed run needs, the last few
    OUT/best/                  the averaged weights of the best validation

What is trained is told by a subclass.  The run is the same whether it was interrupted or not: on a CPU its losses are
equal to the last digit."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas.errors import BsqError, Interrupted, SpecError, printable
from tokenizer.ema import MovingAverage
from tokenizer.ranks import gathered, num_ranks, rank
from tokenizer.train_config import LearningPart, LoopPart, require_same_settings
from tokenizer.train_log import Observer, StepLog, TrainReport
from tokenizer.train_state import (
    TrainState,
    find_states,
    load_random,
    load_state,
    random_tensors,
    save_state,
    state_path,
)

MAX_SKIPPED_IN_A_ROW = 20
"""Updates without a finite gradient before the run ends: by then the weights themselves are the likely cause."""


class TrainingDiverged(BsqError):
    """Losses or gradients are no numbers any more."""


class Batch(Protocol):
    """Samples that one update learns from."""

    def to(self, device: torch.device, *, non_blocking: bool = ...) -> Self: ...

    def __len__(self) -> int: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)
Drawn = TypeVar("Drawn", bound=Batch, covariant=True)
Learned = TypeVar("Learned", bound=Batch, contravariant=True)


class BatchSource(Protocol[Drawn]):
    """What a loop draws from, for ever."""

    def next_batch(self) -> Drawn:
        """The next batch of this process."""

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON types."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.  Raises SpecError where it belongs to other data."""


class LoopConfig(Protocol):
    """The settings that every run has."""

    @property
    def optimizer(self) -> LearningPart: ...
    @property
    def run(self) -> LoopPart: ...
    def to_json_dict(self) -> dict[str, Any]: ...
    def require_same_run(self, saved: dict[str, Any], where: str) -> bool: ...


class LoopLearner(Protocol[Learned]):
    """What learns: a model, its moving average, and optimisers."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def average(self) -> MovingAverage: ...
    def update(self, batch: Learned, step: int, /) -> dict[str, Tensor]:
        """Learn from one batch; returns scalars, of which `skipped` is 1 where a gradient was not finite."""

    def tensors(self) -> dict[str, Tensor]:
        """All state by dotted name."""

    def load(self, state: TrainState) -> None:
        """Put back what `tensors` gave."""


class Interval:
    """Sums over the updates of one log interval."""

    def __init__(self, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """A new one, or the one that gave `tensors`."""
        self._sums = dict(tensors)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the scalars of an update; of one that was left out, that it was."""
        skipped = bool(metrics["skipped"])
        for name, value in metrics.items():
            if name == "skipped" or not skipped:
                self._add(f"sum.{name}", value)
                self._add(f"number.{name}", torch.ones((), dtype=torch.int64))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def values(self) -> dict[str, float]:
        """The mean of each scalar over the updates that had it; of `skipped` how many updates were left out."""
        means = {
            name.removeprefix("sum."): float(total) / int(self._sums[name.replace("sum.", "number.", 1)])
            for name, total in self._sums.items()
            if name.startswith("sum.")
        }
        return {**means, "skipped": float(self._sums["sum.skipped"])}

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by dotted name."""
        return dict(self._sums)


class TrainLoop(ABC, Generic[AnyBatch]):
    """One run of training."""

    def __init__(
        self,
        config: LoopConfig,
        learner: LoopLearner[AnyBatch],
        batches: BatchSource[AnyBatch],
        out: str | os.PathLike[str],
        *,
        device: torch.device,
        observer: Observer,
        data: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """In several processes each has its own `batches`; the first alone writes and is observed.

        `data`: settings that decide what is drawn, as JSON types; a run goes on with the same alone."""
        self.step = 0
        """Updates done."""
        self.out, self.device = Path(out), device
        self._config, self._learner, self._batches, self._data = config, learner, batches, dict(data)
        self._is_first = rank() == 0
        self._observer: Observer = observer if self._is_first else lambda report: None
        self._best = -math.inf
        self._stop = False
        self._skipped_in_a_row = 0
        self._interval = Interval()
        self._samples = 0

    @abstractmethod
    def export(self, name: str) -> None:
        """Write the model, which holds the averaged weights now, into folder `name` of the run."""

    @abstractmethod
    def measure(self) -> tuple[dict[str, float], float]:
        """Validate: values by name, none without validation data; and how good that is, more is better."""

    @abstractmethod
    def draw(self, batch: AnyBatch) -> Path | None:
        """Draw how far the run is, and return a PNG to show, if it is one; `batch` is the last that was learnt from."""

    def take_interval(self) -> tuple[dict[str, float], dict[str, Any]]:
        """What else is known of the log interval that ends: values to show, and what the log gets of them."""
        return {}, {}

    def interval_counts(self) -> dict[str, Tensor]:
        """What this process has counted for `take_interval`, by name: a state keeps it, and writes it back in place."""
        return {}

    def stop(self) -> None:
        """Ask the run to save and end after the update that it is at."""
        self._stop = True

    def begin(self, *, resume: bool) -> None:
        """Take the output folder: a new one, or with `resume` also one that holds a run, which goes on.

        Raises SpecError where the folder holds a run and `resume` was not asked for, or one with other settings, or
        where it is not the same folder for all processes."""
        states = find_states(self.out / "states")
        self._require_same_folder(states[-1].stem if states else None)
        if states and not resume:
            raise SpecError(f"{printable(str(self.out))} holds a run. Add --resume to go on, or name another folder.")
        if states:
            self._restore(load_state(states[-1]), states[-1])
            self.tell(f"Going on after step {self.step:,}.")
        else:
            torch.manual_seed(self._config.run.seed)
        if self._is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            for name, values in (("config", self._config.to_json_dict()), ("data", self._data)):
                if values:
                    (self.out / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            self._log = StepLog(self.out / "log.jsonl", self.step)

    def run(self) -> None:
        """Train to the last step.  Raises Interrupted after a signal, with everything saved, or TrainingDiverged."""
        run, steps = self._config.run, self._config.optimizer.steps
        begun, first, logged = time.monotonic(), self.step, time.monotonic()
        while self.step < steps:
            batch = self._batches.next_batch().to(self.device, non_blocking=True)
            self._collect(self._learner.update(batch, self.step), len(batch))
            self.step += 1
            if self.step % run.log_every == 0 or self.step == steps:
                now = time.monotonic()
                eta = (now - begun) / (self.step - first) * (steps - self.step)
                self._report(now - logged, eta)
                logged = now
            if self.step % run.validate_every == 0 or self.step == steps:
                self._validate()
            if self.step % run.picture_every == 0 or self.step == steps:
                self._draw(batch)
            stopped = self._stop_asked()
            if self.step % run.save_every == 0 or self.step == steps or stopped:
                self.save()
            if stopped and self.step < steps:
                raise Interrupted(
                    f"Saved after step {self.step:,} of {steps:,}. Add --resume to go on: {printable(str(self.out))}"
                )

    def save(self) -> None:
        """Write the training state and the averaged weights."""
        sources, own = gathered(self._batches.state()), gathered(self._own_tensors())
        if not self._is_first:
            return
        tensors = self._learner.tensors()
        tensors |= {f"ranks.{number}.{name}": value for number, each in enumerate(own) for name, value in each.items()}
        values = {
            "step": self.step,
            "ema_updates": self._learner.average.num_updates,
            "best": self._best if math.isfinite(self._best) else None,
            "config": self._config.to_json_dict(),
            "data": self._data,
            "batches": sources,
        }
        save_state(
            state_path(self.out / "states", self.step), TrainState(tensors, values), keep=self._config.run.keep_last
        )
        with self.averaged():
            self.export(self.newest)

    newest = "newest"
    """Folder of the newest averaged weights."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, for a while."""
        with ExitStack() as stack:
            if self._config.optimizer.ema:
                stack.enter_context(self._learner.average.applied(self._learner.model))
            yield

    def tell(self, line: str) -> None:
        """Say something to whoever watches."""
        self._observer(TrainReport(self.step, self._config.optimizer.steps, line=line))

    def _own_tensors(self) -> dict[str, Tensor]:
        """What of a state each process has to itself, on the CPU."""
        parts = {"random": random_tensors(), "interval": self._interval.tensors(), "counts": self.interval_counts()}
        return {f"{part}.{name}": value.cpu() for part, tensors in parts.items() for name, value in tensors.items()}

    def _require_same_folder(self, found: str | None) -> None:
        """Raise SpecError, in every process, where they do not all find the same newest state."""
        of_ranks = gathered(found)
        if any(each != of_ranks[0] for each in of_ranks):
            shown = ", ".join(f"process {number} {each or 'none'}" for number, each in enumerate(of_ranks))
            raise SpecError(
                f"{printable(str(self.out))}: the processes do not find the same training state there ({shown}). Name "
                "a folder that all of them see, or copy its states to every node."
            )

    def _restore(self, state: TrainState, path: Path) -> None:
        has_moved = self._config.require_same_run(state.values["config"], printable(str(path)))
        # Arrays that were decoded elsewhere come without settings.
        if (data := state.values.get("data")) and self._data:
            require_same_settings({"data": data}, {"data": self._data}, frozenset(), printable(str(path)))
        self._learner.load(state)
        # A process that the saved run did not have goes on from the generators of the first.
        load_random(state.part(f"ranks.{rank()}.random") or state.part("ranks.0.random") or state.part("random"))
        self._interval = Interval(state.part(f"ranks.{rank()}.interval"))
        for name, counts in state.part(f"ranks.{rank()}.counts").items():
            self.interval_counts()[name].copy_(counts)
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
        # After the step is known: whoever watches keeps what was before it.
        if has_moved:
            self.tell(f"The run ends at step {self._config.optimizer.steps:,} now; the schedule follows.")

    def _collect(self, metrics: dict[str, Tensor], num_samples: int) -> None:
        self._samples += num_samples * num_ranks()
        self._interval.add(metrics)
        if float(metrics["skipped"]):
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == 1:
                self.tell(
                    "A gradient is not finite (NaN or infinity): the update was left out. If this goes on, lower "
                    "optimizer.learning_rate or set run.dtype to float32."
                )
            if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"No finite gradient in {self._skipped_in_a_row} updates up to step {self.step:,}. Resume from the "
                    "last state in a new folder with a lower optimizer.learning_rate, or with run.dtype float32."
                )
        else:
            self._skipped_in_a_row = 0

    def _report(self, seconds: float, eta_seconds: float) -> None:
        values = self._interval.values()
        values["samples_per_second"] = self._samples / max(seconds, 1e-9)
        self._interval, self._samples = Interval(), 0
        shown, logged = self.take_interval()
        if self._is_first:
            self._log.write(self.step, {**values, **logged})
        self._observer(TrainReport(self.step, self._config.optimizer.steps, {**values, **shown}, eta_seconds))

    def _draw(self, batch: AnyBatch) -> None:
        if self._is_first and (path := self.draw(batch)) is not None:
            self._observer(TrainReport(self.step, self._config.optimizer.steps, picture=path))

    def _validate(self) -> None:
        if not self._is_first:
            return
        with self.averaged():
            values, score = self.measure()
        if not values:
            return
        self._log.write(self.step, values)
        self._observer(TrainReport(self.step, self._config.optimizer.steps, values))
        if score > self._best:
            self._best = score
            with self.averaged():
                self.export("best")

    def _stop_asked(self) -> bool:
        if num_ranks() == 1:
            return self._stop
        # Whichever process heard the signal, all end after the same step.
        flag = torch.tensor(float(self._stop), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)


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
