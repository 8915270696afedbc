"""Training on a Ray cluster: Ray Train starts the processes and joins them, each then does what `torchrun`'s would.

Ray runs a training function in a thread, where no signal arrives and nothing reaches our terminal.  So a small actor
on the driver's node carries reports of the first process to the driver, and the driver's wish to stop to all processes.
Where a process or its node is lost, Ray starts all of them again, and the run goes on from its last state."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jobs.placement import find_nodes, place_workers
from jobs.ray_runner import connect_ray
from jobs.train import TrainDisplay, read_run, train_here
from schemas.errors import BsqError, Interrupted, SpecError, printable
from schemas.trainspec import TrainSpec
from tokenizer.train_config import TrainConfig
from tokenizer.train_log import TrainReport
from tokenizer.train_loop import Stoppable, stopping_on_signals
from tokenizer.train_state import find_states
from tokenizer.trainer import Trainer

# Set before Ray Train is imported: paths of a training file are relative to where the command was given.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_RESTARTS = 3
"""Times that lost processes are started again, from the last state, before the command ends."""
POLL_SECONDS = 0.5


class Mailbox:
    """What the driver and the processes of a run leave for each other."""

    def __init__(self) -> None:
        self._reports: list[TrainReport] = []
        self._error: BsqError | None = None
        self._stop = False

    def report(self, report: TrainReport) -> None:
        """From the first process: show this."""
        self._reports.append(report)

    def fail(self, error: BsqError) -> None:
        """From any process: this ends the run."""
        self._error = self._error or error

    def stop(self) -> None:
        """From the driver: save and end."""
        self._stop = True

    def must_stop(self) -> bool:
        """For the processes."""
        return self._stop

    def take(self) -> tuple[list[TrainReport], BsqError | None]:
        """For the driver: new reports, and what ended the run."""
        reports, self._reports = self._reports, []
        return reports, self._error


@dataclass(frozen=True, kw_only=True)
class Part:
    """What every process of a run is told."""

    mailbox: Any
    spec: TrainSpec
    config: TrainConfig
    folder: Path
    storage_options: Mapping[str, Any] | None = field(repr=False)
    working_folder: str
    """Of the command; relative paths begin there, on other nodes too where they share it."""


def train_on_ray(
    path: Path,
    workers: int,
    *,
    ray_address: str | None = None,
    cpus_per_worker: int | None = None,
    resume: bool = False,
    out: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run a training file in `workers` processes of a Ray cluster; one GPU each where the run uses GPUs.

    Raises what `jobs.train.train` raises, and SpecError where the cluster has no room."""
    spec, config, folder = read_run(path, out)
    folder = folder.absolute()
    if find_states(folder / "states") and not resume:
        raise SpecError(f"{printable(str(folder))} holds a run. Add --resume to go on, or name another folder.")
    try:
        nodes = find_nodes(config.run.device, ray_address)
        placement = place_workers(
            nodes, workers=workers, cpus_per_worker=cpus_per_worker or 0, num_shards=workers, exclusive=True
        )
        use_gpu, cpus = placement.gpus > 0, placement.cpus_per_worker
        connect_ray(ray_address)
        if not spec.data.decode_threads:
            spec = spec.model_copy(update={"data": spec.data.model_copy(update={"decode_threads": cpus})})
        # Beside the driver: elsewhere it could be lost with a node that the run would outlive.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        part = Part(mailbox=mailbox, spec=spec, config=config, folder=folder, storage_options=storage_options,
                    working_folder=str(Path.cwd()))  # fmt: skip
        trainer = ray.train.torch.TorchTrainer(
            _train_part,
            train_loop_config={"part": part},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS),
            ),
        )
        with TrainDisplay(stream) as display:
            display.tell(f"Starting {workers} processes with Ray, {cpus} CPU{' and one GPU' * use_gpu} each.")
            _watch(trainer, mailbox, display)
    finally:
        ray.shutdown()
    return folder / "tokenizer"


def _train_part(settings: dict[str, Any]) -> None:
    """One process of the run, inside a worker of Ray Train."""
    part: Part = settings["part"]
    is_first = ray.train.get_context().get_world_rank() == 0
    with contextlib.suppress(OSError):
        os.chdir(part.working_folder)

    def observe(report: TrainReport) -> None:
        if is_first:
            ray.get(part.mailbox.report.remote(report))

    try:
        # A run that Ray starts again goes on; whether it may begin here the driver has asked.
        train_here(
            part.spec,
            part.config,
            part.folder,
            ray.train.torch.get_device(),
            observe,
            resume=True,
            storage_options=part.storage_options,
            stopping=lambda trainer: _stopping_on_mail(trainer, part.mailbox),
        )
    except Interrupted as error:
        ray.get(part.mailbox.fail.remote(error))
    except BsqError as error:
        ray.get(part.mailbox.fail.remote(error))
        raise


@contextlib.contextmanager
def _stopping_on_mail(trainer: Trainer, mailbox: Any) -> Iterator[None]:
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(POLL_SECONDS):
            with contextlib.suppress(RayError):
                if ray.get(mailbox.must_stop.remote()):
                    trainer.stop()
                    return

    threading.Thread(target=listen, name="stop-listener", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Fit(threading.Thread):
    """Ray Train's own loop; outside of the main thread it leaves signals to us."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001 - carried to the thread that waits
            self.error = error


class _Wish(Stoppable):
    """That the run may stop, as signals express it."""

    def __init__(self) -> None:
        self.asked = False

    def stop(self) -> None:
        self.asked = True


def _watch(trainer: Any, mailbox: Any, display: TrainDisplay) -> None:
    """Show reports until the run ends; raise what ended it."""
    fit, wish = _Fit(trainer), _Wish()
    error: BsqError | None = None
    with stopping_on_signals(wish):
        fit.start()
        running, passed_on = True, False
        while running:
            fit.join(POLL_SECONDS)
            running = fit.is_alive()
            if wish.asked and not passed_on:
                passed_on = True
                ray.get(mailbox.stop.remote())
            reports, error = ray.get(mailbox.take.remote())
            for report in reports:
                display.observe(report)
            if error is not None and not isinstance(error, Interrupted):
                break  # Ray would start the run again
    if error is not None:
        raise error
    if fit.error is not None:
        line = str(fit.error).strip().splitlines()
        raise BsqError(
            f"The processes of the run were lost more than {MAX_RESTARTS} times "
            f"({line[0][:200] if line else type(fit.error).__name__}). Add --resume to go on from the last state."
        ) from fit.error
