"""Begins a job or goes on with one: from a spec, or from an output, to the outcome of its run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.arithmetic import OneArithmetic
from jobs.begin import recognise, resolve, write_beginning
from jobs.driver import Driver, Observer
from jobs.finish import is_finished, sweep, write_manifest
from jobs.generation import Generation, first_generation, kept_selection, open_generation
from jobs.lease import HeldLease, take_lease
from jobs.outcome import JobOutcome, describe_outcome
from jobs.placement import Placement, find_nodes, find_placement
from jobs.runner import Runner
from pipeline.credentials import printable_url
from pipeline.dataset_files import LedgerState, read_job, read_ledger, read_manifest_summary
from pipeline.generations import list_begun
from pipeline.messages import WorkerSetup
from pipeline.storage import Storage, open_storage
from schemas.errors import BsqError, LeaseLost, SpecError
from schemas.job import Job
from schemas.jobspec import JobSpec

if TYPE_CHECKING:
    from jobs.metrics import JobMetrics

RunnerKind = Literal["ray", "local", "in-process"]


def start_job(
    spec: JobSpec,
    *,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Begin the job that `spec` describes and run it to its end; go on with it where the output holds it already.

    Raises BsqError: SpecError and CheckpointError before anything is written, Refused when the output is not this
    job's, CircuitBreakerOpen and Interrupted with everything committed kept."""
    options = storage_options or {}
    if not spec.out:
        raise SpecError("no output is given. Name a folder or URL with --out.")
    if not spec.shards:
        raise SpecError("no shards are given. Name tar files or URLs, such as photos-{000..127}.tar.")
    gpus = any(node.gpus for node in find_nodes(spec.device, ray_address))
    beginning = resolve(spec, gpus=gpus, storage_options=options)
    run = Execution(spec, runner, ray_address, options)
    run.place(len(beginning.urls))
    storage = open_storage(spec.out, options)
    recognise(storage, beginning)
    with holding_lease(storage, force=force) as lease:
        # Another driver may have begun or finished the job between the first look and the lease.
        job = recognise(storage, beginning)
        if job is None:
            write_beginning(storage, beginning)
            job = beginning.job
            generation = first_generation(job, beginning.urls)
        else:
            generation = open_generation(storage, job, list_begun(storage)[-1], given=beginning.urls)
        notes = kept_selection(generation.record.spec, beginning.job.spec)
        return run_generation(storage, job, generation, lease, run, observer, notes)


