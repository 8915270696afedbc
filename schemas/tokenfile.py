"""Columns and footer of a token file, and how one is written so that rows can be read at byte offsets."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import BsqError

FORMAT_VERSION = 1
ROW_GROUP_ROWS = 1024
ROW_GROUP_BYTES = 4 << 20
_PREFIX = "bsqtok."
# pyarrow closes a page at a write batch, so both limits must exceed a row group for it to be one page.
_ONE_PAGE_BYTES = 1 << 30
_ONE_PAGE_ROWS = 1 << 20

CARRIED_COLUMNS: Mapping[str, pa.DataType] = {"caption": pa.string(), "label": pa.int64(), "metadata": pa.string()}


def token_schema(carry: Sequence[str]) -> pa.Schema:
    """Return the columns of a token file that carries the columns named in `carry`."""
    required = [
        ("key", pa.string()),
        ("clip", pa.int32()),
        ("view", pa.int16()),
        ("frames", pa.int16()),
        ("tokens", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
    schema = [pa.field(name, kind, nullable=False) for name, kind in required]
    schema.append(pa.field("crop", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False))
    schema.append(pa.field("flipped", pa.bool_(), nullable=False))
    schema.append(pa.field("start", pa.float64()))
    schema.append(pa.field("frame_times", pa.list_(pa.field("element", pa.float32(), nullable=False))))
    schema.append(pa.field("position", pa.int64(), nullable=False))
    schema.append(pa.field("source_offset", pa.int64(), nullable=False))
    schema.extend(pa.field(name, kind) for name, kind in CARRIED_COLUMNS.items() if name in carry)
    return pa.schema(schema)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFooter:
    """Key-values of a token file's footer; written as `bsqtok.<name>`, every value a string."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    shard: int
    part: int = 0
    bits: int
    """L: bits of one token."""
    group_size: int
    grid: tuple[int, int]
    """Rows and columns of tokens in one frame."""
    views: int
    bit_order: str = "lsb_first"
    channel_order: str = "msb_first"
    samples: int
    """Samples of the shard: every occurrence of a key, tokenized or failed."""
    failed: int
    failures_sha256: str = ""
    """SHA-256 of the shard's failure table; empty if it has none."""
    source_bytes: int
    source_etag: str = ""
    partial: bool = False
    """The archive was damaged; this holds what could be read."""

    def to_metadata(self) -> dict[str, str]:
        metadata = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                value = "true" if value else "false"
            elif isinstance(value, tuple):
                value = ",".join(map(str, value))
            metadata[_PREFIX + field.name] = str(value)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> TokenFooter:
        """Parse the key-values of a Parquet footer.  Raises BsqError when they are not a token file's."""
        texts = {
            key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in (metadata or {}).items()
        }
        if _PREFIX + "format_version" not in texts:
            raise BsqError("this Parquet file has no bsqtok footer; it is not a token file.")
        version = texts[_PREFIX + "format_version"]
        if version != str(FORMAT_VERSION):
            raise BsqError(
                f"token files of format version {version} need another bsqtok; this one reads {FORMAT_VERSION}."
            )
        values: dict[str, object] = {}
        try:
            for field in fields(cls):
                text = texts[_PREFIX + field.name]
                kind = str(field.type)
                if kind == "int":
                    values[field.name] = int(text)
                elif kind == "bool":
                    values[field.name] = {"true": True, "false": False}[text]
                elif kind.startswith("tuple"):
                    rows, columns = text.split(",")
                    values[field.name] = (int(rows), int(columns))
                else:
                    values[field.name] = text
        except (KeyError, ValueError) as error:
            raise BsqError(f"the bsqtok footer is damaged ({error}); run `bsq verify` on the dataset.") from error
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class EncodedTokenFile:
    """A serialised token file and what the ledger records of its layout."""

    data: bytes
    row_groups: list[int]
    """Rows of each row group."""
    tokens_offset: list[int]
    """First byte of the `tokens` column chunk of each row group."""


def row_group_bounds(token_bytes: Sequence[int], starts_clip: Sequence[bool]) -> list[int]:
    """Cut rows into row groups of at most 1,024 rows and 4 MiB packed, between clips only.

    `token_bytes[i]` is the packed size of row i; `starts_clip[i]` tells whether a clip begins there (not a further
    view of the one before).  Returns the first row of each group and, last, the number of rows.  A clip whose views
    alone exceed a limit has a row group to itself."""
    bounds = [0]
    group_bytes = 0
    clip_start, clip_bytes = 0, 0
    for row, (num_bytes, starts) in enumerate(zip(token_bytes, starts_clip, strict=True)):
        if starts:
            clip_start, clip_bytes = row, 0
        clip_bytes += num_bytes
        group_bytes += num_bytes
        too_long = row + 1 - bounds[-1] > ROW_GROUP_ROWS or group_bytes > ROW_GROUP_BYTES
        if too_long and clip_start > bounds[-1]:
            bounds.append(clip_start)
            group_bytes = clip_bytes
    if token_bytes:
        bounds.append(len(token_bytes))
    return bounds


def serialise_token_file(table: pa.Table, footer: TokenFooter) -> EncodedTokenFile:
    """Serialise rows, already in source order, to the bytes of a token file.

    The `tokens` column is plain and uncompressed, one page for each row group, so that a reader can find row i of
    a group at a byte offset; the others are compressed and carry statistics."""
    schema = table.schema
    others = [name for name in schema.names if name != "tokens"]
    compression = dict.fromkeys(others, "ZSTD") | {"tokens": "NONE"}
    clips = list(zip(table["position"].to_pylist(), table["clip"].to_pylist(), strict=True))
    starts = [index == 0 or clips[index] != clips[index - 1] for index in range(len(clips))]
    sizes = pc.binary_length(table["tokens"]).to_pylist()
    bounds = row_group_bounds(sizes, starts)
    sink = io.BytesIO()
    # ParquetWriter wants the paths of leaf columns where lists are concerned.
    leaves = {f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name: name for name in others}
    writer = pq.ParquetWriter(
        sink,
        schema,
        version="2.6",
        compression={leaf: compression[name] for leaf, name in leaves.items()} | {"tokens": "NONE"},
        use_dictionary=[
            leaf for leaf, name in leaves.items() if name in ("caption", "metadata", "crop", "clip", "view")
        ],
        write_statistics=list(leaves),
        data_page_size=_ONE_PAGE_BYTES,
        write_batch_size=_ONE_PAGE_ROWS,
        write_page_checksum=True,
        store_schema=False,
    )
    with writer:
        writer.add_key_value_metadata(footer.to_metadata())
        for first, last in itertools.pairwise(bounds):
            writer.write_table(table.slice(first, last - first).cast(schema), row_group_size=last - first)
    data = sink.getvalue()
    metadata = pq.read_metadata(io.BytesIO(data))
    column = schema.names.index("tokens")
    # `crop` (a list) comes after `tokens`, so leaf and field numbers agree there.
    offsets = [metadata.row_group(group).column(column).data_page_offset for group in range(metadata.num_row_groups)]
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return EncodedTokenFile(data=data, row_groups=rows, tokens_offset=offsets)
