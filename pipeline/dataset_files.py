"""What a dataset's own files say: its identity, its plan, its ledger, its manifest.

Reading only, and nothing heavy: neither torch nor av.  Names follow the layout of a dataset; every function takes
the `Storage` of the dataset's folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.parquet import PARQUET_ERRORS, read_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.job import Job
from schemas.ledger import Arithmetic, Attempt, Commit, GivenUp, Summary, parse_lines, segment_name, segment_range
from schemas.manifest import MANIFEST_SCHEMA, ManifestSummary
from schemas.tokenfile import FORMAT_VERSION

JOB_NAME = "job.json"
LEASE_NAME = "lease.json"
PLAN_SCHEMA = pa.schema([pa.field("shard", pa.int64(), nullable=False), pa.field("url", pa.string(), nullable=False)])

GENERATION_FILE = re.compile(r"^(\d{4,})\.json$")
"""What makes a generation begun, under `plan/`, and finished, under `manifest/`."""
_FIRST_WAIT_SECONDS = 0.05
_LISTINGS = 5
"""Times that a ledger is listed before a segment that vanished counts as lost; each merge costs at most one."""

Record = Commit | Attempt | GivenUp | Arithmetic


def plan_name(generation: int) -> str:
    """The plan of a generation: `plan/0000.parquet`."""
    return f"plan/{generation:04d}.parquet"


def draft_name(generation: int, sha256: str) -> str:
    """Where a plan waits until the record that names its hash is written: `plan/0001-5d21e9aa.parquet`."""
    return f"plan/{generation:04d}-{sha256[:8]}.parquet"


def generation_name(generation: int) -> str:
    """What a generation above 0 does; with it the generation is begun: `plan/0001.json`."""
    return f"plan/{generation:04d}.json"


def ledger_folder(generation: int) -> str:
    """The folder of a generation's ledger segments: `ledger/0000`."""
    return f"ledger/{generation:04d}"


def manifest_table_name(generation: int) -> str:
    """The table of a generation's manifest: `manifest/0000.parquet`."""
    return f"manifest/{generation:04d}.parquet"


def manifest_summary_name(generation: int) -> str:
    """The summary of a generation's manifest, written last: `manifest/0000.json`."""
    return f"manifest/{generation:04d}.json"


def read_job(storage: Storage) -> Job | None:
    """The identity of the dataset; None where there is no job.json, so no dataset yet.

    Raises BsqError when job.json is damaged, or of another format version."""
    data = _read_if_there(storage, JOB_NAME)
    if data is None:
        return None
    try:
        job = Job.model_validate_json(data)
    except ValidationError as error:
        raise BsqError(f"{storage.printable(JOB_NAME)}: no job of bsqtok. Restore it from a copy.") from error
    if job.format != "bsqtok":
        raise BsqError(f"{storage.url}: {JOB_NAME} says format {job.format!r}; a bsqtok dataset says 'bsqtok'.")
    if job.format_version != FORMAT_VERSION:
        raise BsqError(
            f"{storage.url}: the dataset has format version {job.format_version}, and this bsqtok reads "
            f"{FORMAT_VERSION}. Use the bsqtok that made it: {job.created_by}."
        )
    return job