def resume_job(
    out: str,
    *,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    workers: int | None = None,
    batch: int | None = None,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Go on with the job in `out`.  Loads no model and starts no worker when nothing is left.

    Raises SpecError when there is no job, LeaseHeld when another driver may be alive."""
    options = storage_options or {}
    storage = open_storage(out, options)
    job = read_job(storage)
    if job is None:
        raise SpecError(f"{storage.url}: there is no job here to resume. Begin one with `bsq tokenize`.")
    changes = {name: value for name, value in (("workers", workers), ("batch", batch)) if value is not None}
    with holding_lease(storage, force=force) as lease:
        generation = open_generation(storage, job, list_begun(storage)[-1])
        spec = generation.record.spec
        spec = spec.model_copy(update={"out": out, "run": spec.run.model_copy(update=changes)})
        run = Execution(spec, runner, ray_address, options)
        return run_generation(storage, job, generation, lease, run, observer)


@dataclasses.dataclass(frozen=True, slots=True)
class Execution:
    """How workers are to be run, and the command that says so."""

    spec: JobSpec
    kind: RunnerKind
    ray_address: str | None
    storage_options: dict[str, Any]

    def place(self, num_shards: int) -> Placement:
        """Where the workers for so many shards go.  Raises SpecError when there is no room for them."""
        uses_ray = self.kind == "ray"
        return find_placement(self.spec, uses_ray=uses_ray, ray_address=self.ray_address, num_shards=num_shards)

    def command(self, name: str, switch: str = "") -> str:
        """What a person types to run `bsq NAME` on this output in the same way."""
        where = printable_url(self.spec.out)
        words = [f"bsq {name}", where if "://" in where else str(Path(where).absolute())]
        words += [switch] if switch else []
        words += {"ray": [], "local": ["--no-ray"], "in-process": ["--in-process"]}[self.kind]
        words += [f"--ray-address {self.ray_address}"] if self.ray_address else []
        # Values may be secrets, and this line goes into logs.
        words += [f"--storage-option {name}=..." for name in self.storage_options]
        return " ".join(words)


def _one_arithmetic(storage: Storage, ledger: LedgerState) -> OneArithmetic:
    """Holds a generation to the arithmetic of its ledger and of those before it."""
    known: dict[str, dict[str, Any]] = {}
    for number in range(ledger.generation):
        known |= read_ledger(storage, number, keep_commits=False).arithmetic
    return OneArithmetic(known | ledger.arithmetic)


def run_generation(
    storage: Storage,
    job: Job,
    generation: Generation,
    lease: HeldLease,
    execution: Execution,
    observer: Observer | None,
    notes: Sequence[str] = (),
) -> JobOutcome:
    """Run a generation that was begun to its end, and write its manifest; `notes` are told first and in the outcome."""
    number = generation.number
    # Workers take limits and policies from the job, and they are this generation's.
    job = job.model_copy(update={"spec": generation.record.spec})
    began = time.time()
    with lease.kept():
        storage.sweep_temporaries(older_than=began)
        ledger = read_ledger(storage, number, keep_commits=False)
        arithmetic = _one_arithmetic(storage, ledger) if execution.spec.run.strict_arithmetic else None
    command = execution.command("resume")
    driver = Driver(storage, generation, ledger, lease, execution.spec, observer, command, arithmetic)
    # The driver has counted those of the shards that are left, and each holds a message.
    ledger.failed_attempts.clear()
    told = [*notes]
    if driver.has_work and not storage.fenced:
        told.append(
            f"{storage.url}: this storage does not refuse the second writer of a name, so it does not keep two drivers "
            f"apart: make sure that only one runs."
        )
    if driver.has_work and observer is not None:
        for line in told:
            observer(driver.progress, line)
    if driver.has_work:
        runner = make_runner(storage, job, execution, driver.num_left)
        try:
            driver.run(runner, _make_metrics(storage, execution))
        finally:
            runner.close()
            # A lease that was lost means that the temporaries are another driver's.
            if not isinstance(sys.exception(), LeaseLost):
                storage.sweep_temporaries(older_than=time.time())
        with lease.kept():
            ledger = read_ledger(storage, number, keep_commits=False)
    with lease.kept():
        if not is_finished(storage, number):
            write_manifest(storage, job, number)
        if driver.leaves_strays:
            sweep(storage, number)
    outcome = describe_outcome(
        driver.progress,
        ledger,
        read_manifest_summary(storage, number),
        read_manifest_summary(storage, number - 1) if number else None,
        max_failed_fraction=execution.spec.run.max_failed_fraction,
        retry_command=lambda switch: execution.command("retry", switch),
    )
    return dataclasses.replace(outcome, lines=[*told, *outcome.lines])


@contextlib.contextmanager
def holding_lease(storage: Storage, *, force: bool) -> Iterator[HeldLease]:
    """Hold the lease of an output.  Raises LeaseHeld."""
    lease = take_lease(storage, force=force)
    try:
        yield lease
    finally:
        with contextlib.suppress(BsqError):
            lease.release()


def make_runner(storage: Storage, job: Job, execution: Execution, num_shards: int) -> Runner:
    """Workers for so many shards.  Raises SpecError when there is no room for them."""
    run = execution.spec.run
    placement = execution.place(num_shards)
    gpus, num_cpus = placement.gpus, placement.cpus_per_worker
    if not gpus and job.spec.dtype == "bfloat16" and execution.spec.device != "cpu":
        raise SpecError(
            "the job computes in bfloat16 on GPUs, and there is no GPU here. Go on with it where there is one, or "
            "begin another with dtype: float32 in another folder."
        )
    setups = [
        WorkerSetup(
            name=f"{'gpu' if gpus else 'cpu'}{number}",
            out=execution.spec.out,
            job=job,
            num_cpus=num_cpus,
            batch=run.batch,
            decode_bytes=run.decode_bytes,
            device=_device_of(number, gpus, execution.kind),
            decode_processes=run.decode_processes,
            storage_options=execution.storage_options,
        )
        for number in range(placement.workers)
    ]
    if execution.kind == "ray":
        from jobs.ray_runner import RayRunner

        return RayRunner(
            dataclasses.replace(setups[0], name="gpu" if gpus else "cpu"),
            _log_path(storage),
            address=execution.ray_address,
            workers=run.workers,
            num_gpus=1 if gpus else 0,
            num_cpus=num_cpus,
        )
    from jobs.local_runner import ChildRunner, InProcessRunner

    if execution.kind == "in-process":
        return InProcessRunner(setups)
    return ChildRunner(setups, _log_path(storage))


def _make_metrics(storage: Storage, execution: Execution) -> JobMetrics | None:
    if execution.kind != "ray":
        return None
    from jobs.metrics import JobMetrics

    return JobMetrics(storage.url)


def _log_path(storage: Storage) -> str:
    """A local file for tracebacks: in the output where that is a local folder."""
    folder = Path(storage.url_of("logs")) if storage.is_local else Path(tempfile.mkdtemp(prefix="bsqtok-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "workers.log")


def _device_of(number: int, gpus: int, kind: RunnerKind) -> str:
    if not gpus:
        return "cpu"
    # Ray shows an actor only its own GPU; children of this process see all of them.
    return "cuda" if kind == "ray" else f"cuda:{number}"
