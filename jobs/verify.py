"""Checks that a dataset is what its records say: every file, every row, every sample."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.display import counted
from jobs.existing_job import existing_job
from pipeline.check_files import CheckedFiles, check_committed_files, check_shard_parts
from pipeline.dataset_files import (
    CommittedParts,
    LedgerState,
    Manifest,
    generation_name,
    iter_commits,
    list_generations,
    plan_name,
    read_ledger,
    read_manifest,
    read_plan,
    read_plan_bytes,
)
from pipeline.generations import Plan, list_begun, read_generation
from pipeline.storage import Storage, open_storage
from schemas.errors import BsqError, CheckpointError
from schemas.fingerprint import fingerprint
from schemas.job import Job
from schemas.ledger import Commit
from schemas.manifest import count_samples, manifest_table
from tokenizer.checkpoint import read_checkpoint

FILES_AT_ONCE = 4
"""Token files that are read ahead: hides the latency of an object store, bounds the memory."""
SHOWN_PROBLEMS = 20
_ADOPTED_ARITHMETIC = "unknown"
"""Stands in the commit of a file that was found published: what computed it is not known any more."""


@dataclass(slots=True)
class Verification:
    """What was checked and what is wrong."""

    url: str
    problems: list[str] = field(default_factory=list)
    """One line each; empty where everything is as recorded."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing but no damage."""
    finished: bool = False
    """Every generation that was begun has its manifest."""
    files: int = 0
    """Token files checked."""
    rows: int = 0
    samples: int = 0
    failed: int = 0
    bytes: int = 0
    """Bytes read of token files and failure tables."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what is committed."""
        return not self.problems

    def describe(self) -> str:
        """A few lines for people."""
        counts = (
            f"{counted(self.files, 'token file')}, {counted(self.rows, 'row')} of {counted(self.samples, 'sample')} "
            f"({self.failed:,} failed), {self.bytes:,} bytes read"
        )
        lines = [f"{self.url}: {counts}", *self.notes]
        if self.ok:
            lines.append("Everything is as recorded." if self.finished else "What is committed is as recorded.")
            return "\n".join(lines)
        lines += [f"- {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"- and {len(self.problems) - SHOWN_PROBLEMS:,} more")
        plural = "s" if len(self.problems) > 1 else ""
        lines.append(
            f"{len(self.problems):,} problem{plural}. Restore the files named above from a copy, or tokenize their "
            f"shards into another folder."
        )
        return "\n".join(lines)


def verify_dataset(
    out: str,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read a whole dataset and compare it with its records; one that is not finished as far as it goes.

    `on_progress` is called with the number of token files checked and the number there are.  Raises SpecError when
    there is no dataset, and BsqError when job.json, the plan or the ledger itself cannot be read."""
    storage = open_storage(out, storage_options)
    job = existing_job(storage)
    result = Verification(storage.url)
    result.problems += _job_problems(storage, job, storage_options)

    finished = list_generations(storage)
    generations = list_begun(storage)
    part_of_generation = _read_records(storage, job, generations, result)
    result.finished = set(generations) <= set(finished)
    states = [read_ledger(storage, generation, keep_commits=False) for generation in generations]
    manifests = _read_manifests(storage, finished, result)
    listed = _ManifestRows(manifests[-1]) if manifests else None
    planned = _read_plans(storage, generations, result)
    arithmetic = set().union(*(state.arithmetic for state in states), {_ADOPTED_ARITHMETIC})
    num_files = sum(state.totals.commits for state in states)
    recorded_names: set[str] = set()
    committed = CommittedParts()
    shards_in_parts: set[int] = set()

    commits = ((generation, commit) for generation in generations for commit in iter_commits(storage, generation))
    for (generation, commit), checked in _in_threads(commits, partial(check_committed_files, storage, job)):
        result.problems += checked.problems
        result.bytes += checked.bytes
        result.files += 1
        result.rows += commit.rows
        result.samples += commit.samples
        result.failed += commit.failed
        recorded_names.add(commit.file)
        if commit.failures is not None:
            recorded_names.add(commit.failures.file)
        if not committed.add(commit.shard, commit.part):
            result.problems.append(f"shard {commit.shard}, part {commit.part}: committed in more than one generation")
        if commit.part:
            shards_in_parts.add(commit.shard)
        if commit.part != part_of_generation[generation]:
            result.problems.append(f"{commit.file}: part {commit.part}, which generation {generation} does not make")
        if commit.shard not in planned:
            result.problems.append(f"{commit.file}: shard {commit.shard} is in no plan")
        if commit.arithmetic not in arithmetic:
            result.problems.append(f"{commit.file}: the ledger does not say what arithmetic {commit.arithmetic!r} is")
        if listed is not None and generation in finished:
            result.problems += listed.differences(commit, generation, planned.url(commit.shard))
        if on_progress is not None:
            on_progress(result.files, num_files)

    _check_parts(storage, result, generations, shards_in_parts)
    for manifest in manifests:
        earlier = [state for state in states if state.generation <= manifest.summary.generation]
        result.problems += _summary_problems(job, manifest, earlier)
        result.problems += _changed_problems(manifest, manifests[-1])
    _account_for_shards(result, states, planned, committed)
    _account_for_files(storage, result, recorded_names, states)
    return result


# --- the identity of the dataset


def _job_problems(storage: Storage, job: Job, storage_options: Mapping[str, Any] | None) -> list[str]:
    problems = []
    if fingerprint(job.fingerprint_fields) != job.fingerprint:
        problems.append("job.json: the fingerprint is not that of the settings beside it")
    if hashlib.sha256(read_plan_bytes(storage, 0)).hexdigest() != job.plan_sha256:
        problems.append(f"{plan_name(0)}: not the plan that the job began with (its SHA-256 differs from job.json's)")
    # The stub encoder of tests and benchmarks has no weights.
    if job.tokenizer.folder:
        try:
            checkpoint = read_checkpoint(storage.url_of(job.tokenizer.folder), storage_options=storage_options)
            if checkpoint.weight_sha256() != job.tokenizer.weight_sha256:
                problems.append(f"{job.tokenizer.folder}: not the weights that made the tokens (their hash differs)")
        except CheckpointError as error:
            problems.append(f"{job.tokenizer.folder}: the tokenizer's copy cannot be used: {error}")
    return problems


def _read_records(storage: Storage, job: Job, generations: list[int], result: Verification) -> dict[int, int]:
    """The part that commits of each generation are; what is wrong with its record is a problem."""
    parts = {}
    for generation in generations:
        record = read_generation(storage, job, generation)
        parts[generation] = record.part
        if generation > 0 and hashlib.sha256(read_plan_bytes(storage, generation)).hexdigest() != record.plan_sha256:
            result.problems.append(
                f"{plan_name(generation)}: not the plan that the generation began with (its SHA-256 differs from that "
                f"in {generation_name(generation)})"
            )
    return parts


def _read_manifests(storage: Storage, generations: list[int], result: Verification) -> list[Manifest]:
    """The manifests of finished generations; empty when the newest is damaged."""
    manifests = []
    for generation in generations:
        try:
            manifest = read_manifest(storage, generation)
            assert manifest is not None
            manifests.append(manifest)
        except BsqError as error:
            result.problems.append(str(error))
    return manifests if manifests and manifests[-1].summary.generation == generations[-1] else []


def _read_plans(storage: Storage, generations: list[int], result: Verification) -> Plan:
    tables = [read_plan(storage, generation) for generation in generations]
    for generation, table in zip(generations, tables, strict=True):
        if len(pc.unique(table["shard"])) != len(table):
            result.problems.append(f"{plan_name(generation)}: a shard number occurs twice")
    return Plan(tables)


# --- the manifest


class _ManifestRows:
    """Rows of a manifest by (shard, part)."""

    def __init__(self, manifest: Manifest) -> None:
        self._table = manifest.table.combine_chunks()
        # Parts of one shard are few, so both numbers fit one integer.
        keys = self._table["shard"].to_numpy() << 16 | self._table["part"].to_numpy()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def differences(self, commit: Commit, generation: int, url: str) -> list[str]:
        key = commit.shard << 16 | commit.part
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return [f"{commit.file}: it is committed, but the manifest does not list it"]
        listed = self._table.slice(int(self._order[place]), 1).to_pylist()[0]
        (recorded,) = manifest_table([(commit, url, generation)]).to_pylist()
        return [
            f"{commit.file}: the manifest says {name} {listed[name]!r}, the ledger {recorded[name]!r}"
            for name in recorded
            if name != "first_row" and listed[name] != recorded[name]
        ]


def _summary_problems(job: Job, manifest: Manifest, states: list[LedgerState]) -> list[str]:
    summary, table = manifest.summary, manifest.table
    given_up = _given_up(states)
    name = f"manifest/{summary.generation:04d}.json"
    expected: dict[str, object] = {
        "fingerprint": job.fingerprint,
        "files": len(table),
        "rows": _sum(table["rows"]),
        "tokens": _sum(table["tokens"]),
        "bytes": _sum(table["bytes"]),
        "bits": job.tokenizer.bits,
        "group_size": job.tokenizer.group_size,
        "grid": tuple(job.tokenizer.grid),
        "views": job.spec.preprocess.views,
        "failed_shards": len(given_up),
        "first_failed_shards": sorted(given_up)[:1000],
        "complete": not given_up,
    } | dataclasses.asdict(count_samples(table))
    problems = []
    num_committed = sum(state.totals.commits for state in states)
    if len(table) != num_committed:
        problems.append(f"{name}: it lists {len(table):,} token files, the ledger {num_committed:,}")
    problems += [
        f"{name}: {field_name} is {getattr(summary, field_name)!r}, but the records give {value!r}"
        for field_name, value in expected.items()
        if getattr(summary, field_name) != value
    ]
    order = list(zip(table["shard"].to_pylist(), table["part"].to_pylist(), strict=True))
    if any(first >= second for first, second in itertools.pairwise(order)):
        problems.append(f"manifest/{summary.generation:04d}.parquet: token files are not in (shard, part) order")
    rows = table["rows"].to_numpy()
    if not np.array_equal(table["first_row"].to_numpy(), np.cumsum(rows) - rows):
        problems.append(f"manifest/{summary.generation:04d}.parquet: first_row is not the running sum of rows")
    return problems


def _changed_problems(manifest: Manifest, newest: Manifest) -> list[str]:
    """What an earlier manifest says that the newest does not repeat: a generation only adds."""
    generation = manifest.summary.generation
    repeated = newest.table.filter(pc.less_equal(newest.table["generation"], generation))
    if manifest.table.drop_columns("first_row").equals(repeated.drop_columns("first_row")):
        return []
    return [f"manifest/{generation:04d}.parquet: a later manifest does not list the same files for its generations"]


def _given_up(states: list[LedgerState]) -> set[int]:
    """Shards that were given up and that no generation so far has committed."""
    tried = {shard for state in states for shard in state.given_up}
    return {shard for shard in tried if not any((shard, 0) in state.committed for state in states)}


# --- nothing missing, nothing left over


def _check_parts(storage: Storage, result: Verification, generations: list[int], shards: set[int]) -> None:
    """Hold the parts of each shard that has several against each other; the last speaks for the shard."""
    parts: dict[int, list[Commit]] = {}
    for generation in generations if shards else []:
        for commit in iter_commits(storage, generation):
            if commit.shard in shards:
                parts.setdefault(commit.shard, []).append(commit)
    for commits in parts.values():
        commits.sort(key=lambda commit: commit.part)
        result.problems += check_shard_parts(storage, commits)
        result.samples -= sum(commit.samples for commit in commits[:-1])
        result.failed -= sum(commit.failed for commit in commits[:-1])


def _account_for_shards(
    result: Verification, states: list[LedgerState], planned: Plan, committed: CommittedParts
) -> None:
    given_up = _given_up(states)
    numbers = planned.shards.tolist()
    missing = [shard for shard in numbers if (shard, 0) not in committed and shard not in given_up]
    if given_up:
        were = "shard was" if len(given_up) == 1 else "shards were"
        result.notes.append(f"{len(given_up):,} {were} given up: {_first_few(sorted(given_up))}.")
    if missing and result.finished:
        are = "shard of the plan is" if len(missing) == 1 else "shards of the plan are"
        result.problems.append(f"{len(missing):,} {are} neither committed nor given up: {_first_few(missing)}")
    elif not result.finished:
        left = f"{len(missing):,} shards are still to be tokenized" if missing else "only the manifest is missing"
        result.notes.append(f"Not finished: {left}. `bsq resume` goes on; what is committed was checked.")


def _account_for_files(storage: Storage, result: Verification, recorded: set[str], states: list[LedgerState]) -> None:
    late = {commit.file for state in states for commit in state.ignored}
    folders = ("tokens", "failures")
    there = [f"{folder}/{name}" for folder in folders for name in storage.list(folder, recursive=True)]
    orphans = [name for name in there if name not in recorded]
    temporaries = _temporaries(storage)
    for kind, names in (("belongs to no record", orphans), ("is a temporary that was left behind", temporaries)):
        if not names:
            continue
        if result.finished:
            result.problems += [
                f"{name}: {'a second commit of its shard, not swept' if name in late else kind}" for name in names
            ]
        else:
            result.notes.append(f"{len(names):,} files, the first {names[0]}: each {kind}; a resume sees to it.")


def _temporaries(storage: Storage) -> list[str]:
    """Temporaries on a local disk; object stores have none."""
    if not storage.is_local:
        return []
    root = Path(storage.url_of("").removeprefix("file://").removeprefix("local://")).expanduser()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob(".*.tmp"))


def _first_few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5:,} more"


def _in_threads(
    items: Iterator[tuple[int, Commit]], check: Callable[[Commit], CheckedFiles]
) -> Iterator[tuple[tuple[int, Commit], CheckedFiles]]:
    """Check items a few at a time and yield the answers in order."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        waiting: deque[tuple[tuple[int, Commit], Future[CheckedFiles]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(check, item[1])))
            if len(waiting) == FILES_AT_ONCE:
                first, answer = waiting.popleft()
                yield first, answer.result()
        for first, answer in waiting:
            yield first, answer.result()


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)
