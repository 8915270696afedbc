"""Rows of tokens in the formats of other loaders: as the bytes of a file, or as arrays to append to one.

Formats: MDS as MosaicML streaming 0.13 reads it (version 2), Megatron-LM's indexed dataset (index version 1),
WebDataset tars, NumPy arrays."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset_files import StoredFile
from pipeline.parquet import PARQUET_ERRORS, open_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError, SpecError
from schemas.tokenfile import CARRIED_COLUMNS, TokenFooter
from tokenizer.codes import MAX_INDEX_BITS, unpack_indices

NAMED = ("key", "clip", "view", "frames")
"""Columns that name a row; they are exported with its tokens, and so is what it carries."""

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {"uint16": 8, "int32": 4, "int64": 5}


@dataclass(frozen=True, slots=True)
class ExportRows:
    """The rows of one token file."""

    columns: dict[str, list[Any]]
    """`key`, `clip`, `view`, `frames` and the carried columns."""
    frames: npt.NDArray[Any]
    """Indices of all frames, one row after the other: int32, or int64 from 32 bits on, [frames, h, w]."""

    @property
    def first_frame(self) -> npt.NDArray[np.int64]:
        """Of each row its first frame, and last the number of frames: int64 [rows + 1]."""
        return np.append(0, np.cumsum(self.columns["frames"], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.columns["key"])

    def __iter__(self) -> Iterator[tuple[dict[str, Any], npt.NDArray[Any]]]:
        """Each row's columns, and its indices [T, h, w]."""
        first = self.first_frame
        for row in range(len(self)):
            yield {name: column[row] for name, column in self.columns.items()}, self.frames[first[row] : first[row + 1]]


def read_export_rows(storage: Storage, name: str) -> ExportRows:
    """Read a token file.  Raises BsqError when it is damaged, SpecError when an index has no 64-bit integer."""
    try:
        file = open_parquet(StoredFile(storage, name), check_pages=True)
        footer = TokenFooter.from_metadata(file.metadata.metadata)
        wanted = [each for each in file.schema_arrow.names if each in (*NAMED, *CARRIED_COLUMNS)]
        table = file.read(columns=[*wanted, "tokens"], use_threads=False)
    except (*PARQUET_ERRORS, FileNotFoundError) as error:
        raise BsqError(f"{storage.printable(name)}: gone or damaged. Run `bsq verify {storage.url}`.") from error
    if footer.bits > MAX_INDEX_BITS:
        raise SpecError(f"tokens of {footer.bits} bits are no 64-bit integers; other formats cannot hold them.")
    columns = {each: table[each].to_pylist() for each in wanted}
    return ExportRows(columns, _unpack(table["tokens"], np.array(columns["frames"], np.int64), footer))


def _unpack(tokens: pa.ChunkedArray, frames: npt.NDArray[np.int64], footer: TokenFooter) -> npt.NDArray[Any]:
    height, width = footer.grid
    dtype: Literal["int32", "int64"] = "int32" if footer.bits < 32 else "int64"
    indices = np.empty((int(frames.sum()), height, width), dtype)
    last_frame = np.cumsum(frames)
    packed = tokens.to_pylist()
    for count in np.unique(frames):
        rows = np.flatnonzero(frames == count)
        octets = np.frombuffer(b"".join(packed[row] for row in rows), np.uint8).reshape(len(rows), -1)
        places = (last_frame[rows, np.newaxis] - count + np.arange(count)).ravel()
        values = unpack_indices(octets, int(count) * height * width, footer.bits, dtype)
        indices[places] = values.reshape(-1, height, width)
    return indices


def index_type(num_ids: int) -> np.dtype[Any]:
    """The integer type for ids below `num_ids`: int32, or int64 where that is too small."""
    return np.dtype(np.int32 if num_ids <= 1 << 31 else np.int64)


