"""Begins a job: resolves what the user asked for, and creates the output or recognises it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.credentials import printable_url
from pipeline.dataset_files import JOB_NAME, draft_name, list_generations, plan_name, read_job, serialise_plan
from pipeline.generations import list_begun, read_plans
from pipeline.sources import expand_shards
from pipeline.steps import reached
from pipeline.storage import Storage
from pipeline.stub import STUB_NAME, stub_record
from schemas.errors import FingerprintDiffers, LeaseLost, OutputNotOurs, Refused, SpecError
from schemas.fingerprint import differing_fields, fingerprint, fingerprint_fields
from schemas.job import Job, TokenizerRecord
from schemas.jobspec import JobSpec, merge_specs
from tokenizer.checkpoint import CheckpointFiles, read_checkpoint

STUB_IMAGE_SIZE = 256
STUB_MAX_FRAMES = 16
SHOWN_DIFFERENCES = 4
# What a job that was killed while it began may have left behind; anything else in a folder is not ours.
_BEGINNINGS = {"lease.json", "tokenizer/", "plan/", "logs/"}


@dataclass(frozen=True, slots=True)
class Beginning:
    """A job that is about to begin, or to go on."""

    job: Job
    urls: list[str]
    """URLs to read from, credentials included; position is the shard's number."""
    checkpoint: CheckpointFiles | None
    """None for the stub encoder."""


def created_by() -> str:
    """`bsqtok 0.1.0`"""
    try:
        return f"bsqtok {version('bsqtok')}"
    except PackageNotFoundError:
        return "bsqtok (not installed)"


def resolve(spec: JobSpec, *, gpus: bool, storage_options: dict[str, Any]) -> Beginning:
    """Make every choice of the spec concrete, expand its URLs and compute the fingerprint.

    Raises SpecError or CheckpointError."""
    urls = expand_shards(list(spec.shards), storage_options)
    record, checkpoint = _read_tokenizer(spec, storage_options)
    return Beginning(_make_job(_concrete(spec, record, gpus=gpus), record, urls), urls, checkpoint)


def resolve_append(
    storage: Storage, existing: Job, before: JobSpec, asked: JobSpec, *, storage_options: dict[str, Any]
) -> Beginning:
    """The job that would add the shards of `asked` to a dataset.  What was not asked for is as in `before`.

    Raises FingerprintDiffers when something asked for decides bits and differs from the dataset's."""
    spec = merge_specs(before, asked)
    if asked.dtype == "auto":
        spec = spec.model_copy(update={"dtype": before.dtype})
    record = existing.tokenizer
    if "tokenizer" in asked.model_fields_set:
        record, _ = _read_tokenizer(spec, storage_options)
        # Before its sizes are compared with those of the spec: another tokenizer is the reason to name.
        theirs = {name: existing.fingerprint_fields[name] for name in ("tokenizer", "weight_sha256")}
        ours = {"tokenizer": _architecture(record.config), "weight_sha256": record.weight_sha256}
        if ours != theirs:
            raise _other_settings(storage, ours, theirs)
    urls = expand_shards(list(asked.shards), storage_options)
    job = _make_job(_concrete(spec, record, gpus=False), record, urls)
    if job.fingerprint != existing.fingerprint:
        raise _other_settings(storage, job.fingerprint_fields, existing.fingerprint_fields)
    return Beginning(job, urls, None)


def _read_tokenizer(spec: JobSpec, storage_options: dict[str, Any]) -> tuple[TokenizerRecord, CheckpointFiles | None]:
    """The tokenizer that a spec names; None for the files of the stub encoder."""
    if spec.tokenizer == STUB_NAME:
        size = spec.preprocess.size if isinstance(spec.preprocess.size, int) else STUB_IMAGE_SIZE
        frames = spec.clips.clip_frames if isinstance(spec.clips.clip_frames, int) else STUB_MAX_FRAMES
        return stub_record(size, frames), None
    checkpoint = read_checkpoint(spec.tokenizer, storage_options=storage_options)
    config = checkpoint.config()
    weight_sha256 = checkpoint.weight_sha256()
    record = TokenizerRecord(
        name=printable_url(spec.tokenizer),
        config=config.to_json_dict(),
        weight_sha256=weight_sha256,
        folder=f"tokenizer/{weight_sha256[:8]}",
        bits=config.bits_per_token,
        group_size=config.group_size,
        patch_size=config.patch_size,
        grid=config.grid,
    )
    return record, checkpoint


def _make_job(resolved: JobSpec, record: TokenizerRecord, urls: list[str]) -> Job:
    fields = fingerprint_fields(resolved, _architecture(record.config), record.weight_sha256)
    printable = [printable_url(url) for url in urls]
    patterns = tuple(printable_url(pattern) for pattern in resolved.shards)
    return Job(
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        spec=resolved.model_copy(update={"shards": patterns, "out": printable_url(resolved.out)}),
        tokenizer=record,
        plan_sha256=hashlib.sha256(serialise_plan(printable)).hexdigest(),
        created_by=created_by(),
    )


