"""Says what a dataset, or any one of its files, is and holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.display import counted, describe_bytes, field_line, plain_text, shortened_text
from jobs.inspect_compression import describe_bsq
from jobs.inspect_token_models import describe_token_model
from pipeline.credentials import printable_url
from pipeline.dataset_files import (
    JOB_NAME,
    LEASE_NAME,
    PLAN_SCHEMA,
    StoredFile,
    iter_commits,
    list_generations,
    read_job,
    read_ledger,
    read_manifest,
    read_plan,
)
from pipeline.generations import command_of, list_begun, read_generation
from pipeline.parquet import PARQUET_ERRORS, open_parquet, read_parquet
from pipeline.storage import Storage, open_storage
from schemas.bsqfile import MAGIC
from schemas.errors import BsqError, SpecError
from schemas.failures import FAILURE_SCHEMA
from schemas.job import GenerationRecord, Job
from schemas.ledger import Attempt, Commit, GivenUp, parse_lines, segment_range
from schemas.manifest import MANIFEST_SCHEMA, ManifestSummary, latest_parts
from schemas.tokenfile import TokenFooter

SHOWN_ROWS = 5
SHOWN_INDICES = 6
SHOWN_FAILURES = 5
MAX_FAILURE_TABLES = 64
"""Failure tables that are read to name the commonest failures."""
MAX_TEXT_CHARS = 100


def describe(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """A few lines for people about the dataset, tokenizer or file at `url`; one line for what is none of them.

    Raises SpecError when there is nothing, BsqError when a file of ours is damaged."""
    url = url.rstrip("/") or url
    storage = open_storage(url, storage_options)
    if storage.exists(JOB_NAME):
        return _describe_dataset(storage)
    if storage.exists("config.json") and storage.exists("model.safetensors"):
        return describe_token_model(storage) or _describe_tokenizer(storage)
    parent, slash, name = url.rpartition("/")
    folder = open_storage(parent or slash or ".", storage_options)
    if name and folder.exists(name):
        described = _describe_file(folder, name)
        return described if slash else described.removeprefix("./")
    raise SpecError(
        f"{printable_url(url)}: no dataset (it has no {JOB_NAME}), no tokenizer and no file. Name a dataset's folder, "
        f"or one of its files."
    )


# --- datasets


def _describe_dataset(storage: Storage) -> str:
    job = read_job(storage)
    assert job is not None
    generations = list_generations(storage)
    if generations:
        manifest = read_manifest(storage, generations[-1])
        assert manifest is not None
        summary, table = manifest.summary, manifest.table
        state = f"finished (generation {summary.generation})"
        if not summary.complete:
            state += f", but {counted(summary.failed_shards, 'shard')} failed"
        counts = summary.model_dump()
        frames = _range(table["min_frames"].to_pylist(), table["max_frames"].to_pylist())
        tables = table.filter(pa.array(latest_parts(table)))["failures_file"].drop_null().to_pylist()
        failed_shards = summary.first_failed_shards
    else:
        ledger = read_ledger(storage, 0, keep_commits=False)
        totals = ledger.totals
        num_shards = len(read_plan(storage, 0))
        state = f"not finished: {totals.commits:,} of {num_shards:,} shards committed. `bsq resume` goes on"
        counts = {
            "files": totals.commits,
            "rows": totals.rows,
            "tokens": totals.tokens,
            "samples": totals.samples,
            "failed": totals.failed,
            "warnings": totals.warnings,
            "failed_shards": len(ledger.given_up),
            "partial_shards": totals.partial,
            "bytes": totals.bytes,
        }
        lowest, highest, tables = [], [], []
        for commit in iter_commits(storage, 0):
            lowest.append(commit.min_frames)
            highest.append(commit.max_frames)
            if commit.failures is not None and len(tables) <= MAX_FAILURE_TABLES:
                tables.append(commit.failures.file)
        frames = _range(lowest, highest)
        failed_shards = sorted(ledger.given_up)
    lines = [
        f"{storage.url}: bsqtok dataset, {state}",
        *_identity(job),
        field_line(
            "samples",
            f"{counts['samples']:,}, of which {counts['failed']:,} failed; {counted(counts['warnings'], 'warning')}",
        ),
        field_line("rows", f"{counts['rows']:,} {frames}, {counts['tokens']:,} tokens"),
        field_line(
            "size",
            f"{describe_bytes(counts['bytes'])} in {counted(counts['files'], 'token file')}, {_rate(job, counts)}",
        ),
    ]
    begun = list_begun(storage)
    lines += [_describe_generation(read_generation(storage, job, number), generations) for number in begun[1:]]
    if counts["partial_shards"]:
        lines.append(field_line("partial", f"{counted(counts['partial_shards'], 'shard')} whose archive was damaged"))
    if failed_shards:
        shown = ", ".join(map(str, failed_shards[:10]))
        more = f" and {counts['failed_shards'] - 10:,} more" if counts["failed_shards"] > 10 else ""
        lines.append(field_line("failed shards", shown + more))
    return "\n".join(lines + _commonest_failures(storage, tables))


def _describe_generation(record: GenerationRecord, finished: Sequence[int]) -> str:
    did = {
        "tokenize": "the first run",
        "append": "added shards",
        "retry": "tried failed shards again",
        "retry-samples": "tried failed samples again",
        "retry-damaged": "tried the rest of damaged shards again",
    }[record.kind]
    state = "" if record.generation in finished else "; not finished: `bsq resume` goes on"
    return field_line(f"generation {record.generation}", did + state)


def _identity(job: Job) -> list[str]:
    tokenizer, spec = job.tokenizer, job.spec
    trained = "" if tokenizer.config.get("trained") else ", random weights: it was never trained"
    preset = tokenizer.config.get("preset", "custom")
    rows, columns = tokenizer.grid
    preprocess = spec.preprocess
    views = f", {preprocess.views} views" if preprocess.views > 1 else ""
    return [
        field_line(
            "tokenizer",
            f"{plain_text(tokenizer.name)} ({plain_text(str(preset))}{trained}), weights {tokenizer.weight_sha256[:8]}",
        ),
        field_line(
            "tokens",
            f"{rows} x {columns} for each frame of {columns * tokenizer.patch_size} x {rows * tokenizer.patch_size} "
            f"px, {tokenizer.bits} bits each in groups of {tokenizer.group_size}",
        ),
        field_line(
            "pictures",
            f"{preprocess.crop} crop, {preprocess.filter} ({preprocess.engine}){views}; clips of "
            f"{spec.clips.clip_frames} frames at {spec.clips.fps} fps; {spec.dtype}",
        ),
        field_line("carried", ", ".join(spec.carry) or "nothing"),
        field_line("fingerprint", job.fingerprint),
        field_line("made by", plain_text(job.created_by)),
    ]


def _rate(job: Job, counts: Mapping[str, Any]) -> str:
    pixels = counts["tokens"] * job.tokenizer.patch_size**2
    if not pixels:
        return "no pixels"
    token_rate = job.tokenizer.bits / job.tokenizer.patch_size**2
    return f"{counts['bytes'] * 8 / pixels:.3f} bits per pixel ({token_rate:.3f} for the tokens alone)"


def _range(lowest: Sequence[int], highest: Sequence[int]) -> str:
    low, high = min(filter(None, lowest), default=0), max(highest, default=0)
    if high <= 1:
        return "of one frame"
    return f"of {low} frames" if low == high else f"of {low} to {high} frames"


def _commonest_failures(storage: Storage, tables: Sequence[str]) -> list[str]:
    counts: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], str] = {}
    for name in tables[:MAX_FAILURE_TABLES]:
        try:
            columns = ["severity", "stage", "error", "message"]
            rows = read_parquet(StoredFile(storage, name), columns).to_pylist()
        except PARQUET_ERRORS as error:
            raise BsqError(f"{storage.printable(name)}: cannot be read. Run `bsq verify {storage.url}`.") from error
        for row in rows:
            kind = (row["severity"], row["stage"], row["error"])
            counts[kind] += 1
            examples.setdefault(kind, row["message"])
    if not counts:
        return []
    where = f" in the first {MAX_FAILURE_TABLES} failure tables" if len(tables) > MAX_FAILURE_TABLES else ""
    lines = [f"  commonest failures and warnings{where}"]
    for kind, count in counts.most_common(SHOWN_FAILURES):
        lines.append(f"    {count:>7,} {kind[0]:<7} {kind[1]:<7} {kind[2]}, for example: {_shorten(examples[kind])}")
    if len(counts) > SHOWN_FAILURES:
        rest = counts.total() - sum(count for _, count in counts.most_common(SHOWN_FAILURES))
        lines.append(f"    {rest:>7,} more, of {counted(len(counts) - SHOWN_FAILURES, 'other kind')}")
    return lines


def _describe_tokenizer(storage: Storage) -> str:
    try:
        config = json.loads(storage.read_bytes("config.json"))
        size, patch = int(config["image_size"]), int(config["patch_size"])
        bits, frames = int(config["bits_per_token"]), int(config["max_frames"])
    except (ValueError, KeyError, TypeError) as error:
        raise BsqError(f"{storage.printable('config.json')}: no config of a bsqtok tokenizer ({error}).") from error
    trained = "trained" if config.get("trained") else "random weights: it was never trained"
    clips = f" and clips of up to {frames} frames" if frames > 1 else ""
    return "\n".join(
        [
            f"{storage.url}: bsqtok tokenizer {plain_text(str(config.get('preset', 'custom')))}, {trained}",
            field_line("takes", f"pictures{clips}, {size} x {size} px"),
            field_line("gives", f"{size // patch} x {size // patch} tokens of {bits} bits for each frame"),
            field_line("weights", describe_bytes(storage.size("model.safetensors"))),
        ]
    )


# --- single files


def _describe_file(storage: Storage, name: str) -> str:
    head = storage.read_range(name, 0, 512)
    what = storage.printable(name)
    if head[:4] == b"PAR1":
        return _describe_parquet(storage, name)
    if head.startswith(MAGIC):
        return describe_bsq(storage, name)
    if segment_range(name) is not None:
        return _describe_segment(storage, name)
    if name == LEASE_NAME or (name.endswith(".json") and head[:1] == b"{"):
        return _describe_json(storage, name)
    if head[257:262] == b"ustar":
        size = describe_bytes(storage.size(name))
        return f"{what}: a tar archive of {size}, so perhaps a shard. `bsq tokenize` makes tokens of it."
    begins = f"it begins with {head[:12]!r}" if head else "it is empty"
    return f"{what}: no file of a bsqtok dataset; {begins}."


def _describe_parquet(storage: Storage, name: str) -> str:
    what = storage.printable(name)
    try:
        file = open_parquet(StoredFile(storage, name))
        names = file.schema_arrow.names
        if b"bsqtok.bits" in (file.metadata.metadata or {}):
            return _describe_token_file(what, file)
        if names == FAILURE_SCHEMA.names:
            return _describe_failure_table(what, file)
        if names == MANIFEST_SCHEMA.names:
            return _describe_manifest_table(what, file)
        if names == PLAN_SCHEMA.names:
            plan = file.read(use_threads=False)
            first = [f"  {row['shard']:>7} {_shorten(row['url'])}" for row in plan.slice(0, SHOWN_ROWS).to_pylist()]
            return "\n".join(
                [f"{what}: the plan of a dataset, {counted(len(plan), 'shard')}", *first, *_more(len(plan))]
            )
    except PARQUET_ERRORS as error:
        raise BsqError(f"{what}: damaged Parquet ({_shorten(str(error))}). Restore it from a copy.") from error
    rows = counted(file.metadata.num_rows, "row")
    return f"{what}: a Parquet file of {rows}, but none of bsqtok ({_shorten(', '.join(names[:6]))})."


def _describe_token_file(what: str, file: pq.ParquetFile) -> str:
    metadata = file.metadata
    footer = TokenFooter.from_metadata(metadata.metadata)
    part = f", part {footer.part}" if footer.part else ""
    partial = "; the archive was damaged, this holds what could be read" if footer.partial else ""
    lines = [
        f"{what}: token file of shard {footer.shard}{part}, {counted(metadata.num_rows, 'row')}{partial}",
        field_line("samples", f"{footer.samples:,}, of which {footer.failed:,} failed"),
        field_line(
            "tokens",
            f"{footer.grid[0]} x {footer.grid[1]} for each frame, {footer.bits} bits each in groups of "
            f"{footer.group_size}, {footer.bit_order}, channels {footer.channel_order}, {footer.views} view"
            + "s"
            * (footer.views > 1),
        ),
        field_line(
            "source",
            f"{footer.source_bytes:,} bytes"
            + (f", tag {plain_text(footer.source_etag)}" if footer.source_etag else ""),
        ),
        field_line("failures", f"table with SHA-256 {footer.failures_sha256}" if footer.failures_sha256 else "none"),
        field_line("fingerprint", footer.fingerprint),
        "  columns",
    ]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for index in range(metadata.num_columns):
        chunks = [group.column(index) for group in groups]
        name = metadata.schema.column(index).path.partition(".")[0]
        size = describe_bytes(sum(chunk.total_compressed_size for chunk in chunks))
        codec = chunks[0].compression.lower() if chunks else ""
        kind = file.schema_arrow.field(name).type
        words = f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)
        lines.append(f"    {name:<14} {words:<14} {size:>10} {codec}")
    column = file.schema_arrow.names.index("tokens")
    lines.append(f"  row groups     {len(groups):,}")
    lines += [
        f"    {number:>3}: {group.num_rows:>5,} rows, tokens at byte {group.column(column).data_page_offset:,}"
        for number, group in enumerate(groups[:SHOWN_ROWS])
    ]
    lines += _more(len(groups))
    if not metadata.num_rows:
        return "\n".join(lines)
    rows = file.read_row_group(0, use_threads=False).slice(0, SHOWN_ROWS).to_pylist()
    lines.append("  first rows")
    for row in rows:
        crop = "{},{} {}x{}".format(*row["crop"])
        flipped = ", mirrored" if row["flipped"] else ""
        start = f", from {row['start']:.2f} s" if row["start"] is not None else ""
        lines.append(
            f"    {_shorten(row['key'])} clip {row['clip']} view {row['view']}: "
            f"{counted(row['frames'], 'frame')}{start}, {row['width']}x{row['height']} cropped to {crop}{flipped}"
        )
        lines.append(f"      indices {' '.join(map(str, _first_indices(row, footer)))} ...")
        if row.get("caption"):
            lines.append(f"      caption {_shorten(row['caption'])}")
    return "\n".join(lines + _more(metadata.num_rows))


def _first_indices(row: Mapping[str, Any], footer: TokenFooter) -> list[int]:
    count = min(SHOWN_INDICES, row["frames"] * footer.grid[0] * footer.grid[1])
    packed = int.from_bytes(row["tokens"][: -(-count * footer.bits // 8)], "little")
    return [packed >> number * footer.bits & (1 << footer.bits) - 1 for number in range(count)]


def _describe_failure_table(what: str, file: pq.ParquetFile) -> str:
    rows = file.read(use_threads=False).to_pylist()
    shard = (file.metadata.metadata or {}).get(b"bsqtok.shard", b"").decode("utf-8", "replace")
    counts = Counter((row["severity"], row["stage"], row["error"]) for row in rows)
    lines = [f"{what}: failure table{f' of shard {shard}' if shard else ''}, {counted(len(rows), 'row')}"]
    lines += [
        f"    {count:>7,} {severity:<7} {stage:<7} {error}" for (severity, stage, error), count in counts.most_common()
    ]
    lines.append("  first rows")
    for row in rows[:SHOWN_ROWS]:
        where = "the archive" if row["key"] is None else _shorten(row["key"])
        clip = f" clip {row['clip']}" if row["clip"] is not None else ""
        lines.append(f"    {where}{clip}: {row['error']}: {_shorten(row['message'])}")
    return "\n".join(lines + _more(len(rows)))


def _describe_manifest_table(what: str, file: pq.ParquetFile) -> str:
    columns = ["shard", "part", "rows", "failed", "file", "url"]
    table = file.read(columns=columns, use_threads=False)
    lines = [
        f"{what}: manifest, {counted(len(table), 'token file')}, {counted(pc.sum(table['rows']).as_py() or 0, 'row')}"
    ]
    lines += [
        f"    {_shard_line(*(row[name] for name in columns[:-1]))} from {_shorten(row['url'])}"
        for row in table.slice(0, SHOWN_ROWS).to_pylist()
    ]
    return "\n".join(lines + _more(len(table)))


def _shard_line(shard: int, part: int, rows: int, failed: int, file: str) -> str:
    which = f"shard {shard}, part {part}" if part else f"shard {shard}"
    return f"{which}: {counted(rows, 'row')}, {counted(failed, 'sample')} failed, {file}"


def _describe_segment(storage: Storage, name: str) -> str:
    what = storage.printable(name)
    records = list(parse_lines(storage.read_bytes(name), name=what))
    counts = Counter(record.kind for record in records)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
    lines = [f"{what}: ledger segment, {counted(len(records), 'record')} ({kinds or 'none'})"]
    for record in islice(records, SHOWN_ROWS):
        if isinstance(record, Commit):
            text = _shard_line(record.shard, record.part, record.rows, record.failed, record.file)
        elif isinstance(record, Attempt):
            text = f"shard {record.shard}, attempt {record.attempt}: {record.error}: {_shorten(record.message)}"
        elif isinstance(record, GivenUp):
            text = f"shard {record.shard}: given up after {record.attempts} attempts: {_shorten(record.message)}"
        else:
            text = _shorten(record.to_line())
        lines.append(f"    {record.kind:<10} {text}")
    return "\n".join(lines + _more(len(records)))


def _describe_json(storage: Storage, name: str) -> str:
    what = storage.printable(name)
    try:
        values = json.loads(storage.read_bytes(name))
    except ValueError as error:
        raise BsqError(f"{what}: damaged JSON ({error}). Restore it from a copy.") from error
    if name == LEASE_NAME:
        return f"{what}: says who drives the job: process {values.get('pid')} on {plain_text(str(values.get('host')))}."
    if values.get("format") == "bsqtok" and "manifest_sha256" in values:
        summary = ManifestSummary.model_validate(values)
        state = "complete" if summary.complete else f"{counted(summary.failed_shards, 'shard')} failed"
        return (
            f"{what}: manifest of generation {summary.generation} ({state}): {counted(summary.files, 'token file')}, "
            f"{counted(summary.rows, 'row')}, {summary.tokens:,} tokens, {describe_bytes(summary.bytes)}."
        )
    if values.get("format") == "bsqtok" and "kind" in values:
        record = GenerationRecord.model_validate(values)
        return f"{what}: what generation {record.generation} does: `{command_of(record.kind)}`."
    if name == JOB_NAME:
        return "\n".join([f"{what}: the identity of a dataset", *_identity(Job.model_validate(values))])
    return f"{what}: a JSON file with {', '.join(plain_text(key) for key in islice(values, 6)) or 'nothing in it'}."


# --- words


def _more(count: int) -> list[str]:
    return [f"    and {count - SHOWN_ROWS:,} more"] if count > SHOWN_ROWS else []


def _shorten(text: str) -> str:
    return shortened_text(text, MAX_TEXT_CHARS)
