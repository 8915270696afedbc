"""One failure row, and the failure table of a shard."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ArchiveError, SampleError, printable

MAX_MESSAGE_CHARS = 2000
MAX_NAME_CHARS = 1000
"""Of a key or member; of a longer one stand its beginning and a hash."""
POISON = frozenset({"WorkerCrash", "DecodeTimeout"})
"""Classes of samples that end or hang their decoder."""

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("member", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("clip", pa.int32()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("severity", pa.string(), nullable=False),
        pa.field("source_offset", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a sample, a clip of it, a carried member or the rest of an archive is missing."""

    key: str | None
    """None for the archive itself."""
    member: str | None = None
    position: int | None = None
    clip: int | None = None
    stage: str
    error: str
    """Name of the class in `schemas.errors`."""
    message: str
    severity: str = "failed"
    """"failed": there is no row; "warning": there is one, and something about it is worth knowing."""
    source_offset: int | None = None
    """Byte in the (decompressed) tar."""

    @classmethod
    def of_sample(
        cls, error: SampleError, *, key: str, position: int, member: str | None, source_offset: int | None
    ) -> Failure:
        """The row for an error of one sample."""
        return cls(
            key=bounded_name(key),
            member=bounded_name(name) if (name := error.member or member) else None,
            position=position,
            clip=error.clip,
            stage=error.stage,
            error=error.error,
            message=_short(error),
            severity=error.severity,
            source_offset=source_offset,
        )

    @classmethod
    def of_archive(cls, error: ArchiveError) -> Failure:
        """The row for the damage that ended an archive early."""
        return cls(key=None, stage=error.stage, error=error.error, message=_short(error), source_offset=error.offset)


def parse_failures(table: pa.Table) -> list[Failure]:
    """The rows of a failure table."""
    return [Failure(**row) for row in table.select(FAILURE_SCHEMA.names).to_pylist()]


def bounded_name(name: str) -> str:
    """A key or the name of a member as it stands in a row: a hostile archive can make thousands of 16 kB each."""
    name = printable(name)
    if len(name) <= MAX_NAME_CHARS:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return f"{name[: MAX_NAME_CHARS - len(digest) - 1]}…{digest}"


def _short(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:MAX_MESSAGE_CHARS]


def serialise_failures(failures: Sequence[Failure], metadata: dict[str, str]) -> bytes:
    """Serialise failure rows, in the order given, to the bytes of a failure table."""
    rows = [asdict(failure) for failure in failures]
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in FAILURE_SCHEMA]
    table = pa.Table.from_arrays(columns, schema=FAILURE_SCHEMA)
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, FAILURE_SCHEMA, compression="zstd", version="2.6", write_page_checksum=True, store_schema=False
    ) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(table)
    return sink.getvalue()