def recognise(storage: Storage, beginning: Beginning) -> Job | None:
    """Return the job that the output already holds, if it is this one; None where there is nothing yet.

    Raises FingerprintDiffers, Refused (other shards) or OutputNotOurs."""
    existing = read_job(storage)
    job = beginning.job
    if existing is None:
        strangers = [name for name in storage.entries() if name not in _BEGINNINGS]
        if strangers:
            raise OutputNotOurs(
                f"{storage.url}: the folder holds {strangers[0]!r} but no {JOB_NAME}; it is no bsqtok dataset. "
                f"Choose an empty or new folder."
            )
        return None
    if existing.fingerprint != job.fingerprint:
        raise _other_settings(storage, job.fingerprint_fields, existing.fingerprint_fields)
    # Not by the plan's hash: another version of Arrow writes other bytes for the same URLs.
    begun = list_begun(storage)
    planned = read_plans(storage, begun).urls()
    asked = [printable_url(url) for url in beginning.urls]
    # The command that began the dataset stays good after shards were added to it.
    if asked != planned and asked != read_plans(storage, [0]).urls():
        num_others, num_missing = len(set(asked) - set(planned)), len(set(planned) - set(asked))
        is_finished = begun[-1] in list_generations(storage)
        remedy = "--append adds" if is_finished else "Use `bsq resume` to finish it as it is; then --append adds"
        raise Refused(
            f"{storage.url}: was begun with other shards ({num_others:,} of those asked for are not in it, "
            f"{num_missing:,} of it are not asked for). {remedy} those that are not in it."
        )
    return existing


def write_beginning(storage: Storage, beginning: Beginning) -> None:
    """Create the output: tokenizer, draft of the plan, job.json, create-only, and the plan.  Without job.json there is
    nothing yet.

    Raises LeaseLost when another driver has begun another job there."""
    job = beginning.job
    if beginning.checkpoint is not None:
        storage.publish(f"{job.tokenizer.folder}/config.json", beginning.checkpoint.config_json)
        storage.publish(f"{job.tokenizer.folder}/model.safetensors", beginning.checkpoint.model_safetensors)
    plan = serialise_plan([printable_url(url) for url in beginning.urls])
    write_draft(storage, 0, plan)
    reached("before_job")
    data = json.dumps(job.model_dump(mode="json"), indent=1, ensure_ascii=False).encode() + b"\n"
    if not storage.create_only(JOB_NAME, data) and storage.read_bytes(JOB_NAME) != data:
        raise LeaseLost(f"{storage.url}: another driver has begun the dataset. See `bsq status`.")
    name_plan(storage, 0, plan)


def write_draft(storage: Storage, generation: int, plan: bytes) -> None:
    """Write a plan that no record names yet, where nobody writes other bytes."""
    storage.publish(draft_name(generation, hashlib.sha256(plan).hexdigest()), plan)


def name_plan(storage: Storage, generation: int, plan: bytes) -> None:
    """Give the plan that a record names its own name, and remove drafts: the record has decided between them.

    Records are create-only, so whoever comes late writes the same bytes."""
    reached("before_plan")
    name = plan_name(generation)
    if not storage.create_only(name, plan) and storage.read_bytes(name) != plan:
        # It lay there before there was a record, and nobody else writes what the record does not name.
        storage.publish(name, plan)
    for file in storage.list("plan"):
        if file.startswith(f"{generation:04d}-"):
            storage.delete(f"plan/{file}")


def _other_settings(storage: Storage, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> FingerprintDiffers:
    differences = differing_fields(ours, theirs)
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = f"; {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
    return FingerprintDiffers(
        f"{storage.url}: holds tokens made with other settings ({shown}{more}). "
        f"Choose another folder, or ask for the same settings to go on with this one."
    )


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What of a tokenizer's config decides bits: all but its name, and how it was trained."""
    return {name: value for name, value in config.items() if name not in ("preset", "trained", "losses")}


def _concrete(spec: JobSpec, record: TokenizerRecord, *, gpus: bool) -> JobSpec:
    image_size, max_frames = record.config["image_size"], record.config["max_frames"]
    size = spec.preprocess.size
    if size == "tokenizer":
        size = image_size
    elif size != image_size:
        raise SpecError(
            f"preprocess.size is {size}, but the tokenizer {record.name} takes {image_size}. "
            f"Leave size out, or choose another tokenizer."
        )
    clip_frames = spec.clips.clip_frames
    if clip_frames == "tokenizer":
        clip_frames = max_frames
    elif clip_frames > max_frames:
        raise SpecError(
            f"clips.clip_frames is {clip_frames}, but the tokenizer {record.name} encodes at most {max_frames} frames "
            f"together. Ask for {max_frames} or fewer."
        )
    stride = clip_frames if spec.clips.stride == "clip" else spec.clips.stride
    dtype = spec.dtype if spec.dtype != "auto" else ("bfloat16" if gpus else "float32")
    return spec.model_copy(
        update={
            "preprocess": spec.preprocess.model_copy(update={"size": size}),
            "clips": spec.clips.model_copy(update={"clip_frames": clip_frames, "stride": stride}),
            "dtype": dtype,
        }
    )