def serialise_plan(urls: Sequence[str], shards: Iterable[int] | None = None) -> bytes:
    """The bytes of a plan that gives `urls` the numbers `shards`, ascending; left out: from 0 on."""
    numbers = range(len(urls)) if shards is None else shards
    table = pa.Table.from_arrays([pa.array(numbers, pa.int64()), pa.array(urls, pa.string())], schema=PLAN_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", version="2.6", write_page_checksum=True)
    return sink.getvalue()


def read_plan(storage: Storage, generation: int) -> pa.Table:
    """The shards of a generation: columns `shard` (int64) and `url` (string, without credentials).

    Raises BsqError when the plan is missing or damaged."""
    return _parse_table(storage, plan_name(generation), read_plan_bytes(storage, generation), PLAN_SCHEMA)


def read_plan_bytes(storage: Storage, generation: int) -> bytes:
    """The file that holds a plan.  Raises BsqError when there is none."""
    data = _read_if_there(storage, plan_name(generation))
    if data is None:
        # A driver may have ended between the record and the plan: then it lies there as a draft.
        record = _read_if_there(storage, JOB_NAME if generation == 0 else generation_name(generation))
        with contextlib.suppress(ValueError, KeyError):
            data = _read_if_there(storage, draft_name(generation, json.loads(record or b"{}")["plan_sha256"]))
    # The draft is gone where another driver has just given it its name.
    return read_required(storage, plan_name(generation)) if data is None else data


def list_generations(storage: Storage) -> list[int]:
    """Generations that have a manifest, so are finished; ascending, empty where there is none."""
    return sorted(int(match[1]) for name in storage.list("manifest") if (match := GENERATION_FILE.match(name)))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one generation."""

    summary: ManifestSummary
    table: pa.Table
    """One row per token file, in (shard, part) order; columns of `schemas.manifest.MANIFEST_SCHEMA`."""


def read_manifest(
    storage: Storage, generation: int | None = None, columns: Sequence[str] | None = None
) -> Manifest | None:
    """The manifest of `generation`, or of the highest one there is; None where no generation is finished.

    `columns` leaves out what is not needed: of a million files all of it takes gigabytes.

    Raises BsqError when `generation` is asked for and has none, when a file is damaged, and when the table is not the
    one that the summary was written for."""
    if generation is None:
        generations = list_generations(storage)
        if not generations:
            return None
        generation = generations[-1]
    try:
        summary = read_manifest_summary(storage, generation)
    except FileNotFoundError as error:
        raise BsqError(f"{storage.url}: generation {generation} is not finished, or was never begun.") from error
    name = manifest_table_name(generation)
    data = read_required(storage, name)
    if hashlib.sha256(data).hexdigest() != summary.manifest_sha256:
        raise BsqError(
            f"{storage.printable(name)}: not the file that {manifest_summary_name(generation)} was written for (its "
            f"SHA-256 differs). Restore both from a copy."
        )
    schema = MANIFEST_SCHEMA if columns is None else pa.schema([MANIFEST_SCHEMA.field(column) for column in columns])
    return Manifest(summary, _parse_table(storage, name, data, schema))


def read_manifest_summary(storage: Storage, generation: int) -> ManifestSummary:
    """The counts of a finished generation.  Raises FileNotFoundError when it is not finished, BsqError when damaged."""
    name = manifest_summary_name(generation)
    data = storage.read_bytes(name)
    try:
        return ManifestSummary.model_validate_json(data)
    except ValidationError as error:
        raise BsqError(f"{storage.printable(name)}: no manifest of bsqtok. Restore it from a copy.") from error


class CommittedParts:
    """A set of (shard, part) that costs a bit for each shard."""

    def __init__(self) -> None:
        self._bits_of_part: dict[int, bytearray] = {}
        self._count = 0

    def add(self, shard: int, part: int = 0) -> bool:
        """Put (shard, part) into the set; False if it was there."""
        bits = self._bits_of_part.setdefault(part, bytearray())
        byte, mask = shard >> 3, 1 << (shard & 7)
        if byte >= len(bits):
            bits.extend(bytes(max(byte + 1 - len(bits), len(bits), 64)))
        if bits[byte] & mask:
            return False
        bits[byte] |= mask
        self._count += 1
        return True

    def __contains__(self, item: tuple[int, int]) -> bool:
        shard, part = item
        bits = self._bits_of_part.get(part, b"")
        return shard >> 3 < len(bits) and bool(bits[shard >> 3] & 1 << (shard & 7))

    def has_shard(self, shard: int) -> bool:
        """Whether any part of the shard is in the set."""
        return any((shard, part) in self for part in self._bits_of_part)

    def __len__(self) -> int:
        return self._count


@dataclass(slots=True)
class CommitTotals:
    """Sums over the commits that count."""

    commits: int = 0
    rows: int = 0
    tokens: int = 0
    samples: int = 0
    failed: int = 0
    poison: int = 0
    warnings: int = 0
    bytes: int = 0
    """Bytes of token files."""
    partial: int = 0
    """Commits of damaged archives."""

    def add(self, commit: Commit) -> None:
        self.commits += 1
        self.rows += commit.rows
        self.tokens += commit.tokens
        self.samples += commit.samples
        self.failed += commit.failed
        self.poison += commit.poison
        self.warnings += commit.warnings
        self.bytes += commit.bytes
        self.partial += commit.partial


@dataclass(slots=True)
class LedgerState:
    """What the ledger of one generation says after the rules: the first commit counts, a commit beats a failure."""

    generation: int
    segments: list[str] = field(default_factory=list)
    """File names of the segments that count, in number order; a merged one stands for its parts."""
    next_segment: int = 0
    """The number that the next segment must claim."""
    committed: CommittedParts = field(default_factory=CommittedParts)
    commits: dict[tuple[int, int], Commit] = field(default_factory=dict)
    """The commit of each (shard, part); empty when read with `keep_commits=False`."""
    ignored: list[Commit] = field(default_factory=list)
    """Later commits of a (shard, part) that had one; their files may be swept."""
    totals: CommitTotals = field(default_factory=CommitTotals)
    given_up: dict[int, GivenUp] = field(default_factory=dict)
    """Shards that were given up and never committed."""
    failed_attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    """The failed attempts at each shard, in ledger order."""
    arithmetic: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What computed the bits, by the id that commit records name."""

    def add(self, record: Record, *, keep_commits: bool = True) -> None:
        """Take in the next record of the ledger."""
        if isinstance(record, Commit):
            if not self.committed.add(record.shard, record.part):
                self.ignored.append(record)
                return
            self.totals.add(record)
            self.given_up.pop(record.shard, None)
            if keep_commits:
                self.commits[record.shard, record.part] = record
        elif isinstance(record, Attempt):
            self.failed_attempts.setdefault(record.shard, []).append(record)
        elif isinstance(record, GivenUp):
            if not self.committed.has_shard(record.shard):
                self.given_up[record.shard] = record
        else:
            self.arithmetic[record.id] = record.value


def read_ledger(storage: Storage, generation: int, *, keep_commits: bool = True) -> LedgerState:
    """Read the ledger of a generation; an empty state where there is none yet.

    A commit record takes about 7 kB of memory: with very many shards pass `keep_commits=False`, which keeps sums
    and a bit for each shard, and take the records from `iter_commits`.  Raises BsqError when a segment is damaged
    or lost."""
    for segments in _listings(storage, generation):
        state = LedgerState(generation)
        for name in segments:
            data = _read_if_there(storage, f"{ledger_folder(generation)}/{name}")
            if data is None:
                break
            for record in _records(storage, generation, name, data):
                state.add(record, keep_commits=keep_commits)
            state.segments.append(name)
            state.next_segment = _last_number(name) + 1
        else:
            return state
    raise _lost(storage, generation)


def iter_commits(storage: Storage, generation: int) -> Iterator[Commit]:
    """The commits of a generation that count, in the order of the ledger, one segment in memory at a time.

    Raises BsqError when a segment is damaged or lost."""
    seen = CommittedParts()
    for segments in _listings(storage, generation):
        for name in segments:
            data = _read_if_there(storage, f"{ledger_folder(generation)}/{name}")
            if data is None:
                break
            for record in _records(storage, generation, name, data):
                if isinstance(record, Commit) and seen.add(record.shard, record.part):
                    yield record
        else:
            return
    raise _lost(storage, generation)


def select_segments(names: list[str]) -> list[str]:
    """Of the file names in a ledger folder, the segments to read, in number order.

    A merged segment wins over its parts.  Raises LookupError naming the first number that none of them holds."""
    ranges = sorted(
        ((first, -last, name) for name in names for first, last in [segment_range(name) or (0, -1)] if last >= first)
    )
    selected = []
    following = 0
    for first, negative_last, name in ranges:
        last = -negative_last
        if last < following:
            continue
        if first != following:
            raise LookupError(f"segment {following}")
        selected.append(name)
        following = last + 1
    return selected


def _listings(storage: Storage, generation: int) -> Iterator[list[str]]:
    """What to read, listed again each time the caller comes back: a segment that vanished was merged meanwhile."""
    folder = ledger_folder(generation)
    for number in range(_LISTINGS):
        if number:
            time.sleep(_FIRST_WAIT_SECONDS * 2**number)
        try:
            selected = select_segments(storage.list(folder))
        except LookupError:
            # A listing that took long may have passed the place of a merged segment before it was published.
            continue
        # A listing may lag behind what was written.  Numbers have no gaps, so what comes next can be asked for by name.
        following = _last_number(selected[-1]) + 1 if selected else 0
        while storage.exists(f"{folder}/{segment_name(following)}"):
            selected.append(segment_name(following))
            following += 1
        yield selected


def _last_number(name: str) -> int:
    first_last = segment_range(name)
    assert first_last is not None
    return first_last[1]


def _records(storage: Storage, generation: int, name: str, data: bytes) -> Iterator[Record]:
    for record in parse_lines(data, name=storage.printable(f"{ledger_folder(generation)}/{name}")):
        if not isinstance(record, Summary):
            yield record


def _lost(storage: Storage, generation: int) -> BsqError:
    return BsqError(
        f"{storage.url}: a segment of {ledger_folder(generation)} is missing, and with it the record of what was "
        f"committed. Restore the folder from a copy, or tokenize into another output."
    )


def _parse_table(storage: Storage, name: str, data: bytes, schema: pa.Schema) -> pa.Table:
    try:
        return read_parquet(data, schema.names).select(schema.names).cast(schema)
    except (*PARQUET_ERRORS, KeyError) as error:
        raise BsqError(f"{storage.printable(name)}: damaged ({error}). Restore it from a copy.") from error


def _read_if_there(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read_bytes(name)
    except FileNotFoundError:
        return None


def read_required(storage: Storage, name: str) -> bytes:
    """The bytes of a file that must be there.  Raises BsqError when it is not."""
    data = _read_if_there(storage, name)
    if data is None:
        raise BsqError(f"{storage.printable(name)}: there is no such file. Restore it from a copy.")
    return data


class StoredFile(io.RawIOBase):
    """A file of a dataset for readers that seek, such as pyarrow's: each read is one request for a range."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Raises FileNotFoundError."""
        super().__init__()
        self._storage = storage
        self._name = name
        self._size = storage.size(name)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._size - self._place)
        wanted = rest if size is None or size < 0 else min(size, rest)
        data = self._storage.read_range(self._name, self._place, wanted) if wanted else b""
        self._place += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
