"""What a dataset's manifest says of its token files: which there are, and how many rows lie in each row group."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset_files import iter_commits, read_job, read_manifest
from pipeline.storage import Storage
from schemas.errors import BsqError, FingerprintDiffers, SpecError
from schemas.job import Job
from schemas.manifest import manifest_table, serialise_manifest

MIN_FINGERPRINT = 8
"""Fewest hex digits by which a fingerprint may be named."""

_COLUMNS = ("shard", "part", "file", "bytes", "rows", "tokens", "min_frames", "max_frames", "row_groups")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset is."""

    url: str
    """Without credentials."""
    fingerprint: str
    manifest_sha256: str
    """Identity of the list of its files; of an unfinished dataset that of what is committed so far."""
    generation: int | None
    """None for what is committed of an unfinished dataset."""
    complete: bool
    """Finished, and no shard was given up."""
    files: int
    rows: int
    tokens: int
    bytes: int
    """Bytes of all token files."""
    bits: int
    """L: bits of one token."""
    group_size: int
    grid: tuple[int, int]
    """Rows and columns of tokens in one frame."""
    views: int
    """Views of each clip; they are neighbouring rows."""
    min_frames: int
    max_frames: int
    carried: tuple[str, ...]
    """Columns that samples may carry: caption, label, metadata."""
    tokenizer: str
    """Name of the tokenizer's folder in the dataset."""
    weight_sha256: str
    """Identity of the tokenizer's weights: the same token means the same in datasets that agree in it."""
    created_by: str


@dataclass(frozen=True)
class TokenIndex:
    """The token files of a dataset in order, and their row groups, called units, numbered through all files."""

    info: DatasetInfo
    files: pa.ChunkedArray
    """Names, string."""
    shards: Numbers
    parts: Numbers
    file_bytes: Numbers
    first_unit: Numbers
    """Of each file its first unit, and last the number of units: int64 [files + 1]."""
    unit_rows: npt.NDArray[np.int32]
    """Rows of each unit, int32 [units]: of a million files there are ten million units."""
    row_bytes: Numbers
    """Packed bytes of a row of each file, int64 [files]; where frames vary within a file, their mean."""

    @property
    def num_files(self) -> int:
        return len(self.shards)

    @property
    def num_units(self) -> int:
        return len(self.unit_rows)

    def file_of(self, unit: int) -> int:
        """The file that holds a unit."""
        return int(np.searchsorted(self.first_unit, unit, side="right")) - 1

    def file_name(self, file: int) -> str:
        """The name of a file relative to the dataset."""
        return str(self.files[file].as_py())


def read_token_index(
    storage: Storage,
    *,
    generation: int | None = None,
    allow_partial: bool = False,
    expect_fingerprint: str | None = None,
) -> TokenIndex:
    """Read what the manifest of `generation`, the newest unless told, lists.

    `allow_partial` also takes a dataset that lacks shards: what is committed so far where no generation is finished.
    Raises SpecError where there is no dataset, BsqError for an incomplete or damaged one, FingerprintDiffers."""
    job = read_job(storage)
    if job is None:
        raise SpecError(f"{storage.url}: there is no dataset here (no job.json). Check the path.")
    _check_fingerprint(storage, job, expect_fingerprint)
    manifest = read_manifest(storage, generation, _COLUMNS)
    if manifest is not None:
        summary = manifest.summary
        if summary.fingerprint != job.fingerprint:
            raise BsqError(
                f"{storage.url}: its manifest has fingerprint {summary.fingerprint[:8]} and its job.json "
                f"{job.fingerprint[:8]}; files of two datasets are mixed. Restore it from a copy."
            )
        if not summary.complete and not allow_partial:
            raise BsqError(
                f"{storage.url}: incomplete, {summary.failed_shards:,} shards failed. Run `bsq status {storage.url}` "
                f"to see which, or open it with allow_partial=True."
            )
        table, sha256 = manifest.table, summary.manifest_sha256
        number, complete = summary.generation, summary.complete
    else:
        if not allow_partial:
            raise BsqError(
                f"{storage.url}: the dataset is not finished. Run `bsq resume {storage.url}`, or open what is "
                f"committed so far with allow_partial=True."
            )
        table = manifest_table((commit, "", 0) for commit in iter_commits(storage, 0))
        sha256 = hashlib.sha256(serialise_manifest(table)).hexdigest()
        number, complete = None, False
    return _build(storage, job, table, manifest_sha256=sha256, generation=number, complete=complete)


