"""Checks a published token file and its failure table against the record of their commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.parquet import PARQUET_ERRORS, open_parquet, read_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.failures import FAILURE_SCHEMA
from schemas.job import Job
from schemas.ledger import Commit
from schemas.tokenfile import TokenFooter, row_group_bounds, token_schema


@dataclass(slots=True)
class CheckedFiles:
    """What was found in the files of one commit."""

    problems: list[str]
    """One line each, with the name of the file."""
    bytes: int = 0
    """Bytes of those files that were there and unchanged."""


def check_committed_files(storage: Storage, job: Job, commit: Commit) -> CheckedFiles:
    """Read the token file and the failure table of a commit and compare them with it, byte by byte and row by row.

    Raises OutputError when the storage fails; what is missing or wrong is a problem in the answer."""
    found = CheckedFiles([])
    positions: npt.NDArray[np.int64] | None = None
    failed_positions: npt.NDArray[np.int64] | None = np.zeros(0, np.int64)

    data = _read_recorded(storage, commit.file, commit.bytes, commit.sha256, found)
    if data is not None:
        problems, positions = _token_file_problems(data, job, commit)
        found.problems += [f"{commit.file}: {problem}" for problem in problems]
    if commit.failures is not None:
        failed_positions = None
        record = commit.failures
        data = _read_recorded(storage, record.file, record.bytes, record.sha256, found)
        if data is not None:
            problems, failed_positions = _failure_table_problems(data, job, commit)
            found.problems += [f"{record.file}: {problem}" for problem in problems]
    elif commit.failed or commit.warnings or commit.partial:
        found.problems.append(f"{commit.file}: failures are counted, but no failure table is recorded")
    if positions is not None and failed_positions is not None and commit.part == 0:
        found.problems += _unaccounted_samples(commit, np.union1d(positions, failed_positions))
    return found


def check_shard_parts(storage: Storage, commits: Sequence[Commit]) -> list[str]:
    """Hold the parts of one shard, ascending, against each other: no row twice, every sample in a row or a failure.

    What cannot be read is passed over: `check_committed_files` names it."""
    last = commits[-1]
    if commits[0].part != 0:
        return [f"{last.file}: shard {last.shard} has no part 0"]
    columns = ["position", "clip", "view"]
    try:
        rows = pa.concat_tables([read_parquet(storage.read_bytes(commit.file), columns) for commit in commits])
        failed = np.zeros(0, np.int64)
        if last.failures is not None:
            table = read_parquet(storage.read_bytes(last.failures.file), ["key", "position", "severity"])
            table = table.filter(pc.and_(pc.equal(table["severity"], "failed"), pc.is_valid(table["key"])))
            failed = table["position"].drop_null().to_numpy()
    except (FileNotFoundError, *PARQUET_ERRORS):
        return []
    problems = []
    if len(rows.group_by(columns).aggregate([])) != len(rows):
        problems.append(f"{last.file}: a row of shard {last.shard} is in two of its parts")
    return problems + _unaccounted_samples(last, np.union1d(rows["position"].to_numpy(), failed))


def _unaccounted_samples(commit: Commit, accounted: npt.NDArray[np.int64]) -> list[str]:
    if len(accounted) == commit.samples and (not len(accounted) or accounted[-1] == commit.samples - 1):
        return []
    lost = np.setdiff1d(np.arange(commit.samples), accounted)
    which = f"; position {lost[0]} has neither" if len(lost) else ""
    return [f"{commit.file}: {len(accounted):,} samples have rows or failures, the shard had {commit.samples:,}{which}"]


def _read_recorded(storage: Storage, name: str, num_bytes: int, sha256: str, found: CheckedFiles) -> bytes | None:
    try:
        data = storage.read_bytes(name)
    except FileNotFoundError:
        found.problems.append(f"{name}: the file is gone")
        return None
    if len(data) != num_bytes:
        found.problems.append(f"{name}: {len(data):,} bytes, the ledger says {num_bytes:,}")
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        found.problems.append(f"{name}: its bytes were changed (its SHA-256 is not that of the ledger)")
        return None
    if not PurePosixPath(name).stem.endswith(f"-{sha256[:8]}"):
        found.problems.append(f"{name}: its name does not carry the first digits of its SHA-256, {sha256[:8]}")
    found.bytes += len(data)
    return data


def _token_file_problems(data: bytes, job: Job, commit: Commit) -> tuple[list[str], npt.NDArray[np.int64] | None]:
    """What is wrong with a token file, and the positions of the samples that have rows in it."""
    try:
        file = open_parquet(data, check_pages=True)
        footer = TokenFooter.from_metadata(file.metadata.metadata)
        table = file.read(use_threads=False)
    except (BsqError, *PARQUET_ERRORS) as error:
        return [f"it cannot be read: {error}"], None
    problems = _footer_problems(footer, job, commit)
    expected_schema = token_schema(job.spec.carry)
    if not table.schema.equals(expected_schema):
        problems.append(f"columns are {_columns(table.schema)}, expected {_columns(expected_schema)}")
        return problems, None
    problems += _layout_problems(data, file.metadata, table, commit)
    problems += _row_problems(table, footer, job, commit)
    return problems, np.unique(table["position"].to_numpy())


def _footer_problems(footer: TokenFooter, job: Job, commit: Commit) -> list[str]:
    expected: dict[str, object] = {
        "fingerprint": job.fingerprint,
        "shard": commit.shard,
        "part": commit.part,
        "bits": job.tokenizer.bits,
        "group_size": job.tokenizer.group_size,
        "grid": tuple(job.tokenizer.grid),
        "views": job.spec.preprocess.views,
        "bit_order": "lsb_first",
        "channel_order": "msb_first",
        "samples": commit.samples,
        "failed": commit.failed,
        "failures_sha256": commit.failures.sha256 if commit.failures else "",
        "source_bytes": commit.source.bytes,
        "source_etag": commit.source.etag,
        "partial": commit.partial,
    }
    return [
        f"the footer says {name} {getattr(footer, name)!r}, expected {value!r}"
        for name, value in expected.items()
        if getattr(footer, name) != value
    ]


def _layout_problems(data: bytes, metadata: Any, table: pa.Table, commit: Commit) -> list[str]:
    problems = []
    if metadata.num_rows != commit.rows:
        problems.append(f"{metadata.num_rows:,} rows, the ledger says {commit.rows:,}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if [group.num_rows for group in groups] != commit.row_groups:
        problems.append(
            f"row groups of {[group.num_rows for group in groups]} rows, the ledger says {commit.row_groups}"
        )
    column = table.schema.names.index("tokens")
    chunks = [group.column(column) for group in groups]
    if [chunk.data_page_offset for chunk in chunks] != commit.tokens_offset:
        problems.append("the tokens column does not begin where the ledger says (tokens_offset)")
    first = 0
    for number, (group, chunk) in enumerate(zip(groups, chunks, strict=True)):
        rows = table["tokens"].slice(first, group.num_rows)
        first += group.num_rows
        if chunk.compression == "UNCOMPRESSED" and not _is_one_plain_page(data, chunk, rows.to_pylist()):
            problems.append(f"row group {number}: its tokens are not one page of plain bytes at the recorded offset")
    return problems


def _is_one_plain_page(data: bytes, chunk: Any, rows: list[bytes]) -> bool:
    """Whether the chunk is one page header, then each row behind its length, as byte-offset readers take it."""
    page = b"".join(len(row).to_bytes(4, "little") + row for row in rows)
    end = chunk.data_page_offset + chunk.total_compressed_size
    header_bytes = chunk.total_compressed_size - len(page)
    return not chunk.has_dictionary_page and 0 < header_bytes < 128 and data[end - len(page) : end] == page


def _row_problems(table: pa.Table, footer: TokenFooter, job: Job, commit: Commit) -> list[str]:
    if not len(table):
        return []
    problems = []
    position, clip, view, frames = (table[name].to_numpy() for name in ("position", "clip", "view", "frames"))
    same_sample = position[1:] == position[:-1]
    same_clip = same_sample & (clip[1:] == clip[:-1])
    in_order = (
        (position[1:] > position[:-1]) | (same_sample & (clip[1:] > clip[:-1])) | (same_clip & (view[1:] > view[:-1]))
    )
    problems += _count_rows(~in_order, "are not in the order position, clip, view", after=1)

    starts = np.concatenate([[True], ~same_clip])
    first_rows = np.flatnonzero(starts)
    views_there = np.diff(np.append(first_rows, len(table)))
    expected_view = np.arange(len(table)) - np.repeat(first_rows, views_there)
    if (views_there != footer.views).any() or (view != expected_view).any():
        bad = (
            int(first_rows[np.flatnonzero(views_there != footer.views)[0]])
            if (views_there != footer.views).any()
            else 0
        )
        problems.append(f"a clip does not have all its {footer.views} views, the first at row {bad}")

    # Rows are in position order, so a key that belongs to two samples, or a sample with two keys, shows in the counts.
    keys = table["key"].combine_chunks()
    key_changes = np.asarray(pc.not_equal(keys[1:], keys[:-1])) if len(table) > 1 else np.zeros(0, np.bool_)
    if pc.count_distinct(keys).as_py() != len(np.unique(position)) or (key_changes != ~same_sample).any():
        problems.append("keys and positions do not belong together one to one")

    grid_rows, grid_columns = footer.grid
    num_bits = frames.astype(np.int64) * grid_rows * grid_columns * footer.bits
    sizes = pc.binary_length(table["tokens"]).to_numpy()
    problems += _count_rows(sizes != -(-num_bits // 8), "have token bytes of the wrong length")
    problems += _count_rows(_padding_is_set(table["tokens"], sizes, num_bits), "have padding bits that are not zero")
    problems += _count_rows(frames < 1, "have no frames")
    bounds = row_group_bounds(sizes.tolist(), starts.tolist())
    if np.cumsum([0, *commit.row_groups]).tolist() != bounds:
        problems.append("row groups are not filled as the format demands (1,024 rows or 4 MiB, whole clips)")

    problems += _frame_time_problems(table, frames)
    problems += _crop_problems(table)
    keys_range = pc.min_max(keys).as_py()
    expected: dict[str, object] = {
        "tokens": int(frames.astype(np.int64).sum()) * grid_rows * grid_columns,
        "min_frames": int(frames.min()),
        "max_frames": int(frames.max()),
        "min_key": keys_range["min"],
        "max_key": keys_range["max"],
    }
    problems += [
        f"the ledger says {name} {getattr(commit, name)!r}, the rows give {value!r}"
        for name, value in expected.items()
        if getattr(commit, name) != value
    ]
    return problems


def _padding_is_set(
    tokens: pa.ChunkedArray, sizes: npt.NDArray[np.int32], num_bits: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    spare = sizes.astype(np.int64) * 8 - num_bits
    set_bits = np.zeros(len(sizes), np.bool_)
    for row in np.flatnonzero((spare > 0) & (spare < 8)):
        set_bits[row] = tokens[int(row)].as_py()[-1] >> (8 - int(spare[row])) != 0
    return set_bits


def _frame_time_problems(table: pa.Table, frames: npt.NDArray[np.int16]) -> list[str]:
    times = table["frame_times"]
    is_image = np.asarray(times.is_null())
    start_missing = np.asarray(table["start"].is_null())
    num_times = pc.fill_null(pc.list_value_length(times), 0).to_numpy()
    problems = _count_rows(is_image != start_missing, "have a start without frame times, or the reverse")
    problems += _count_rows(
        is_image & ((frames != 1) | (table["clip"].to_numpy() != 0)), "are clips without frame times"
    )
    return problems + _count_rows(~is_image & (num_times != frames), "have another number of frame times than frames")


def _crop_problems(table: pa.Table) -> list[str]:
    crops = table["crop"].combine_chunks()
    if (pc.list_value_length(crops).to_numpy() != 4).any():
        return ["a crop is not four numbers"]
    x, y, width, height = crops.flatten().to_numpy().reshape(-1, 4).T
    inside = (x >= 0) & (y >= 0) & (width > 0) & (height > 0)
    inside &= (x + width <= table["width"].to_numpy()) & (y + height <= table["height"].to_numpy())
    return _count_rows(~inside, "have a crop that is not inside their picture")


def _count_rows(bad: npt.NDArray[np.bool_], what: str, *, after: int = 0) -> list[str]:
    count = int(bad.sum())
    return [f"{count:,} rows {what}, the first is row {int(np.argmax(bad)) + after}"] if count else []


def _failure_table_problems(data: bytes, job: Job, commit: Commit) -> tuple[list[str], npt.NDArray[np.int64] | None]:
    """What is wrong with a failure table, and the positions of the samples that failed."""
    try:
        table = read_parquet(data, check_pages=True)
    except PARQUET_ERRORS as error:
        return [f"it cannot be read: {error}"], None
    if table.schema.names != FAILURE_SCHEMA.names:
        return [f"columns are {_columns(table.schema)}, expected {_columns(FAILURE_SCHEMA)}"], None
    problems = []
    metadata = table.schema.metadata or {}
    for name, value in (("fingerprint", job.fingerprint), ("shard", str(commit.shard))):
        stored = metadata.get(f"bsqtok.{name}".encode(), value.encode()).decode("utf-8", "replace")
        if stored != value:
            problems.append(f"the footer says {name} {stored!r}, expected {value!r}")
    severity = table["severity"].to_pylist()
    if unknown := set(severity) - {"failed", "warning"}:
        problems.append(f"severity {min(unknown)!r} is neither 'failed' nor 'warning'")
    if severity.count("warning") != commit.warnings:
        problems.append(f"{severity.count('warning'):,} warnings, the ledger says {commit.warnings:,}")
    of_archive = table.filter(pc.is_null(table["key"]))
    if bool(len(of_archive)) != commit.partial:
        problems.append("a damaged archive has a row without a key, and only it has one; here they disagree")
    of_samples = table.filter(pc.and_(pc.equal(table["severity"], "failed"), pc.is_valid(table["key"])))
    failed = np.unique(of_samples["position"].drop_null().to_numpy())
    if len(failed) != commit.failed:
        problems.append(f"{len(failed):,} samples failed, the ledger says {commit.failed:,}")
    if not len(table):
        problems.append("it has no rows; a shard without failures has no table")
    return problems, failed


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}{'' if field.nullable else ' required'}" for field in schema)
