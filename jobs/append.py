"""`bsq tokenize --append`: shards that a finished dataset does not have become its next generation."""

from __future__ import annotations

from typing import Any

from jobs.begin import resolve_append
from jobs.driver import Observer
from jobs.finish import is_finished
from jobs.generation import begin_generation, changed_selection, kept_selection, open_generation
from jobs.outcome import JobOutcome
from jobs.start import Execution, RunnerKind, holding_lease, run_generation
from pipeline.credentials import printable_url
from pipeline.dataset_files import read_job
from pipeline.generations import Plan, command_of, list_begun, read_generation, read_plans
from pipeline.storage import Storage, open_storage
from schemas.errors import Refused, SpecError
from schemas.jobspec import JobSpec


def append_job(
    spec: JobSpec,
    *,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Add the shards of `spec` to the finished dataset in `spec.out`, and go on with that where it was begun.

    Settings that `spec` leaves at their defaults are the dataset's.  Raises SpecError when there is no dataset,
    FingerprintDiffers when other settings are asked for, Refused when it is not finished or has one of the shards."""
    options = storage_options or {}
    storage = open_storage(spec.out, options)
    job = read_job(storage)
    if job is None:
        raise SpecError(f"{storage.url}: there is no dataset here to add shards to. Leave --append out to begin one.")
    before = read_generation(storage, job, list_begun(storage)[-1]).spec
    beginning = resolve_append(storage, job, before, spec, storage_options=options)
    resolved = beginning.job.spec
    execution = Execution(resolved.model_copy(update={"out": spec.out}), runner, ray_address, options)
    execution.place(len(beginning.urls))
    asked = [printable_url(url) for url in beginning.urls]
    with holding_lease(storage, force=force) as lease:
        begun = list_begun(storage)
        newest = read_generation(storage, job, begun[-1])
        if newest.kind == "append" and read_plans(storage, begun[-1:]).urls() == asked:
            notes = kept_selection(newest.spec, resolved)
            generation = open_generation(storage, job, newest.generation, given=beginning.urls)
        else:
            if not is_finished(storage, newest.generation):
                raise Refused(
                    f"{storage.url}: generation {newest.generation} (`{command_of(newest.kind)}`) is not finished. "
                    f"Finish it with `{execution.command('resume')}`, then add shards."
                )
            planned = read_plans(storage, begun)
            _refuse_present(storage, planned, asked)
            notes = changed_selection(newest.spec, resolved)
            first = int(planned.shards[-1]) + 1
            plan = Plan.of(range(first, first + len(asked)), asked)
            number = newest.generation + 1
            generation = begin_generation(storage, job, number, "append", resolved, plan, given=beginning.urls)
        return run_generation(storage, job, generation, lease, execution, observer, notes)


def _refuse_present(storage: Storage, planned: Plan, asked: list[str]) -> None:
    present = planned.find(asked)
    if present:
        url, shard = next(iter(present.items()))
        others = f" and {len(present) - 1:,} more of those asked for are" if len(present) > 1 else " is"
        raise Refused(
            f"{storage.url}: {url} (shard {shard}){others} in the dataset already. Name only shards that it does not "
            f"have; `bsq retry` tries failed ones again."
        )