def read_file_column(storage: Storage, index: TokenIndex, column: str) -> pa.ChunkedArray:
    """A further column of the manifest, such as `sha256`, in the order of the files.  Raises BsqError."""
    generation = index.info.generation
    if generation is None:
        # Commits may have been added meanwhile; a shard's commit that counts does not change.
        commits = {(each.shard, each.part): getattr(each, column) for each in iter_commits(storage, 0)}
        pairs = zip(index.shards.tolist(), index.parts.tolist(), strict=True)
        return pa.chunked_array([pa.array([commits[pair] for pair in pairs], pa.string())])
    manifest = read_manifest(storage, generation, [column])
    assert manifest is not None
    if manifest.summary.manifest_sha256 != index.info.manifest_sha256:
        raise BsqError(f"{storage.url}: its manifest changed after it was opened. Open the dataset again.")
    return manifest.table[column]


def _check_fingerprint(storage: Storage, job: Job, expected: str | None) -> None:
    if expected is None:
        return
    if len(expected) < MIN_FINGERPRINT or not job.fingerprint.startswith(expected.lower()):
        raise FingerprintDiffers(
            f"{storage.url}: the dataset has fingerprint {job.fingerprint}, and {expected!r} is expected (give "
            f"{MIN_FINGERPRINT} to 64 digits). These are tokens made with other settings; check the path."
        )


def _build(storage: Storage, job: Job, table: pa.Table, *, manifest_sha256: str, **identity: Any) -> TokenIndex:
    groups = table["row_groups"].combine_chunks()
    if isinstance(groups, pa.ChunkedArray):
        groups = groups.chunk(0) if groups.num_chunks else pa.array([], groups.type)
    counts = groups.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    first_unit = sums_before(counts)
    recorded = groups.flatten().to_numpy()
    in_range = not len(recorded) or 0 <= recorded.min() <= recorded.max() <= np.iinfo(np.int32).max
    unit_rows = recorded.astype(np.int32) if in_range else np.zeros(0, np.int32)
    del groups, recorded
    rows, tokens = table["rows"].to_numpy(), table["tokens"].to_numpy()
    views = job.spec.preprocess.views
    if (
        not in_range
        or not np.array_equal(np.diff(sums_before(unit_rows)[first_unit]), rows)
        or (views > 1 and (unit_rows % views).any())
        or (tokens < 0).any()
    ):
        raise BsqError(f"{storage.url}: the manifest contradicts itself in its rows. Run `bsq verify {storage.url}`.")
    min_frames, max_frames = (table[name].to_numpy()[rows > 0] for name in ("min_frames", "max_frames"))
    tokenizer = job.tokenizer
    info = DatasetInfo(
        url=storage.url,
        fingerprint=job.fingerprint,
        manifest_sha256=manifest_sha256,
        **identity,
        files=len(table),
        rows=int(rows.sum()),
        tokens=int(tokens.sum()),
        bytes=int(table["bytes"].to_numpy().sum()),
        bits=tokenizer.bits,
        group_size=tokenizer.group_size,
        grid=tokenizer.grid,
        views=views,
        min_frames=int(min_frames.min(initial=1 << 30)) if len(min_frames) else 1,
        max_frames=int(max_frames.max(initial=1)),
        carried=tuple(sorted(job.spec.carry)),
        tokenizer=tokenizer.folder,
        weight_sha256=tokenizer.weight_sha256,
        created_by=job.created_by,
    )
    return TokenIndex(
        info=info,
        files=table["file"],
        shards=table["shard"].to_numpy(),
        parts=table["part"].to_numpy().astype(np.int64),
        file_bytes=table["bytes"].to_numpy(),
        first_unit=first_unit,
        unit_rows=unit_rows,
        row_bytes=(tokens * tokenizer.bits // 8) // np.maximum(rows, 1) + 1,
    )


def sums_before(counts: npt.NDArray[Any]) -> Numbers:
    """Of each number the sum of those before it, and last the sum of all: int64 [n + 1]."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
