"""Writes one finished shard: failure table first, then the token file, each in one atomic step."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.parquet import PARQUET_ERRORS, open_parquet, read_parquet
from pipeline.rows import ShardRows, rows_to_table
from pipeline.steps import reached
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.failures import POISON, serialise_failures
from schemas.job import Job
from schemas.ledger import Commit, FileRecord, SourceRecord, StageSeconds
from schemas.tokenfile import EncodedTokenFile, TokenFooter, serialise_token_file

SHARDS_PER_FOLDER = 1000
UNKNOWN_ARITHMETIC = "unknown"


def token_file_name(shard: int, part: int, sha256: str) -> str:
    """`tokens/0000/0000042-1f0c9a3e.parquet`; `tokens/0000/0000042.r1-77ab01c2.parquet` for part 1."""
    return f"tokens/{shard // SHARDS_PER_FOLDER:04d}/{_stem(shard, part)}-{sha256[:8]}.parquet"


def failure_table_name(shard: int, part: int, sha256: str) -> str:
    """`failures/0000/0000042-c01d77e0.parquet`; `failures/0000/0000042.r1-5d21e9aa.parquet` for part 1."""
    return f"failures/{shard // SHARDS_PER_FOLDER:04d}/{_stem(shard, part)}-{sha256[:8]}.parquet"


def _stem(shard: int, part: int) -> str:
    return f"{shard:07d}.r{part}" if part else f"{shard:07d}"


def publish_shard(storage: Storage, job: Job, shard: ShardRows, *, arithmetic: str, worker: str) -> Commit:
    """Write the files of a complete shard and return what the ledger shall record.

    Raises OutputNotWritable or OutputFull."""
    began = time.monotonic()
    rows = shard.ordered_rows()
    failures = shard.ordered_failures()
    failed_positions = {item.position for item in failures if item.severity == "failed" and item.key is not None}
    failure_record = None
    reached("before_failures")
    if failures:
        identity = {"bsqtok.fingerprint": job.fingerprint, "bsqtok.shard": str(shard.shard)}
        data = serialise_failures(failures, identity)
        sha256 = hashlib.sha256(data).hexdigest()
        failures_name = failure_table_name(shard.shard, shard.part, sha256)
        failure_record = FileRecord(file=failures_name, bytes=len(data), sha256=sha256)
        storage.publish(failure_record.file, data)
    table = rows_to_table(rows, job.spec.carry)
    footer = TokenFooter(
        fingerprint=job.fingerprint,
        shard=shard.shard,
        part=shard.part,
        bits=job.tokenizer.bits,
        group_size=job.tokenizer.group_size,
        grid=job.tokenizer.grid,
        views=job.spec.preprocess.views,
        samples=shard.num_samples,
        failed=len(failed_positions),
        failures_sha256=failure_record.sha256 if failure_record else "",
        source_bytes=shard.source_bytes,
        source_etag=shard.source_etag,
        partial=shard.partial,
    )
    encoded = serialise_token_file(table, footer)
    sha256 = hashlib.sha256(encoded.data).hexdigest()
    name = token_file_name(shard.shard, shard.part, sha256)
    reached("before_tokens")
    storage.publish(name, encoded.data, on_step=reached)
    reached("after_publish")
    wall = time.monotonic() - shard.began
    return _commit(
        table,
        encoded,
        footer,
        attempt=shard.attempt,
        name=name,
        sha256=sha256,
        warnings=sum(item.severity == "warning" for item in failures),
        poison=sum(item.error in POISON for item in failures),
        num_retries=shard.num_retries,
        failures=failure_record,
        arithmetic=arithmetic,
        worker=worker,
        seconds=StageSeconds(
            read=round(shard.seconds.read, 3),
            decode=round(shard.seconds.decode, 3),
            encode=round(shard.seconds.encode, 3),
            write=round(time.monotonic() - began, 3),
            wall=round(wall, 3),
        ),
    )


def find_published(
    storage: Storage,
    job: Job,
    *,
    shard: int,
    part: int = 0,
    attempt: int,
    source_bytes: int,
    source_etag: str,
    worker: str,
) -> Commit | None:
    """Return a commit for a token file of `shard` that an earlier worker published without a record of it.

    It is adopted only when its name fits its bytes, its footer carries this fingerprint, shard, part and source, its
    rows add up and its failure table is there."""
    prefix = f"{_stem(shard, part)}-"
    folder = f"tokens/{shard // SHARDS_PER_FOLDER:04d}"
    for file_name in storage.list(folder):
        if not (file_name.startswith(prefix) and file_name.endswith(".parquet")):
            continue
        name = f"{folder}/{file_name}"
        data = storage.read_bytes(name)
        sha256 = hashlib.sha256(data).hexdigest()
        if token_file_name(shard, part, sha256) != name:
            continue
        try:
            file = open_parquet(data)
            footer = TokenFooter.from_metadata(file.metadata.metadata)
            table = file.read(use_threads=False)
        except (BsqError, *PARQUET_ERRORS):
            continue
        expected = (job.fingerprint, shard, part, source_bytes, source_etag)
        if (footer.fingerprint, footer.shard, footer.part, footer.source_bytes, footer.source_etag) != expected:
            continue
        failures, warnings, poison = None, 0, 0
        if footer.failures_sha256:
            failures_name = failure_table_name(shard, part, footer.failures_sha256)
            if not storage.exists(failures_name):
                continue
            failure_data = storage.read_bytes(failures_name)
            if hashlib.sha256(failure_data).hexdigest() != footer.failures_sha256:
                continue
            found = read_parquet(failure_data, ["severity", "error"])
            warnings = found["severity"].to_pylist().count("warning")
            poison = sum(error in POISON for error in found["error"].to_pylist())
            failures = FileRecord(file=failures_name, bytes=len(failure_data), sha256=footer.failures_sha256)
        num_positions = pc.count_distinct(table["position"]).as_py()
        # A later part holds only the rows that the parts before it lack.
        fewest = footer.samples - footer.failed if part == 0 else 0
        if not fewest <= num_positions <= footer.samples:
            continue
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        column = table.schema.names.index("tokens")
        return _commit(
            table,
            EncodedTokenFile(
                data=data,
                row_groups=[group.num_rows for group in groups],
                tokens_offset=[group.column(column).data_page_offset for group in groups],
            ),
            footer,
            attempt=attempt,
            name=name,
            sha256=sha256,
            warnings=warnings,
            poison=poison,
            failures=failures,
            arithmetic=UNKNOWN_ARITHMETIC,
            worker=worker,
            seconds=StageSeconds(),
        )
    return None


def _commit(
    table: pa.Table,
    encoded: EncodedTokenFile,
    footer: TokenFooter,
    *,
    attempt: int,
    name: str,
    sha256: str,
    warnings: int,
    poison: int,
    failures: FileRecord | None,
    arithmetic: str,
    worker: str,
    seconds: StageSeconds,
    num_retries: int = 0,
) -> Commit:
    frames = pc.min_max(table["frames"]).as_py()
    keys = pc.min_max(table["key"]).as_py()
    num_frames = pc.sum(table["frames"]).as_py() or 0
    return Commit(
        shard=footer.shard,
        part=footer.part,
        attempt=attempt,
        file=name,
        bytes=len(encoded.data),
        sha256=sha256,
        rows=len(table),
        tokens=num_frames * footer.grid[0] * footer.grid[1],
        samples=footer.samples,
        failed=footer.failed,
        warnings=warnings,
        poison=poison,
        partial=footer.partial,
        min_frames=frames["min"] or 0,
        max_frames=frames["max"] or 0,
        min_key=keys["min"],
        max_key=keys["max"],
        row_groups=encoded.row_groups,
        tokens_offset=encoded.tokens_offset,
        failures=failures,
        source=SourceRecord(bytes=footer.source_bytes, etag=footer.source_etag, num_retries=num_retries),
        arithmetic=arithmetic,
        seconds=seconds,
        worker=worker,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
