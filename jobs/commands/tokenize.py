"""Commands that run a job: tokenize and resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.commands import app
from jobs.commands.options import (
    CLIPS,
    OUTPUT,
    RUNNING,
    SQUARE,
    Batch,
    Force,
    InProcess,
    NoRay,
    OutputFolder,
    RayAddress,
    StorageOptions,
    Workers,
    assign,
    option,
    parse_yaml,
    run_job,
    runner_name,
    spec_help,
    split_pair,
    storage_options,
    switch,
)
from schemas.errors import SpecError
from schemas.jobspec import Filter, JobSpec, parse_spec, read_spec

if TYPE_CHECKING:
    from jobs.commands.options import Observer
    from jobs.outcome import JobOutcome

_SPEC_PATHS = {
    "out": "out",
    "tokenizer": "tokenizer",
    "dtype": "dtype",
    "device": "device",
    "damaged_shards": "damaged_shards",
    "size": "preprocess.size",
    "crop": "preprocess.crop",
    "filter": "preprocess.filter",
    "views": "preprocess.views",
    "flip": "preprocess.flip",
    "seed": "preprocess.seed",
    "fps": "clips.fps",
    "clip_frames": "clips.clip_frames",
    "stride": "clips.stride",
    "short_clips": "clips.short_clips",
    "workers": "run.workers",
    "batch": "run.batch",
    "cpus_per_worker": "run.cpus_per_worker",
    "max_failed_fraction": "run.max_failed_fraction",
    "strict_arithmetic": "run.strict_arithmetic",
}
"""Field of the job spec that each option of `bsq tokenize` sets."""


@app.command(rich_help_panel="Run a job")
def tokenize(
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="SHARDS", help=spec_help("shards"), show_default=False)
    ] = None,
    out: Annotated[str | None, option("--out", "out", OUTPUT, "DIR")] = None,
    append: Annotated[
        bool,
        switch(
            "--append",
            "Add SHARDS to the finished dataset in DIR, with its settings. Left out: they are all that it has.",
            OUTPUT,
        ),
    ] = False,
    force: Force = False,
    tokenizer: Annotated[str | None, option("--tokenizer", "tokenizer", "Job", "NAME|DIR")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="JOB.YAML",
            help="Read settings from a job file; options given here win over it. Left out: the defaults below.",
            rich_help_panel="Job",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any field of the job file, such as limits.max_pixels=1000000 or carry=\\[caption]; repeatable.",
            rich_help_panel="Job",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str | None, option("--size", "preprocess.size", SQUARE, "PIXELS")] = None,
    crop: Annotated[Literal["center", "random", "exact"] | None, option("--crop", "preprocess.crop", SQUARE)] = None,
    filter: Annotated[Filter | None, option("--filter", "preprocess.filter", SQUARE)] = None,
    views: Annotated[int | None, option("--views", "preprocess.views", SQUARE, "N")] = None,
    flip: Annotated[float | None, option("--flip", "preprocess.flip", SQUARE, "SHARE")] = None,
    seed: Annotated[int | None, option("--seed", "preprocess.seed", SQUARE, "N")] = None,
    fps: Annotated[str | None, option("--fps", "clips.fps", CLIPS, "RATE")] = None,
    clip_frames: Annotated[str | None, option("--clip-frames", "clips.clip_frames", CLIPS, "N")] = None,
    stride: Annotated[str | None, option("--stride", "clips.stride", CLIPS, "N")] = None,
    short_clips: Annotated[Literal["keep", "drop"] | None, option("--short-clips", "clips.short_clips", CLIPS)] = None,
    workers: Workers = None,
    batch: Batch = None,
    cpus_per_worker: Annotated[int | None, option("--cpus-per-worker", "run.cpus_per_worker", RUNNING, "N")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"] | None, option("--dtype", "dtype", RUNNING)] = None,
    device: Annotated[Literal["auto", "cuda", "cpu"] | None, option("--device", "device", RUNNING)] = None,
    max_failed_fraction: Annotated[
        float | None, option("--max-failed-fraction", "run.max_failed_fraction", RUNNING, "SHARE")
    ] = None,
    strict_arithmetic: Annotated[
        bool | None,
        option("--strict-arithmetic/--no-strict-arithmetic", "run.strict_arithmetic", RUNNING, ""),
    ] = None,
    damaged_shards: Annotated[
        Literal["keep", "fail"] | None, option("--damaged-shards", "damaged_shards", RUNNING)
    ] = None,
    no_ray: NoRay = False,
    in_process: InProcess = False,
    ray_address: RayAddress = None,
    storage_option: StorageOptions = None,
) -> None:
    """Tokenize SHARDS into a dataset of tokens, or go on with one that was begun.

    The same command on a dataset that was begun goes on where it stopped; with other settings it is refused. With
    --append, settings that are not given are the dataset's."""
    given = {name: value for name, value in locals().items() if name in _SPEC_PATHS and value is not None}
    spec = make_spec(shards=shards or (), config=config, settings=settings or (), options=given)
    runner = runner_name(no_ray=no_ray, in_process=in_process, ray_address=ray_address)
    options = storage_options(storage_option or ())

    def start(observer: Observer) -> JobOutcome:
        if append:
            from jobs.append import append_job as begin
        else:
            from jobs.start import start_job as begin

        return begin(
            spec,
            runner=runner,
            ray_address=ray_address,
            force=force,
            observer=observer,
            storage_options=options,
        )

    run_job(start)


