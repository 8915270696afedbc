"""Writes a finished dataset in the format of another loader.  What is interrupted goes on when it is run again.

Every token file becomes one file, published in one step under its number in the manifest, so what is there is done.
Megatron-LM wants all in a single file: that one is appended to, and a record tells how far it is whole."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import yaml

from pipeline.dataset_files import Manifest, read_job, read_manifest
from pipeline.export_formats import (
    ExportRows,
    index_type,
    mds_bytes,
    mds_columns,
    mds_shard_info,
    megatron_index,
    megatron_type,
    npy_bytes,
    read_export_rows,
    webdataset_bytes,
)
from pipeline.sequence import SequenceFormat
from pipeline.steps import reached
from pipeline.storage import Storage, open_storage
from schemas.errors import BsqError, OutputNotOurs, SpecError, nearest_name
from schemas.fingerprint import differing_fields
from schemas.job import Job

Target = Literal["megatron", "mds", "webdataset", "npy"]

RECORD_NAME = "export.json"
"""What an export holds and of which dataset; says `complete` when all of it is there."""

Observer = Callable[[int, int], None]
"""Called with the token files that are done and all of them."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    target: Target
    url: str
    files: int
    written: int
    """Token files that this run wrote; the others were there."""
    rows: int
    missing_shards: int
    """Shards of the dataset that were given up, and so are not in the export either."""

    def describe(self) -> str:
        text = f"{self.url}: {self.rows:,} rows of {self.files:,} token files as {self.target}"
        if self.written < self.files:
            text += f", {self.files - self.written:,} of them from an earlier run"
        if self.missing_shards:
            text += f"\n{self.missing_shards:,} shards of the dataset had failed and are missing."
        return text


def export_dataset(
    dataset: str,
    out: str,
    target: str,
    *,
    sequence: Path | None = None,
    generation: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    observe: Observer = lambda done, total: None,
) -> Export:
    """Write the dataset under `dataset` to `out`; `sequence` is a file with a SequenceFormat, for Megatron.

    Raises SpecError for what cannot be exported, OutputNotOurs when `out` holds something else."""
    if target not in get_args(Target):
        raise SpecError(
            f"--to {target}: choose from {', '.join(get_args(Target))}.{nearest_name(target, get_args(Target))}"
        )
    source, storage = open_storage(dataset, storage_options), open_storage(out, storage_options)
    job, manifest = read_job(source), read_manifest(source, generation)
    if job is None or manifest is None:
        raise SpecError(f"{source.url}: there is no finished dataset. See `bsq status {source.url}`.")
    form = None if sequence is None else read_sequence_format(sequence, job.tokenizer.bits)
    if target == "megatron":
        writer: _Writer = _Megatron(storage, job, form)
    elif form is not None:
        raise SpecError(f"--sequence goes with --to megatron; {target} keeps the tokens as they are.")
    else:
        writer = {"mds": _MDS, "webdataset": _WebDataset, "npy": _Npy}[target](storage, job)
    record = {
        "format": "bsqtok-export",
        "to": target,
        "fingerprint": manifest.summary.fingerprint,
        "manifest_sha256": manifest.summary.manifest_sha256,
        "bits": job.tokenizer.bits,
        "grid": list(job.tokenizer.grid),
        "sequence": None if form is None else form.to_json_dict(),
        "created_by": manifest.summary.created_by,
        "complete": False,
    }
    began = time.time()
    _claim(storage, record)
    written = 0
    total = len(manifest.table)
    for number, name in enumerate(_names(manifest)):
        observe(number, total)
        if not writer.has(number):
            writer.write(number, read_export_rows(source, name))
            written += 1
    observe(total, total)
    writer.finish(manifest)
    _write_record(storage, record | {"complete": True})
    # What killed runs were about to publish.
    storage.sweep_temporaries(began)
    rows, missing = manifest.summary.rows, manifest.summary.failed_shards
    return Export(target, storage.url, total, written, rows, missing)  # type: ignore[arg-type]


