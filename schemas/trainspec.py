"""What a user may decide about a training run's data and output; the model's side is `tokenizer.train_config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, Field, model_validator

from schemas.errors import SpecError, nearest_name
from schemas.jobspec import Filter, LimitsSpec, SpecSection


class TrainDataSpec(SpecSection):
    """Where batches come from.  Shards are named as in a job: any fsspec URL, {000..127} ranges, globs, @list.txt."""

    images: tuple[str, ...] = ()
    """WebDataset shards whose pictures are learnt from; other samples of them are passed over."""
    clips: tuple[str, ...] = ()
    """WebDataset shards whose videos are learnt from."""
    validation_images: tuple[str, ...] = ()
    """Shards whose pictures the run is measured on: the middle square, by Lanczos."""
    validation_clips: tuple[str, ...] = ()
    """Shards whose videos the run is measured on: the first frames of each."""
    validation_items: Annotated[int, Field(ge=1)] = 64
    """The most pictures, and the most clips, of a validation."""
    hold: bool = True
    """Decode everything once and keep it as bytes, on the GPU where there is one; false decodes while training."""
    hold_scale: Annotated[float, Field(ge=1, le=8)] = 1.25
    """Side of a held frame as a multiple of the tokenizer's, so that crops have room."""
    hold_views: Annotated[int, Field(ge=1, le=64)] = 3
    """Random crops that are held of each picture."""
    random_scale: tuple[float, float] = (0.6, 1.0)
    """Side of a decoded crop as a share of the source's short side."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of decoded crops that are mirrored; held ones are mirrored by sampling.flip instead."""
    filter: Filter = "bilinear"
    """Resampling of training frames."""
    fps: Annotated[float, Field(gt=0, le=1000)] | Literal["source"] = "source"
    """Frames per second picked from a video; "source" takes every frame."""
    clip_stride: Annotated[int, Field(ge=1)] = 8
    """Picked frames from one held clip of a video to the next."""
    clips_per_video: Annotated[int, Field(ge=1)] = 16
    """The most clips that are decoded of one video."""
    shuffle_samples: Annotated[int, Field(ge=1)] = 1000
    """Samples that wait, undecoded, to be drawn in random order while training from a stream."""
    decode_threads: Annotated[int, Field(ge=0)] = 0
    """Threads that decode; 0 takes the CPUs that this process may use."""
    limits: LimitsSpec = LimitsSpec()
    """What is refused."""

    def drawing(self) -> dict[str, Any]:
        """What decides which frames are drawn, as JSON types: all but where shards lie and how many threads decode."""
        shards = {"images", "clips", "validation_images", "validation_clips"}
        return self.model_dump(mode="json", exclude={*shards, "decode_threads"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.random_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.random_scale is [{low}, {high}]; it must satisfy 0 < low <= high <= 1")
        if not self.images and not self.clips:
            raise ValueError("data names no shards; give data.images, data.clips or both")
        return self


class TrainSpec(SpecSection):
    """One training run."""

    recipe: str = "paper"
    """Settings to begin with: paper (needs LPIPS weights), no-lpips, or small-cpu."""
    out: str = ""
    """Local folder of the run."""
    data: TrainDataSpec
    """Where batches come from."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Which model is trained."""
    losses: dict[str, Any] = Field(default_factory=dict)
    """Weights of the losses."""
    discriminator: dict[str, Any] = Field(default_factory=dict)
    """Size of the discriminator."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Steps, batches, AdamW, schedule, clipping, moving average."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """How batches are drawn."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Seed, device, arithmetic, and how often what is written."""

    def training(self) -> dict[str, Any]:
        """The part that `tokenizer.train_config` reads and checks."""
        names = ("recipe", "model", "losses", "discriminator", "optimizer", "sampling", "run")
        return {name: getattr(self, name) for name in names}


class TokenSourceSpec(SpecSection):
    """A dataset of tokens, and how much of it."""

    path: str
    """Folder or URL of the dataset."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of samples, in proportion to the other datasets."""
    filters: tuple[tuple[Any, ...], ...] = ()
    """Conditions that must all hold, as the loader takes them: [frames, "==", 1]."""


class TokenDataSpec(SpecSection):
    """Where tokens come from.  All datasets are of one tokenizer."""

    train: dict[str, TokenSourceSpec | str]
    """Datasets to learn from, by a name; a path alone has weight 1."""
    validation: dict[str, TokenSourceSpec | str] = Field(default_factory=dict)
    """Datasets that the run is measured on, the first view of each clip."""
    validation_clips: Annotated[int, Field(ge=1)] = 512
    """The most clips of each, spread evenly over it."""
    window: Annotated[int, Field(ge=1)] = 32_768
    """Rows that are shuffled among each other."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.train:
            raise ValueError("data.train names no dataset")
        return self


class TokenTrainSpec(SpecSection):
    """One run of training a model over tokens."""

    out: str = ""
    """Local folder of the run."""
    data: TokenDataSpec
    """Where tokens come from."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Which model is trained."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Steps, batch, optimiser, schedule, clipping, moving average."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Seed, device, arithmetic, and how often what is written."""

    def training(self) -> dict[str, Any]:
        """The part that the trainer reads and checks."""
        return {"model": self.model, "optimizer": self.optimizer, "run": self.run}


class LabelledTokenDataSpec(TokenDataSpec):
    """Where tokens of labelled pictures come from."""

    classes: tuple[str, ...] = ()
    """Names of labels 0, 1, ... in this order; empty to learn without labels."""


class GeneratorTrainSpec(TokenTrainSpec):
    """One run of training a generator."""

    data: LabelledTokenDataSpec
    """Where tokens come from."""


def read_train_spec(path: str | Path) -> TrainSpec:
    """Read a training file.  Raises SpecError, in one line, for the first thing that is wrong."""
    return parse_train_spec(_read_yaml(path, "examples/train_small.yaml"), source=str(path))


def read_token_train_spec(path: str | Path) -> TokenTrainSpec:
    """Read a training file of a prior.  Raises SpecError, in one line."""
    return _read_token_spec(path, TokenTrainSpec, {"data": TokenDataSpec}, "examples/train_prior.yaml")


def read_generator_train_spec(path: str | Path) -> GeneratorTrainSpec:
    """Read a training file of a generator.  Raises SpecError, in one line."""
    return _read_token_spec(path, GeneratorTrainSpec, {"data": LabelledTokenDataSpec}, "examples/train_generator.yaml")


AnyTokenSpec = TypeVar("AnyTokenSpec", bound=TokenTrainSpec)


def _read_token_spec(
    path: str | Path, kind: type[AnyTokenSpec], sections: Mapping[str, type[BaseModel]], example: str
) -> AnyTokenSpec:
    values = _read_yaml(path, example)
    if not isinstance(values, dict):
        raise SpecError(f"{path}: a training file is a mapping such as `data: ...`, found {type(values).__name__}.")
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise SpecError(f"{path}: {_first_problem(error, {'': kind, **sections})}") from error


def _read_yaml(path: str | Path, example: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}). Name an existing training file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" in line {line + 1}" if line is not None else ""
        raise SpecError(f"{path}: not valid YAML{where}. Compare it with {example}.") from error


def parse_train_spec(values: object, *, source: str) -> TrainSpec:
    """Validate what a training file holds; an unknown key names the nearest valid one."""
    if not isinstance(values, dict):
        raise SpecError(f"{source}: a training file is a mapping such as `data: ...`, found {type(values).__name__}.")
    try:
        return TrainSpec.model_validate(values)
    except pydantic.ValidationError as error:
        raise SpecError(f"{source}: {_first_problem(error, _SECTIONS)}") from error


_SECTIONS: dict[str, type[BaseModel]] = {"": TrainSpec, "data": TrainDataSpec, "data.limits": LimitsSpec}


def _first_problem(error: pydantic.ValidationError, sections: Mapping[str, type[BaseModel]]) -> str:
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"] if isinstance(part, str)]
    known = [index for index in range(len(path)) if ".".join(path[:index]) in sections]
    path = path[: known[-1] + 1] if known else path
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section = sections[".".join(path[:-1])]
        return f"unknown key {name!r}.{nearest_name(path[-1], section.model_fields)}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ") + "."
    if problem["type"] == "missing":
        return f"{name!r} is missing."
    message = problem["msg"].replace("Input should", "must", 1)
    return f"{name} {message[0].lower()}{message[1:]} (found {problem['input']!r})."
