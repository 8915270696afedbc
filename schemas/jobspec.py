"""Everything a user may decide about a job, validated on entry, in the order in which a user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from schemas.errors import SpecError, nearest_name

Column = Literal["caption", "label", "metadata"]
Filter = Literal["lanczos", "bicubic", "bilinear"]
Engine = Literal["torch", "pillow"]


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


class SpecSection(BaseModel):
    """Settings that belong together.  Unknown ones are refused, and true or false where a number is meant."""

    # Infinity has no JSON form, so a job.json with one could not be read back.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which would be 1.
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and any(isinstance(part, bool) for part in parts):
            raise PydanticKnownError("float_type" if float in kinds else "int_type")
        return value


class PreprocessSpec(SpecSection):
    """How a decoded frame becomes a square of `size` pixels.  All of it changes bits."""

    size: Annotated[int, Field(ge=8, le=4096)] | Literal["tokenizer"] = "tokenizer"
    """Side of the square in pixels; "tokenizer" takes the size that the tokenizer was trained at."""
    crop: Literal["center", "random", "exact"] = "center"
    """center: the largest centred square.  random: a square placed by the view's seed.  exact: the whole picture,
    squeezed to a square."""
    filter: Filter = "lanczos"
    """Resampling filter, always antialiased."""
    engine: Engine = "torch"
    """Which implementation resizes: torch (3-5x faster) or pillow.  They differ by rounding, so they never mix."""
    views: Annotated[int, Field(ge=1, le=64)] = 1
    """Crops made of each image or clip."""
    random_scale: tuple[float, float] = (0.5, 1.0)
    """With crop: random, the side of the square as a share of the short side, drawn between these two."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a view is mirrored left to right."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the views; a view depends on (seed, key, view number) alone."""
    truncated: Literal["fail", "keep"] = "fail"
    """A picture that ends early: a failure, or tokenized as a lenient decoder gives it, with a warning row."""

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        low, high = self.random_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"random_scale is [{low}, {high}]; it must satisfy 0 < low <= high <= 1")
        if self.views > 1 and self.crop != "random" and self.flip == 0:
            raise ValueError(f"views is {self.views}, but with crop {self.crop!r} and no flip all views are the same")
        return self


class ClipSpec(SpecSection):
    """How a video is cut into clips.  All of it changes bits."""

    fps: Annotated[float, Field(gt=0, le=1000)] | Literal["source"] = 8.0
    """Frames per second picked from a video, by time; "source" takes every frame."""
    clip_frames: Annotated[int, Field(ge=1, le=4096)] | Literal["tokenizer"] = "tokenizer"
    """Frames in one clip; "tokenizer" takes the most that the tokenizer can encode together."""
    stride: Annotated[int, Field(ge=1)] | Literal["clip"] = "clip"
    """Picked frames from the start of one clip to the next; "clip" is clip_frames: no overlap, no gap."""
    short_clips: Literal["keep", "drop"] = "keep"
    """The last clip of a video may have fewer frames: keep it as it is, or drop it."""


class LimitsSpec(SpecSection):
    """What is refused before it costs memory or time.  Decides which rows exist, never their bits."""

    max_pixels: Annotated[int, Field(ge=64)] = 64_000_000
    """Pixels of one picture or frame, read from the header before anything is decoded."""
    max_side: Annotated[int, Field(ge=8)] = 32_768
    """Longest side in pixels."""
    min_side: Annotated[int, Field(ge=1)] = 8
    """Shortest side in pixels."""
    max_member_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    """Bytes of one media member."""
    max_sidecar_bytes: Annotated[int, Field(ge=1)] = 1 << 20
    """Bytes of one caption, label or metadata member."""
    max_video_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Length of one video."""
    max_video_frames: Annotated[int, Field(ge=1)] = 200_000
    """Frames decoded of one video."""
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Decoding time of one video, looked at between frames."""


class RunSpec(SpecSection):
    """How the job runs.  Nothing here changes a bit or a row."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Workers, one per GPU (or share of the CPUs); 0 is one for each GPU, or for each node where there is none."""
    batch: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Images encoded together; clips are batched so that their frames come near the same number."""
    cpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """CPUs that one worker decodes with; 0 shares out what the machine has."""
    decode_processes: Annotated[int, Field(ge=0, le=1024)] = 0
    """Child processes that decode, in each worker: slower, but a codec that crashes costs one sample and no worker.
    0 decodes in threads, and only what may have crashed a worker in children."""
    decode_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of undecoded members that may wait in one worker; 0 is 8 MiB for each of its CPUs, 16 MiB at least."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Attempts at a shard before it is given up."""
    hang_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A worker that makes no progress for so long is killed and its shards are given to others."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of samples that may fail before the job ends with exit code 3."""
    strict_arithmetic: bool = False
    """Refuse tokens of another device, batch or version than made the dataset's."""