def read_sequence_format(path: Path, bits: int) -> SequenceFormat:
    """The SequenceFormat of a YAML file with its fields, for tokens of `bits` bits.  Raises SpecError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]}).") from error
    known = [field.name for field in fields(SequenceFormat) if field.init]
    if not isinstance(values, dict):
        raise SpecError(f"{path}: it holds no settings of a sequence, such as `eoi: 262145`.")
    for name in values:
        if name not in known:
            raise SpecError(f"{path}: there is no setting {name!r}.{nearest_name(str(name), known)}")
    try:
        form = SequenceFormat(**values)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{path}: {error}") from error
    form.check(bits)
    return form


def _names(manifest: Manifest) -> Iterator[str]:
    for batch in manifest.table.select(["file"]).to_batches(max_chunksize=4096):
        yield from batch["file"].to_pylist()


def _claim(storage: Storage, record: dict[str, Any]) -> None:
    """Begin the export, or go on with the same one."""
    try:
        found = json.loads(storage.read_bytes(RECORD_NAME))
    except FileNotFoundError:
        if entries := storage.entries():
            raise OutputNotOurs(f"{storage.url}: holds {entries[0]} and no export. Name an empty folder.") from None
        _write_record(storage, record)
        return
    except ValueError as error:
        raise OutputNotOurs(f"{storage.printable(RECORD_NAME)}: damaged. Name an empty folder.") from error
    loose = ("complete", "created_by")
    ours, theirs = ({name: each[name] for name in each if name not in loose} for each in (record, found))
    if differing := differing_fields(ours, theirs):
        raise OutputNotOurs(
            f"{storage.url}: holds another export ({'; '.join(differing)}). Name an empty folder, or remove it."
        )


def _write_record(storage: Storage, record: dict[str, Any]) -> None:
    storage.publish(RECORD_NAME, json.dumps(record, indent=1).encode() + b"\n", on_step=reached)


class _Writer:
    """Writes a file for each token file."""

    suffix: str

    def __init__(self, storage: Storage, job: Job) -> None:
        self.storage = storage
        self.carried = sorted(job.spec.carry)
        self.dtype = index_type(1 << job.tokenizer.bits)
        self._there = set(storage.list())

    def name(self, number: int) -> str:
        return f"tokens-{number:06d}{self.suffix}"

    def has(self, number: int) -> bool:
        return self.name(number) in self._there

    def write(self, number: int, rows: ExportRows) -> None:
        raise NotImplementedError

    def finish(self, manifest: Manifest) -> None:
        """Write what can only be written at the end."""

    def publish(self, name: str, data: bytes) -> None:
        """Put a file in its place, in one step."""
        self.storage.publish(name, data, on_step=reached)


class _Npy(_Writer):
    """`tokens-N.npy` int32 [frames, h, w]; `tokens-N.first.npy` where rows begin; `tokens-N.jsonl` a line for each."""

    suffix = ".npy"

    def write(self, number: int, rows: ExportRows) -> None:
        name = self.name(number).removesuffix(".npy")
        lines = [json.dumps(columns, ensure_ascii=False) + "\n" for columns, _ in rows]
        self.publish(f"{name}.jsonl", "".join(lines).encode())
        self.publish(f"{name}.first.npy", npy_bytes(rows.first_frame))
        self.publish(f"{name}.npy", npy_bytes(rows.frames.astype(self.dtype, copy=False)))


class _WebDataset(_Writer):
    suffix = ".tar"

    def write(self, number: int, rows: ExportRows) -> None:
        self.publish(self.name(number), webdataset_bytes(rows, self.dtype))


class _MDS(_Writer):
    suffix = ".mds"

    def write(self, number: int, rows: ExportRows) -> None:
        self.publish(self.name(number), mds_bytes(rows, self._columns, self.dtype))

    def finish(self, manifest: Manifest) -> None:
        shards = [
            mds_shard_info(self._columns, self.name(number), self.storage.size(self.name(number)), samples)
            for number, samples in enumerate(manifest.table["rows"].to_pylist())
            if samples
        ]
        self.publish("index.json", json.dumps({"version": 2, "shards": shards}).encode())

    @property
    def _columns(self) -> dict[str, str]:
        return mds_columns(self.carried, self.dtype)


class _Megatron(_Writer):
    """`tokens.bin` and `tokens.idx`.  `unfinished/` has what there is before all is there, and how far it is whole."""

    def __init__(self, storage: Storage, job: Job, form: SequenceFormat | None) -> None:
        super().__init__(storage, job)
        if not storage.is_local:
            raise SpecError(f"{storage.url}: Megatron's files grow by appending. Export to a disk, then copy them.")
        self._form = form or SequenceFormat()
        self.dtype = megatron_type(self._form.num_ids(job.tokenizer.bits))
        self._bin, self._lengths = "unfinished/tokens.bin", "unfinished/lengths"
        self._done = {"files": 0, "bin_bytes": 0, "lengths_bytes": 0}
        self._finished = {"tokens.bin", "tokens.idx"} <= self._there
        if not self._finished and storage.exists("unfinished/done.json"):
            self._done = json.loads(storage.read_bytes("unfinished/done.json"))

    def has(self, number: int) -> bool:
        return self._finished or number < self._done["files"]

    def write(self, number: int, rows: ExportRows) -> None:
        sequences = _sequences(self._form, rows)
        lengths = np.array([len(ids) for ids in sequences], "<i4")
        joined = np.concatenate([np.empty(0, np.int64), *sequences]).astype(self.dtype.newbyteorder("<"))
        self._done = {
            "files": number + 1,
            "bin_bytes": self._append(self._bin, self._done["bin_bytes"], joined.tobytes()),
            "lengths_bytes": self._append(self._lengths, self._done["lengths_bytes"], lengths.tobytes()),
        }
        self.publish("unfinished/done.json", json.dumps(self._done).encode())

    def finish(self, manifest: Manifest) -> None:
        if not self._finished:
            self._append(self._bin, self._done["bin_bytes"], b"")
            self._append(self._lengths, self._done["lengths_bytes"], b"")
            lengths = np.frombuffer(self.storage.read_bytes(self._lengths), "<i4")
            # The .idx first: while the .bin lies in the other folder, nobody takes the pair for whole.
            self.publish("tokens.idx", megatron_index(lengths, self.dtype))
            self.storage.local_path(self._bin).rename(self.storage.local_path("tokens.bin"))
        shutil.rmtree(self.storage.local_path("unfinished"), ignore_errors=True)

    def _append(self, name: str, whole: int, data: bytes) -> int:
        """Add `data` behind the first `whole` bytes; what lies behind these was cut off by the end of a run."""
        path = self.storage.local_path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(whole)
                file.seek(whole)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BsqError(
                f"{path}: cannot write it ({error.strerror}). Make room, then run the command again."
            ) from error
        return whole + len(data)


def _sequences(form: SequenceFormat, rows: ExportRows) -> list[npt.NDArray[np.int64]]:
    """The ids of each row."""
    counts = np.array(rows.columns["frames"], np.int64)
    labels = rows.columns.get("label", [None] * len(rows))
    first = rows.first_frame
    sequences: dict[int, npt.NDArray[np.int64]] = {}
    for count in np.unique(counts).tolist():
        numbers = np.flatnonzero(counts == count)
        indices = rows.frames[first[numbers, np.newaxis] + np.arange(count)]
        made = form.sequences(indices, labels=[labels[number] for number in numbers])
        sequences |= zip(numbers.tolist(), (each.ids for each in made), strict=True)
    return [sequences[number] for number in range(len(rows))]


def export_with_bar(dataset: str, out: str, target: str, **settings: Any) -> Export:
    """`export_dataset` with a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("token files", total=None)
        return export_dataset(
            dataset,
            out,
            target,
            observe=lambda done, total: progress.update(task, completed=done, total=total),
            **settings,
        )