# --- NumPy


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """The bytes of a .npy file, which `np.load(path, mmap_mode="r")` maps."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


# --- WebDataset


def webdataset_bytes(rows: ExportRows, dtype: np.dtype[Any]) -> bytes:
    """A tar with a sample for each row: `.npy` (indices [T, h, w]), `.json`, and `.txt` and `.cls` where it has them.

    A sample is called after its key; of a key with several rows all but the first have clip and view in the name, as
    in `walk@3v1`."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for columns, indices in rows:
            name = columns["key"]
            if columns["clip"] or columns["view"]:
                name += f"@{columns['clip']}v{columns['view']}"
            carried = {each: columns[each] for each in columns if each in CARRIED_COLUMNS and columns[each] is not None}
            named = {each: columns[each] for each in NAMED}
            _add_member(tar, f"{name}.npy", npy_bytes(indices.astype(dtype, copy=False)))
            _add_member(tar, f"{name}.json", json.dumps(named | carried, ensure_ascii=False).encode())
            if "caption" in carried:
                _add_member(tar, f"{name}.txt", carried["caption"].encode())
            if "label" in carried:
                _add_member(tar, f"{name}.cls", str(carried["label"]).encode())
    return sink.getvalue()


def _add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


# --- MDS


def mds_columns(carried: Sequence[str], dtype: np.dtype[Any]) -> dict[str, str]:
    """Names and MDS encodings of the columns, in the order in which MDS wants them: by name."""
    encodings = {"key": "str", "clip": "int", "view": "int", "frames": "int", "tokens": f"ndarray:{dtype.name}"}
    encodings |= {name: "int" if name == "label" else "str" for name in carried}
    return dict(sorted(encodings.items()))


def mds_shard_info(columns: dict[str, str], basename: str, num_bytes: int, samples: int) -> dict[str, Any]:
    """What `index.json` says of a shard."""
    return _mds_config(columns) | {
        "raw_data": {"basename": basename, "bytes": num_bytes, "hashes": {}},
        "samples": samples,
        "zip_data": None,
    }


def mds_bytes(rows: ExportRows, columns: dict[str, str], dtype: np.dtype[Any]) -> bytes:
    """An MDS shard.  MDS knows no nulls: a caption or metadata that is missing is "", a label -1.

    Layout: number of samples (uint32), offsets of samples and end (uint32), the configuration as JSON, the samples;
    a sample is the sizes (uint32) of its values of variable size, then all values in the order of the columns.
    Raises SpecError when it would pass 4 GiB, which the offsets cannot."""
    samples = []
    for values, indices in rows:
        data = [_mds_value(encoding, values, name, indices, dtype) for name, encoding in columns.items()]
        sizes = [len(each) for each, encoding in zip(data, columns.values(), strict=True) if encoding != "int"]
        samples.append(b"".join([struct.pack(f"<{len(sizes)}I", *sizes), *data]))
    config = json.dumps(_mds_config(columns), sort_keys=True).encode()
    begin = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = np.cumsum([begin, *map(len, samples)], dtype=np.int64)
    if offsets[-1] >= 1 << 32:
        raise SpecError("a token file makes an MDS shard of more than 4 GiB. Export to another format.")
    return b"".join([struct.pack("<I", len(samples)), offsets.astype("<u4").tobytes(), config, *samples])


def _mds_config(columns: dict[str, str]) -> dict[str, Any]:
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [8 if encoding == "int" else None for encoding in columns.values()],
    }


def _mds_value(
    encoding: str, values: dict[str, Any], name: str, indices: npt.NDArray[Any], dtype: np.dtype[Any]
) -> bytes:
    if name == "tokens":
        # A byte with the number of axes and the width of the sizes (1: 16 bits), the sizes, the values.
        return (
            bytes([3 << 2 | 1]) + np.array(indices.shape, "<u2").tobytes() + indices.astype(dtype, copy=False).tobytes()
        )
    if encoding == "int":
        return struct.pack("<q", -1 if values[name] is None else values[name])
    return (values[name] or "").encode()


# --- Megatron


def megatron_type(num_ids: int) -> np.dtype[Any]:
    """The integer type that Megatron-LM takes for a vocabulary of this size."""
    return np.dtype(np.uint16) if num_ids < 65500 else index_type(num_ids)


def megatron_index(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> bytes:
    """The .idx file for sequences of these lengths in the .bin file; each is a document of its own."""
    begin = np.append(0, np.cumsum(lengths, dtype=np.int64))[:-1] * dtype.itemsize
    header = struct.pack("<QBQQ", 1, _MEGATRON_TYPES[dtype.name], len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    return b"".join(
        [MEGATRON_MAGIC, header, lengths.astype("<i4").tobytes(), begin.astype("<i8").tobytes(), documents.tobytes()]
    )