class JobSpec(SpecSection):
    """One tokenization job."""

    shards: tuple[str, ...] = ()
    """URLs of WebDataset shards: any fsspec URL, {000..127} ranges, globs, or @list.txt."""
    out: str = ""
    """Folder or URL of the dataset that is written."""
    tokenizer: str = "default"
    """Name, folder or URL of the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the encoder; auto is bfloat16 where there are GPUs, float32 otherwise."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the encoder runs; auto is cuda where there is one."""
    carry: tuple[Column, ...] = ("caption", "label", "metadata")
    """Members that are carried along as columns: caption (.txt, .caption), label (.cls), metadata (.json)."""
    damaged_shards: Literal["keep", "fail"] = "keep"
    """A damaged archive: commit the samples before the damage as partial, or fail the shard."""
    preprocess: PreprocessSpec = PreprocessSpec()
    """How a frame becomes a square."""
    clips: ClipSpec = ClipSpec()
    """How a video becomes clips."""
    limits: LimitsSpec = LimitsSpec()
    """What is refused."""
    run: RunSpec = RunSpec()
    """How the job runs."""

    @model_validator(mode="after")
    def _check_carry(self) -> Self:
        if len(set(self.carry)) != len(self.carry):
            raise ValueError(f"carry names a column twice: {', '.join(self.carry)}")
        return self


def parse_spec(values: dict[str, Any], *, source: str) -> JobSpec:
    """Validate a plain dictionary.

    Raises SpecError with one line for the first thing that is wrong; an unknown key names the nearest valid one."""
    try:
        return JobSpec.model_validate(values)
    except pydantic.ValidationError as error:
        raise SpecError(f"{source}: {_first_problem(error)}") from error


def merge_specs(base: JobSpec, asked: JobSpec) -> JobSpec:
    """Return `base` with those settings of `asked` that were given and not left at their defaults."""

    def merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        sections = {name: value for name, value in given.items() if isinstance(value, dict)}
        return values | given | {name: merged(values[name], section) for name, section in sections.items()}

    return JobSpec.model_validate(merged(base.model_dump(), asked.model_dump(exclude_unset=True)))


def selection_differences(before: JobSpec, now: JobSpec) -> list[tuple[str, Any, Any]]:
    """The settings in which two specs differ that decide which rows exist but not their bits: name and both values."""
    old, new = (spec.limits.model_dump() for spec in (before, now))
    values = [(f"limits.{name}", old[name], new[name]) for name in old]
    values.append(("damaged_shards", before.damaged_shards, now.damaged_shards))
    return [(name, previous, value) for name, previous, value in values if previous != value]


def read_spec(path: str | Path) -> dict[str, Any]:
    """Read a job.yaml as a dictionary, to be joined with options and validated by `parse_spec`.

    Raises SpecError when the file is missing, is no YAML, or is no mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}). Name an existing job file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" in line {line + 1}" if line is not None else ""
        raise SpecError(f"{path}: not valid YAML{where}. Compare it with the job file in the README.") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: a job file is a mapping such as `shards: [...]`, found {type(values).__name__}.")
    return values


_PLAIN_WORDS = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "missing": "has too few values",
    "too_long": "has too many values",
}


def _first_problem(error: pydantic.ValidationError) -> str:
    # A union reports each of its branches; the first report that is no missing literal is the useful one.
    problems = error.errors()
    problem = min(problems, key=lambda item: (item["type"] != "extra_forbidden", item["type"] == "literal_error"))
    path = _path(problem["loc"])
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = JobSpec
        for part in path[:-1]:
            annotation = section.model_fields[part].annotation if part in section.model_fields else None
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
        return f"unknown key {name!r}.{nearest_name(path[-1], section.model_fields)}"
    if problem["type"] == "value_error":
        # Our own words, which name the values.
        return problem["msg"].removeprefix("Value error, ")
    message = _PLAIN_WORDS.get(problem["type"], problem["msg"].replace("Input should", "must", 1))
    words = [item["ctx"]["expected"] for item in problems if item["type"] == "literal_error" and item is not problem]
    if words and problem["type"] != "literal_error" and all(_path(item["loc"]) == path for item in problems):
        message += f", or {' or '.join(words)}"
    return f"{name} {message[0].lower()}{message[1:]} (found {problem['input']!r})"


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """The names of settings in a place that pydantic reports, without its names for the branches of a union."""
    named = [part for part in loc if isinstance(part, str) and not part.startswith(("constrained-", "literal["))]
    return [part for part in named if part not in ("int", "float", "str")] or [str(part) for part in loc]
