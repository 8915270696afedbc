"""Finds the rows of a key in a dataset: by the key range of each file, then by the key column alone."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset_files import StoredFile, iter_commits, list_generations, read_manifest, read_plan
from pipeline.parquet import PARQUET_ERRORS, open_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.failures import bounded_name
from schemas.manifest import latest_parts

SEARCHED_FILES = 16
"""Files that are read for keys like one that is not there, and for why a sample is missing."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A committed token file."""

    shard: int
    part: int
    file: str
    url: str
    """The shard that it was made from, without credentials."""
    rows: int
    min_key: str | None
    max_key: str | None
    failures: str | None
    """Name of the shard's failure table; None where a later part of the shard has the one that counts."""


@dataclass(frozen=True, slots=True)
class FoundRow:
    """One row of a token file."""

    source: TokenFile
    values: dict[str, Any]
    """All columns of the row, by name."""


def list_token_files(storage: Storage, generation: int | None = None) -> Iterator[TokenFile]:
    """Every token file of a generation in (shard, part) order; of the newest finished one unless told.

    A dataset of which no generation is finished gives what is committed so far, in ledger order.  Raises BsqError
    when `generation` is not finished."""
    if generation is None and not list_generations(storage):
        plan = read_plan(storage, 0)
        urls = dict(zip(plan["shard"].to_pylist(), plan["url"].to_pylist(), strict=True))
        for commit in iter_commits(storage, 0):
            yield TokenFile(
                commit.shard,
                commit.part,
                commit.file,
                urls[commit.shard],
                commit.rows,
                commit.min_key,
                commit.max_key,
                commit.failures.file if commit.failures else None,
            )
        return
    manifest = read_manifest(storage, generation)
    assert manifest is not None
    columns = ["shard", "part", "file", "url", "rows", "min_key", "max_key", "failures_file"]
    counts = latest_parts(manifest.table)
    first = 0
    for batch in manifest.table.select(columns).to_batches(max_chunksize=4096):
        for row, is_latest in zip(batch.to_pylist(), counts[first : first + len(batch)], strict=True):
            source = TokenFile(*(row[name] for name in columns))
            yield source if is_latest else replace(source, failures=None)
        first += len(batch)


def find_rows(storage: Storage, key: str, *, shard: int | None = None, generation: int | None = None) -> list[FoundRow]:
    """The rows of `key`: every clip and view, of every shard that has it (or of `shard` alone); empty if none has.

    Raises BsqError when a file cannot be read."""
    found = []
    for source in list_token_files(storage, generation):
        if shard is not None and source.shard != shard:
            continue
        if source.min_key is not None and source.max_key is not None and source.min_key <= key <= source.max_key:
            found += _rows_of_key(storage, source, key)
    return found


def read_row(storage: Storage, source: TokenFile, row: int) -> FoundRow:
    """Row number `row` of a token file.  Raises BsqError when the file cannot be read."""
    with _Opened(storage, source.file) as file:
        for group in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row < num_rows:
                return FoundRow(source, file.read_row_group(group, use_threads=False).slice(row, 1).to_pylist()[0])
            row -= num_rows
    raise BsqError(
        f"{storage.printable(source.file)}: it has fewer rows than recorded. Run `bsq verify {storage.url}`."
    )


def like_keys(storage: Storage, key: str, *, generation: int | None = None) -> list[str]:
    """Up to three keys that look like `key`, from the files where it would be."""
    files = islice(list_token_files(storage, generation), 1 << 16)
    nearest = heapq.nsmallest(SEARCHED_FILES, files, key=lambda source: _distance(source, key))
    names: set[str] = set()
    for source in nearest:
        with _Opened(storage, source.file) as file:
            names.update(file.read(columns=["key"], use_threads=False)["key"].to_pylist())
    return difflib.get_close_matches(key, sorted(names), n=3, cutoff=0.5)


def why_missing(storage: Storage, key: str, *, generation: int | None = None) -> str | None:
    """What the failure tables say of `key`: class and message; None when they do not name it (in the first files)."""
    tables = (source.failures for source in list_token_files(storage, generation) if source.failures is not None)
    for name in islice(tables, SEARCHED_FILES):
        with _Opened(storage, name) as file:
            rows = file.read(columns=["key", "error", "message", "severity"], use_threads=False)
        rows = rows.filter(
            pc.and_(pc.equal(rows["key"], bounded_name(key)), pc.equal(rows["severity"], "failed"))
        ).to_pylist()
        if rows:
            return f"{rows[0]['error']}: {rows[0]['message']}"
    return None


def _distance(source: TokenFile, key: str) -> tuple[bool, int]:
    """Files whose range holds the key first, then those whose first key begins like it."""
    if source.min_key is None or source.max_key is None:
        return True, 0
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(source.min_key, key, strict=False)))
    return not source.min_key <= key <= source.max_key, -same


def _rows_of_key(storage: Storage, source: TokenFile, key: str) -> list[FoundRow]:
    found = []
    with _Opened(storage, source.file) as file:
        column = file.schema_arrow.names.index("key")
        for group in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max and not statistics.min <= key <= statistics.max:
                continue
            keys = file.read_row_group(group, columns=["key"], use_threads=False)["key"]
            rows = pc.indices_nonzero(pc.equal(keys, key))
            if len(rows):
                found += [
                    FoundRow(source, row)
                    for row in file.read_row_group(group, use_threads=False).take(rows).to_pylist()
                ]
    return found


class _Opened:
    """A Parquet file of the dataset, its errors in our words."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def __enter__(self) -> pq.ParquetFile:
        try:
            return open_parquet(StoredFile(self._storage, self._name))
        except PARQUET_ERRORS as error:
            raise self._damaged() from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PARQUET_ERRORS):
            raise self._damaged() from error

    def _damaged(self) -> BsqError:
        name = self._storage.printable(self._name)
        return BsqError(f"{name}: it is gone or damaged. Run `bsq verify {self._storage.url}`.")
