"""`bsq retry`: what a finished dataset lacks is tried again, as its next generation."""

from __future__ import annotations

from typing import Any, Literal

from jobs.driver import Observer
from jobs.finish import find_failed_shards, is_finished, sweep_shards
from jobs.generation import begin_generation, changed_selection, kept_selection, open_generation
from jobs.outcome import JobOutcome, describe_outcome
from jobs.progress import progress_of
from jobs.start import Execution, RunnerKind, holding_lease, run_generation
from pipeline.dataset_files import LedgerState, read_job, read_manifest
from pipeline.generations import command_of, list_begun, read_generation, read_plans
from pipeline.sources import expand_shards
from pipeline.storage import Storage, open_storage
from schemas.errors import Refused, SpecError
from schemas.job import GenerationKind
from schemas.jobspec import JobSpec, merge_specs
from schemas.manifest import ManifestSummary, latest_parts

RetryKind = Literal["retry", "retry-samples", "retry-damaged"]

NOTHING = {
    "retry": "no shard failed",
    "retry-samples": "no sample failed",
    "retry-damaged": "no shard was damaged",
}
_CHANGEABLE = ("limits", "damaged_shards", "run", "device")


def retry_job(
    out: str,
    kind: RetryKind,
    *,
    asked: JobSpec | None = None,
    runner: RunnerKind = "ray",
    ray_address: str | None = None,
    force: bool = False,
    observer: Observer | None = None,
    storage_options: dict[str, Any] | None = None,
) -> JobOutcome:
    """Try again what failed in the finished dataset in `out`, and go on with such a retry where it was begun.

    Settings of `asked` win over those of the generation before; its shards are full URLs of those whose credentials
    are not written down.  Raises SpecError when there is no dataset or a setting decides bits, Refused when another
    generation is not finished."""
    options = storage_options or {}
    asked = asked or JobSpec()
    _refuse_settings(asked)
    given = expand_shards(list(asked.shards), options) if asked.shards else []
    storage = open_storage(out, options)
    job = read_job(storage)
    if job is None:
        raise SpecError(f"{storage.url}: there is no dataset here. Name the folder given as --out.")
    with holding_lease(storage, force=force) as lease:
        newest = read_generation(storage, job, list_begun(storage)[-1])
        spec = merge_specs(newest.spec, asked).model_copy(update={"shards": (), "out": out})
        execution = Execution(spec, runner, ray_address, options)
        if not is_finished(storage, newest.generation):
            if newest.kind != kind:
                raise Refused(
                    f"{storage.url}: generation {newest.generation} (`{command_of(newest.kind)}`) is not finished. "
                    f"Finish it with `{execution.command('resume')}`, then retry."
                )
            notes = kept_selection(newest.spec, spec)
            generation = open_generation(storage, job, newest.generation, given=given)
        else:
            shards, summary = _find_shards(storage, kind, newest.generation)
            if not shards:
                return _nothing_to_do(kind, summary, execution)
            execution.place(len(shards))
            notes = changed_selection(newest.spec, spec)
            if kind == "retry":
                sweep_shards(storage, shards)
            plan = read_plans(storage, list_begun(storage)).select(shards)
            number = newest.generation + 1
            generation = begin_generation(storage, job, number, kind, spec, plan, given=given)
        return run_generation(storage, job, generation, lease, execution, observer, notes)


def _refuse_settings(asked: JobSpec) -> None:
    values = asked.model_dump(exclude_unset=True, exclude={"shards"})
    for name, value in values.items():
        if name not in _CHANGEABLE:
            field = f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
            raise SpecError(
                f"{field} cannot be changed by a retry: the rows that are there were made without it. What can be "
                f"changed: limits.*, damaged_shards, device and run.*."
            )


def _find_shards(storage: Storage, kind: GenerationKind, generation: int) -> tuple[list[int], ManifestSummary]:
    """The shards of the dataset that lack something of this kind."""
    manifest = read_manifest(storage, generation, ["shard", "part", "failed", "partial"])
    assert manifest is not None
    table = manifest.table
    if kind == "retry":
        return find_failed_shards(storage, generation, table), manifest.summary
    lacking = table["failed"].to_numpy() > 0 if kind == "retry-samples" else table["partial"].to_numpy()
    shards: list[int] = table["shard"].to_numpy()[lacking & latest_parts(table)].tolist()
    return shards, manifest.summary


def _nothing_to_do(kind: RetryKind, summary: ManifestSummary, execution: Execution) -> JobOutcome:
    outcome = describe_outcome(
        progress_of(summary),
        LedgerState(summary.generation),
        summary,
        None,
        max_failed_fraction=execution.spec.run.max_failed_fraction,
        retry_command=lambda switch: execution.command("retry", switch),
    )
    return JobOutcome(outcome.exit_code, outcome.progress, [f"Nothing to try again: {NOTHING[kind]}.", *outcome.lines])
