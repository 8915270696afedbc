"""All commits of a dataset as one table, finished or not: a record for each token file, without their objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset_files import CommittedParts, iter_commits, list_generations, read_ledger
from pipeline.generations import Plan, list_begun, read_plans
from pipeline.storage import Storage
from schemas.ledger import Attempt, Commit, GivenUp

CHUNK_ROWS = 10_000

COMMIT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("part", pa.int32()),
        pa.field("generation", pa.int32()),
        pa.field("attempt", pa.int32()),
        pa.field("file", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("tokens", pa.int64()),
        pa.field("samples", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("warnings", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("partial", pa.bool_()),
        pa.field("failures_file", pa.string()),
        pa.field("source_bytes", pa.int64()),
        pa.field("arithmetic", pa.string()),
        pa.field("worker", pa.string()),
        pa.field("at", pa.float64()),
        *(pa.field(name, pa.float64()) for name in ("read", "decode", "encode", "write", "wall")),
    ]
)
"""`at` in seconds since the epoch, null where it is no date; the stages in seconds, all zero for a file that was found
published and adopted."""


@dataclass(slots=True)
class CommitTable:
    """What ledgers and plans say of a dataset."""

    table: pa.Table
    """One row for each committed token file, columns of COMMIT_SCHEMA, in (shard, part) order."""
    plan: Plan
    """Every shard that was asked for, and its URL without credentials."""
    generations: list[int]
    """Those begun."""
    finished: bool
    """Each of them has its manifest."""
    arithmetic: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    """Failed attempts by shard."""
    given_up: dict[int, GivenUp] = field(default_factory=dict)
    num_segments: int = 0
    """Ledger segments read."""

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers, nulls as NaN."""
        return np.asarray(self.table[name].to_numpy())


def read_commit_table(storage: Storage) -> CommitTable:
    """Read all ledgers and plans of a dataset; neither token files nor failure tables are opened or listed.

    Raises BsqError when a plan or ledger is damaged."""
    generations = list_begun(storage)
    finished = set(generations) <= set(list_generations(storage))
    found = CommitTable(COMMIT_SCHEMA.empty_table(), read_plans(storage, generations), generations, finished)
    tables = [found.table]
    committed: list[CommittedParts] = []
    for generation in generations:
        ledger = read_ledger(storage, generation, keep_commits=False)
        found.num_segments += len(ledger.segments)
        found.arithmetic |= ledger.arithmetic
        for shard, attempts in ledger.failed_attempts.items():
            found.attempts.setdefault(shard, []).extend(attempts)
        # A later generation may have won a shard that an earlier one gave up, and may give up trying for the rest of
        # one that an earlier one committed.
        committed.append(ledger.committed)
        tried = found.given_up | ledger.given_up
        found.given_up = {
            shard: record for shard, record in tried.items() if not any((shard, 0) in each for each in committed)
        }
        commits = iter_commits(storage, generation)
        while rows := [_row(commit, generation) for commit in islice(commits, CHUNK_ROWS)]:
            tables.append(pa.Table.from_pylist(rows, schema=COMMIT_SCHEMA))
    found.table = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("part", "ascending")]).combine_chunks()
    return found


def column_sum(table: pa.Table, name: str) -> int:
    """Sum of a column of integers; 0 for none."""
    return int(pc.sum(table[name]).as_py() or 0)


def _row(commit: Commit, generation: int) -> dict[str, Any]:
    try:
        at = datetime.fromisoformat(commit.at).timestamp()
    except ValueError:
        at = None
    row = {name: getattr(commit, name) for name in ("shard", "part", "attempt", "file", "rows", "tokens", "samples")}
    row |= {name: getattr(commit, name) for name in ("failed", "warnings", "bytes", "partial", "arithmetic", "worker")}
    row |= commit.seconds.model_dump()
    return row | {
        "generation": generation,
        "failures_file": commit.failures.file if commit.failures else None,
        "source_bytes": commit.source.bytes,
        "at": at,
    }
