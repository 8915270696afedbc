"""One generation as a driver works through it: its shards, where to read them, and what each has already."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from jobs.begin import created_by, name_plan, write_draft
from pipeline.credentials import HIDDEN, printable_url
from pipeline.dataset_files import generation_name, read_manifest, read_plan_bytes, serialise_plan
from pipeline.generations import Plan, command_of, read_begun_plan, read_generation
from pipeline.messages import Assignment, EarlierParts
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import LeaseLost, Refused
from schemas.job import GenerationKind, GenerationRecord, Job
from schemas.jobspec import JobSpec, selection_differences


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What is to be made, and of which shards."""

    record: GenerationRecord
    plan: Plan
    full_urls: dict[int, str]
    """URLs of those shards whose URL in the plan is without its credentials."""
    committed: _CommittedShards | None = None
    """What the shards have already; None where whole shards are made."""
    resumed: bool = False
    """Another driver has begun it."""

    @property
    def number(self) -> int:
        return self.record.generation

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def shards(self) -> list[int]:
        """The numbers of its shards, ascending."""
        numbers: list[int] = self.plan.shards.tolist()
        return numbers

    def url(self, shard: int) -> str:
        """Where the shard is read, credentials included."""
        return self.full_urls.get(shard) or self.plan.url(shard)

    def complete(self, assignment: Assignment) -> Assignment:
        """The assignment with what the worker must know of the parts that its shard has."""
        if self.committed is None:
            return assignment
        return dataclasses.replace(
            assignment,
            part=self.record.part,
            earlier=self.committed.parts_of(assignment.shard, with_rest=self.record.kind == "retry-damaged"),
        )


def first_generation(job: Job, urls: Sequence[str], *, resumed: bool = False) -> Generation:
    """Generation 0 of a job, from the URLs that it was asked for."""
    record = GenerationRecord(
        fingerprint=job.fingerprint,
        generation=0,
        kind="tokenize",
        spec=job.spec,
        plan_sha256=job.plan_sha256,
        created_by=job.created_by,
    )
    printable = [printable_url(url) for url in urls]
    plan = Plan.of(range(len(urls)), printable)
    full = {shard: url for shard, (url, shown) in enumerate(zip(urls, printable, strict=True)) if url != shown}
    return Generation(record, plan, full, resumed=resumed)


def open_generation(storage: Storage, job: Job, number: int, *, given: Iterable[str] = ()) -> Generation:
    """A generation that was begun, to go on with it; `given` are URLs with their credentials.

    Raises Refused when the URL of a shard had credentials and is not given, BsqError when its plan is not there."""
    record = read_generation(storage, job, number)
    plan = read_begun_plan(storage, record)
    name_plan(storage, number, read_plan_bytes(storage, number))
    return Generation(
        record,
        plan,
        _with_credentials(storage, record.kind, plan, given),
        _CommittedShards(storage, number - 1, plan) if record.part else None,
        resumed=True,
    )


def begin_generation(
    storage: Storage,
    job: Job,
    number: int,
    kind: GenerationKind,
    spec: JobSpec,
    plan: Plan,
    *,
    given: Iterable[str] = (),
) -> Generation:
    """Write down what generation `number` does; with its record, create-only, it is begun.

    Raises Refused when the URL of a shard had credentials and is not given, LeaseLost when another driver has begun
    it."""
    full_urls = _with_credentials(storage, kind, plan, given)
    data = serialise_plan(plan.urls(), plan.shards.tolist())
    # Shards and output may hold credentials.
    patterns = tuple(printable_url(pattern) for pattern in spec.shards)
    record = GenerationRecord(
        fingerprint=job.fingerprint,
        generation=number,
        kind=kind,
        spec=spec.model_copy(update={"shards": patterns, "out": printable_url(spec.out)}),
        plan_sha256=hashlib.sha256(data).hexdigest(),
        created_by=created_by(),
    )
    write_draft(storage, number, data)
    reached("before_generation")
    record_data = record.model_dump_json(indent=1).encode() + b"\n"
    name = generation_name(number)
    if not storage.create_only(name, record_data) and storage.read_bytes(name) != record_data:
        raise LeaseLost(f"{storage.url}: another driver has begun generation {number}. See `bsq status`.")
    name_plan(storage, number, data)
    reached("after_generation")
    return Generation(record, plan, full_urls, _CommittedShards(storage, number - 1, plan) if record.part else None)


def _with_credentials(storage: Storage, kind: GenerationKind, plan: Plan, given: Iterable[str]) -> dict[int, str]:
    """The given URLs by number, of those shards whose URL in the plan is without its credentials."""
    pairs = [(url, printable_url(url)) for url in given]
    shown = [other for _, other in pairs]
    urls: dict[int, str] = {}
    if any(url != other for url, other in pairs):
        planned = plan.urls()
        if shown == planned:
            numbers = plan.shards.tolist()
        else:
            # Two URLs may differ in nothing but what is hidden: then nobody can tell whose shard is whose.
            twice = {url for names in (planned, shown) for url, count in Counter(names).items() if count > 1}
            found = plan.find([other for other in shown if other not in twice])
            numbers = [found.get(other, -1) for other in shown]
        urls = {shard: url for shard, (url, other) in zip(numbers, pairs, strict=True) if shard >= 0 and url != other}
    if not urls.keys() >= set(plan.shards_with(HIDDEN)):
        raise Refused(
            f"{storage.url}: the URLs of its shards held credentials, which are not written down. Repeat the "
            f"`{command_of(kind)}` command with the full URLs: it goes on where it stopped."
        )
    return urls


def kept_selection(generation: JobSpec, asked: JobSpec) -> list[str]:
    """What a generation that was begun keeps of its limits and policies though others are asked for, for people."""
    return [
        f"{name} stays {begun}, as this generation was begun; {value} would be for another one"
        for name, begun, value in selection_differences(generation, asked)
    ]


def changed_selection(before: JobSpec, now: JobSpec) -> list[str]:
    """In which limits and policies a generation differs from the one before, for people."""
    return [
        f"{name} is {value} in this generation, {previous} in the one before"
        for name, previous, value in selection_differences(before, now)
    ]


class _CommittedShards:
    """What the manifest of a generation says of some shards."""

    def __init__(self, storage: Storage, generation: int, plan: Plan) -> None:
        manifest = read_manifest(storage, generation, ["shard", "part", "file", "failures_file", "samples"])
        assert manifest is not None
        is_wanted = np.isin(manifest.table["shard"].to_numpy(), plan.shards)
        self._table = manifest.table.filter(pa.array(is_wanted))
        self._shards = self._table["shard"].to_numpy()

    def parts_of(self, shard: int, *, with_rest: bool) -> EarlierParts:
        first, last = np.searchsorted(self._shards, [shard, shard + 1]).tolist()
        rows = self._table.slice(first, last - first).to_pylist()
        return EarlierParts(
            files=tuple(row["file"] for row in rows),
            failures=rows[-1]["failures_file"],
            samples=rows[-1]["samples"],
            with_rest=with_rest,
        )
