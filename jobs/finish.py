"""Ends a generation: the manifest from the ledger's records, then the sweep of what no record names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.begin import created_by
from pipeline.dataset_files import (
    iter_commits,
    list_generations,
    manifest_summary_name,
    manifest_table_name,
    read_manifest,
)
from pipeline.generations import list_begun, read_begun_plan, read_generation, read_plans
from pipeline.publish import SHARDS_PER_FOLDER
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import LeaseLost
from schemas.job import Job
from schemas.ledger import Commit
from schemas.manifest import ManifestSummary, count_samples, manifest_table, merge_manifests, serialise_manifest

MAX_FAILED_SHARDS_NAMED = 1000


def write_manifest(storage: Storage, job: Job, generation: int) -> ManifestSummary:
    """Write the manifest of a generation whose every shard is committed or given up; its .json last, create-only.

    It lists what the generation before had, too.  Raises LeaseLost when another driver wrote a different one, BsqError
    when the plan is not the one that the generation was begun with."""
    plan = read_begun_plan(storage, read_generation(storage, job, generation))
    poison: dict[int, int] = {}
    before = read_manifest(storage, generation - 1) if generation > 0 else None
    if before is not None:
        poison |= before.summary.poison
    table = manifest_table(
        (commit, plan.url(commit.shard), generation)
        for commit in _noting_poison(iter_commits(storage, generation), poison)
    )
    if before is not None:
        table = merge_manifests(before.table, table)
    data = serialise_manifest(table)
    counts = count_samples(table)
    failed_shards = find_failed_shards(storage, generation, table)
    summary = ManifestSummary(
        fingerprint=job.fingerprint,
        generation=generation,
        files=len(table),
        parts=counts.parts,
        rows=_sum(table["rows"]),
        tokens=_sum(table["tokens"]),
        samples=counts.samples,
        failed=counts.failed,
        warnings=counts.warnings,
        poison=dict(sorted(poison.items())),
        failed_shards=len(failed_shards),
        first_failed_shards=failed_shards[:MAX_FAILED_SHARDS_NAMED],
        partial_shards=counts.partial_shards,
        bytes=_sum(table["bytes"]),
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


def _noting_poison(commits: Iterable[Commit], poison: dict[int, int]) -> Iterator[Commit]:
    """Pass commits on, and bring up to date what is known of their shards."""
    for commit in commits:
        poison.pop(commit.shard, None)
        if commit.poison:
            poison[commit.shard] = commit.poison
        yield commit


def find_failed_shards(storage: Storage, generation: int, table: pa.Table) -> list[int]:
    """Shards of the plans up to a finished generation that its manifest does not list: those that were given up."""
    planned = read_plans(storage, [number for number in list_begun(storage) if number <= generation]).shards
    failed: list[int] = np.setdiff1d(planned, table["shard"].to_numpy()).tolist()
    return failed


def sweep(storage: Storage, generation: int) -> int:
    """Remove token files and failure tables that no record names; return how many.  For the holder of the lease, when
    the generation is the newest one and finished."""
    manifest = read_manifest(storage, generation, ["file", "failures_file"])
    assert manifest is not None
    named = {name for column in ("file", "failures_file") for name in manifest.table[column].to_pylist()}
    num_swept = 0
    for folder in ("tokens", "failures"):
        for name in storage.list(folder, recursive=True):
            if f"{folder}/{name}" not in named:
                num_swept += storage.delete(f"{folder}/{name}")
    return num_swept


def sweep_shards(storage: Storage, shards: Sequence[int]) -> None:
    """Remove every token file and failure table of shards of which nothing is committed, before they are made anew."""
    wanted = set(shards)
    for folder in ("tokens", "failures"):
        for group in sorted({shard // SHARDS_PER_FOLDER for shard in wanted}):
            for name in storage.list(f"{folder}/{group:04d}"):
                number = re.match(r"\d+", name)
                if number is not None and int(number[0]) in wanted:
                    storage.delete(f"{folder}/{group:04d}/{name}")


def is_finished(storage: Storage, generation: int) -> bool:
    """Whether the generation has its manifest."""
    return generation in list_generations(storage)


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)
