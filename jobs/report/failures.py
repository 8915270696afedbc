"""What failed: samples by class with examples, shards that lost unusually many, attempts, and shards given up."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.commit_table import CommitTable
from pipeline.dataset_files import StoredFile
from pipeline.parquet import PARQUET_ERRORS, read_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.manifest import count_samples, latest_parts

MAX_TABLES = 256
"""Failure tables that are read."""
FULLEST_TABLES = 64
"""Of those, the ones with most rows; the rest are taken by chance and stand for those that are not read."""
TABLES_AT_ONCE = 8
EXAMPLES = 3
MAX_SHARDS = 20
UNUSUAL_SHARE = 0.05
"""A shard that loses less than this is never unusual."""
UNUSUAL_SAMPLES = 3
UNUSUAL_FACTOR = 5.0
"""Of the share that all others together lose."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a failure table."""

    shard: int
    key: str | None
    """None for the archive itself."""
    member: str | None
    clip: int | None
    message: str


@dataclass(slots=True)
class FailureClass:
    """Samples that failed (or were warned about) in one way."""

    severity: str
    stage: str
    error: str
    samples: float = 0.0
    """Estimated where not every table was read."""
    shards: int = 0
    """Of the tables read."""
    fullest_shard: int = 0
    fullest_samples: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LossyShard:
    """A shard that lost an unusual share of its samples."""

    shard: int
    url: str
    samples: int
    failed: int

    @property
    def share(self) -> float:
        return self.failed / self.samples


@dataclass(frozen=True, slots=True)
class TriedShard:
    """A shard that was tried more than once, or given up."""

    shard: int
    url: str
    attempts: int
    """Failed ones."""
    given_up: bool
    messages: list[tuple[int, str, str]]
    """(attempt, class, message) of the last failed attempts."""


@dataclass(slots=True)
class Failures:
    """Everything that went wrong."""

    samples: int
    failed: int
    """Samples, net of what later generations won back."""
    warnings: int
    partial: list[int]
    """Shards whose archive was damaged; the first of them."""
    num_partial: int
    classes: list[FailureClass]
    """The commonest first."""
    tables_read: int
    tables: int
    unreadable: list[str]
    lossy: list[LossyShard]
    """The worst first."""
    attempts: Counter[int]
    """Committed shards by how many attempts they took."""
    attempt_errors: Counter[str]
    """Failed attempts by class."""
    tried: list[TriedShard]
    """Given up first, then the most tried."""
    num_given_up: int
    num_retried: int
    """Committed shards that took more than one."""

    @property
    def exact(self) -> bool:
        """Whether every failure table was read."""
        return self.tables_read == self.tables


def collect_failures(storage: Storage, commits: CommitTable, seed: int) -> Failures:
    """Read failure tables, at most MAX_TABLES, and the attempts in the ledger."""
    newest = latest_parts(commits.table)
    counts = count_samples(commits.table)
    partial = commits.column("shard")[newest & commits.column("partial").astype(bool)]
    classes, num_read, num_tables, unreadable = _classes(storage, commits, newest, seed)
    tried = _tried(commits)
    committed = set(np.intersect1d(commits.column("shard"), np.asarray(list(commits.attempts), np.int64)).tolist())
    num_attempts = Counter({1: int(newest.sum()) - len(committed)})
    num_attempts.update(1 + len(commits.attempts[shard]) for shard in committed)
    return Failures(
        samples=counts.samples,
        failed=counts.failed,
        warnings=counts.warnings,
        partial=partial[:MAX_SHARDS].tolist(),
        num_partial=counts.partial_shards,
        classes=classes,
        tables_read=num_read,
        tables=num_tables,
        unreadable=unreadable,
        lossy=_lossy(commits, newest),
        attempts=+num_attempts,
        attempt_errors=Counter(attempt.error for attempts in commits.attempts.values() for attempt in attempts),
        tried=tried[:MAX_SHARDS],
        num_given_up=len(commits.given_up),
        num_retried=len(committed),
    )


def _lossy(commits: CommitTable, newest: npt.NDArray[np.bool_]) -> list[LossyShard]:
    shards = commits.column("shard")[newest]
    samples, failed = commits.column("samples")[newest].astype(np.float64), commits.column("failed")[newest]
    share = failed / np.maximum(samples, 1)
    others = (failed.sum() - failed) / np.maximum(samples.sum() - samples, 1)
    unusual = (share >= UNUSUAL_SHARE) & (share > UNUSUAL_FACTOR * others) & (failed >= UNUSUAL_SAMPLES)
    places = np.flatnonzero(unusual)[np.argsort(-share[unusual], kind="stable")][:MAX_SHARDS]
    return [
        LossyShard(int(shards[place]), commits.plan.url(int(shards[place])), int(samples[place]), int(failed[place]))
        for place in places
    ]


