"""What a reader needs to open a finished dataset."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from schemas.ledger import Commit
from schemas.tokenfile import FORMAT_VERSION

CHUNK_ROWS = 1000

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("failed", pa.int64(), nullable=False),
        pa.field("warnings", pa.int64(), nullable=False),
        pa.field("partial", pa.bool_(), nullable=False),
        pa.field("min_frames", pa.int32(), nullable=False),
        pa.field("max_frames", pa.int32(), nullable=False),
        pa.field("min_key", pa.string()),
        pa.field("max_key", pa.string()),
        pa.field("row_groups", pa.list_(pa.int64()), nullable=False),
        pa.field("tokens_offset", pa.list_(pa.int64()), nullable=False),
        pa.field("failures_file", pa.string()),
        pa.field("failures_bytes", pa.int64()),
        pa.field("failures_sha256", pa.string()),
        pa.field("source_bytes", pa.int64(), nullable=False),
        pa.field("source_etag", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("arithmetic", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("at", pa.string(), nullable=False),
    ]
)
_STORED = pa.schema([field for field in MANIFEST_SCHEMA if field.name != "first_row"])


class ManifestSummary(BaseModel):
    """`manifest/GGGG.json`: a dataset exists when this file does."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str = "bsqtok"
    format_version: int = FORMAT_VERSION
    fingerprint: str
    generation: int
    files: int
    parts: int = 0
    """Those of `files` that hold rows won back later; the others are one for each committed shard."""
    rows: int
    tokens: int
    samples: int
    failed: int
    """Samples that failed, less those that were won back."""
    warnings: int
    poison: dict[int, int] = {}
    """How many of `failed` ended or hung their decoder, for each shard that has any."""
    failed_shards: int
    first_failed_shards: list[int]
    """The first 1,000 shards that were given up."""
    partial_shards: int
    bytes: int
    bits: int
    group_size: int
    grid: tuple[int, int]
    views: int
    manifest_sha256: str
    complete: bool
    """No shard was given up."""
    created_by: str


def manifest_table(commits: Iterable[tuple[Commit, str, int]]) -> pa.Table:
    """Build the manifest from (commit, url, generation) in any order; rows come out by (shard, part)."""
    batches = []
    remaining = iter(commits)
    # In chunks: a million commits as Python objects would take gigabytes.
    while entries := list(itertools.islice(remaining, CHUNK_ROWS)):
        batches.append(_manifest_rows(entries))
    columns = _columns_of(pa.Table.from_batches(batches, schema=_STORED))
    batches.clear()
    return _ordered(columns)


def merge_manifests(earlier: pa.Table, added: pa.Table) -> pa.Table:
    """Join the manifest of the generation before with what a generation added."""
    return _ordered(_columns_of(pa.concat_tables([earlier, added]).select(_STORED.names)))


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """Counts of a dataset of which a shard may have several parts."""

    parts: int
    samples: int
    failed: int
    warnings: int
    partial_shards: int


def latest_parts(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows of a manifest are the last part of their shard: these alone say what of it failed."""
    shards = table["shard"].to_numpy()
    return np.append(shards[1:] != shards[:-1], np.ones(min(1, len(shards)), np.bool_))


def count_samples(table: pa.Table) -> SampleCounts:
    """Add up what the last part of each shard says of it."""
    columns = table.select(["samples", "failed", "warnings", "partial"])
    latest = columns.filter(pa.array(latest_parts(table)))
    return SampleCounts(
        parts=len(table) - len(latest),
        samples=pc.sum(latest["samples"]).as_py() or 0,
        failed=pc.sum(latest["failed"]).as_py() or 0,
        warnings=pc.sum(latest["warnings"]).as_py() or 0,
        partial_shards=pc.sum(latest["partial"]).as_py() or 0,
    )


def _columns_of(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.schema.names, table.columns, strict=True))


def _ordered(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    """The table by (shard, part), with `first_row`; takes `columns` apart."""
    keys = pa.table({"shard": columns["shard"], "part": columns["part"]})
    order = pc.sort_indices(keys, sort_keys=[("shard", "ascending"), ("part", "ascending")])
    # One column after the other, so that no more than one is there twice.
    for name in columns:
        columns[name] = columns[name].take(order)
    columns["first_row"] = pc.subtract(pc.cumulative_sum(columns["rows"]), columns["rows"])
    return pa.table([columns[field.name] for field in MANIFEST_SCHEMA], schema=MANIFEST_SCHEMA)


def _manifest_rows(entries: Sequence[tuple[Commit, str, int]]) -> pa.RecordBatch:
    commits = [commit for commit, _, _ in entries]
    failures = [commit.failures for commit in commits]
    columns: dict[str, list[object]] = {
        "url": [url for _, url, _ in entries],
        "generation": [generation for _, _, generation in entries],
        "failures_file": [file.file if file else None for file in failures],
        "failures_bytes": [file.bytes if file else None for file in failures],
        "failures_sha256": [file.sha256 if file else None for file in failures],
        "source_bytes": [commit.source.bytes for commit in commits],
        "source_etag": [commit.source.etag for commit in commits],
    }
    for name in _STORED.names:
        if name not in columns:
            columns[name] = [getattr(commit, name) for commit in commits]
    arrays = [pa.array(columns[field.name], field.type) for field in _STORED]
    return pa.RecordBatch.from_arrays(arrays, schema=_STORED)


def serialise_manifest(table: pa.Table) -> bytes:
    """The bytes of `manifest/GGGG.parquet`."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", version="2.6", write_page_checksum=True, row_group_size=1 << 16)
    return sink.getvalue()
