"""Ends a generation: the manifest from the ledger's records, then the sweep of what no record names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from jobs.begin import created_by
from pipeline.dataset_files import (
    LedgerState,
    iter_commits,
    list_generations,
    manifest_summary_name,
    manifest_table_name,
    read_plan,
)
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import LeaseLost
from schemas.job import Job
from schemas.ledger import Commit
from schemas.manifest import ManifestSummary, manifest_table, serialise_manifest

MAX_FAILED_SHARDS_NAMED = 1000


def write_manifest(storage: Storage, job: Job, ledger: LedgerState, generation: int) -> ManifestSummary:
    """Write the manifest of a generation whose every shard is committed or given up; its .json last, create-only.

    Raises LeaseLost when another driver wrote a different one."""
    plan = read_plan(storage, generation)
    urls, first_shard = plan["url"], plan["shard"][0].as_py()
    table = manifest_table(
        (commit, urls[commit.shard - first_shard].as_py(), generation) for commit in iter_commits(storage, generation)
    )
    data = serialise_manifest(table)
    failed_shards = sorted(ledger.given_up)
    summary = ManifestSummary(
        fingerprint=job.fingerprint,
        generation=generation,
        files=len(table),
        rows=ledger.totals.rows,
        tokens=ledger.totals.tokens,
        samples=ledger.totals.samples,
        failed=ledger.totals.failed,
        warnings=ledger.totals.warnings,
        failed_shards=len(failed_shards),
        first_failed_shards=failed_shards[:MAX_FAILED_SHARDS_NAMED],
        partial_shards=ledger.totals.partial,
        bytes=ledger.totals.bytes,
        bits=job.tokenizer.bits,
        group_size=job.tokenizer.group_size,
        grid=job.tokenizer.grid,
        views=job.spec.preprocess.views,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        complete=not failed_shards,
        created_by=created_by(),
    )
    reached("before_manifest")
    storage.publish(manifest_table_name(generation), data)
    name = manifest_summary_name(generation)
    summary_data = summary.model_dump_json(indent=1).encode() + b"\n"
    if not storage.create_only(name, summary_data) and storage.read_bytes(name) != summary_data:
        raise LeaseLost(f"{storage.url}: another driver has finished the dataset. See `bsq status`.")
    reached("after_manifest")
    return summary


def sweep(storage: Storage, generation: int) -> int:
    """Remove token files and failure tables that no record names; return how many.  For the holder of the lease."""
    named = {name for commit in iter_commits(storage, generation) for name in _files_of(commit)}
    num_swept = 0
    for folder in ("tokens", "failures"):
        for name in storage.list(folder, recursive=True):
            if f"{folder}/{name}" not in named:
                num_swept += storage.delete(f"{folder}/{name}")
    return num_swept


def is_finished(storage: Storage, generation: int) -> bool:
    """Whether the generation has its manifest."""
    return generation in list_generations(storage)


def _files_of(commit: Commit) -> Iterator[str]:
    yield commit.file
    if commit.failures is not None:
        yield commit.failures.file