def _classes(
    storage: Storage, commits: CommitTable, newest: npt.NDArray[np.bool_], seed: int
) -> tuple[list[FailureClass], int, int, list[str]]:
    has_table = newest & ~np.asarray(commits.table["failures_file"].is_null())
    places = np.flatnonzero(has_table)
    weights = (commits.column("failed") + commits.column("warnings"))[places]
    fullest = places[np.argsort(-weights, kind="stable")][: FULLEST_TABLES if len(places) > MAX_TABLES else MAX_TABLES]
    others = np.setdiff1d(places, fullest)
    drawn = random.Random(seed).sample(others.tolist(), min(MAX_TABLES - len(fullest), len(others)))
    all_weights = commits.column("failed") + commits.column("warnings")
    drawn_weight = int(all_weights[drawn].sum()) if drawn else 0
    scale = float(all_weights[others].sum()) / drawn_weight if drawn_weight else 1.0

    names = commits.table["failures_file"]
    chosen = [*fullest.tolist(), *sorted(drawn)]
    with ThreadPoolExecutor(TABLES_AT_ONCE) as pool:
        tables = list(pool.map(lambda place: _read_table(storage, names[place].as_py()), chosen))
    classes: dict[tuple[str, str, str], FailureClass] = {}
    for number, (place, table) in enumerate(zip(chosen, tables, strict=True)):
        if table is not None:
            shard = int(commits.table["shard"][place].as_py())
            _count(classes, table, shard, 1.0 if number < len(fullest) else scale)
    unreadable = [names[place].as_py() for place, table in zip(chosen, tables, strict=True) if table is None]
    ordered = sorted(classes.values(), key=lambda each: (each.severity != "failed", -each.samples, each.error))
    return ordered, len(chosen) - len(unreadable), len(places), unreadable


def _read_table(storage: Storage, name: str) -> pa.Table | None:
    columns = ["key", "member", "position", "clip", "stage", "error", "message", "severity"]
    try:
        with StoredFile(storage, name) as stored:
            return read_parquet(stored, columns)
    except (BsqError, *PARQUET_ERRORS):
        return None


def _count(classes: dict[tuple[str, str, str], FailureClass], table: pa.Table, shard: int, scale: float) -> None:
    kinds = ["severity", "stage", "error"]
    # A video with several bad clips is one sample; an archive has no position and counts once.
    counted = table.append_column("sample", pc.fill_null(table["position"], -1))
    for row in counted.group_by(kinds).aggregate([("sample", "count_distinct")]).to_pylist():
        kind = (row["severity"], row["stage"], row["error"])
        found = classes.setdefault(kind, FailureClass(*kind))
        number = row["sample_count_distinct"]
        found.samples += scale * number
        found.shards += 1
        if number > found.fullest_samples:
            found.fullest_shard, found.fullest_samples = shard, number
        if len(found.examples) < EXAMPLES:
            same = pc.and_(pc.equal(table["error"], row["error"]), pc.equal(table["severity"], row["severity"]))
            # From several shards where there are several.
            most = 1 if found.examples else EXAMPLES - 1
            for example in table.filter(same).slice(0, most).to_pylist()[: EXAMPLES - len(found.examples)]:
                values = {name: example[name] for name in ("key", "member", "clip", "message")}
                found.examples.append(Example(shard=shard, **values))


def _tried(commits: CommitTable) -> list[TriedShard]:
    shards = set(commits.attempts) | set(commits.given_up)

    def urgency(shard: int) -> tuple[bool, int, int]:
        return shard not in commits.given_up, -len(commits.attempts.get(shard, ())), shard

    found = []
    for shard in sorted(shards, key=urgency)[:MAX_SHARDS]:
        attempts = commits.attempts.get(shard, [])
        messages = [(each.attempt, each.error, each.message) for each in attempts[-EXAMPLES:]]
        given_up = commits.given_up.get(shard)
        if given_up is not None and not messages:
            messages = [(given_up.attempts, given_up.error, given_up.message)]
        count = max(len(attempts), given_up.attempts if given_up else 0)
        found.append(TriedShard(shard, commits.plan.url(shard), count, given_up is not None, messages))
    return found