@app.command(rich_help_panel="Run a job")
def resume(
    out: OutputFolder,
    force: Force = False,
    workers: Workers = None,
    batch: Batch = None,
    no_ray: NoRay = False,
    in_process: InProcess = False,
    ray_address: RayAddress = None,
    storage_option: StorageOptions = None,
) -> None:
    """Go on with the job that writes to DIR, with the settings that it was begun with.

    What is committed is passed over; shards that were given up are not tried again."""
    runner = runner_name(no_ray=no_ray, in_process=in_process, ray_address=ray_address)
    options = storage_options(storage_option or ())

    def start(observer: Observer) -> JobOutcome:
        from jobs.start import resume_job

        return resume_job(
            out,
            runner=runner,
            ray_address=ray_address,
            force=force,
            workers=workers,
            batch=batch,
            observer=observer,
            storage_options=options,
        )

    run_job(start)


def make_spec(
    *, shards: Sequence[str], config: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> JobSpec:
    """Join job file, `--set` settings and options, the later winning.  Raises SpecError for the first mistake."""
    values: dict[str, Any] = {}
    if config is not None:
        values = read_spec(config)
        parse_spec(values, source=str(config))
    for setting in settings:
        path, text = split_pair("--set", setting)
        assign("--set", values, path, parse_yaml(f"--set {path}", text))
    if settings:
        parse_spec(values, source="--set")
    for name, value in options.items():
        path = _SPEC_PATHS[name]
        text_option = name in ("size", "fps", "clip_frames", "stride")
        assign(_flag(name), values, path, parse_yaml(_flag(name), value) if text_option else value)
    if shards:
        values["shards"] = list(shards)
    try:
        spec = parse_spec(values, source="command line")
    except SpecError as error:
        raise SpecError(_with_flag(str(error), options)) from error
    if not spec.shards:
        raise SpecError(
            "No shards are named. Give their URLs, for example: bsq tokenize 'data/{000..127}.tar' --out DIR"
        )
    if not spec.out:
        raise SpecError("No output is named. Add --out DIR, a folder or URL for the dataset.")
    return spec


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_flag(message: str, options: Mapping[str, Any]) -> str:
    """The message in the words of the command line: `--fps` instead of `command line: clips.fps`."""
    for name in options:
        message = message.replace(f"command line: {_SPEC_PATHS[name]} ", f"{_flag(name)} ", 1)
    return message
