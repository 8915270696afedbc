"""The command that tries again what failed: retry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands import app
from jobs.commands.options import (
    Batch,
    Force,
    InProcess,
    NoRay,
    OutputFolder,
    RayAddress,
    StorageOptions,
    Workers,
    assign,
    parse_yaml,
    run_job,
    runner_name,
    split_pair,
    storage_options,
    switch,
)
from schemas.errors import SpecError
from schemas.jobspec import parse_spec

if TYPE_CHECKING:
    from jobs.commands.options import Observer
    from jobs.outcome import JobOutcome
    from jobs.retry import RetryKind


@app.command(rich_help_panel="Run a job")
def retry(
    out: OutputFolder,
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SHARDS]",
            help="Full URLs of the shards to try, where they hold credentials, which are never written down.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        bool, switch("--samples", "Try the failed samples of committed shards. Left out: whole shards that failed.")
    ] = False,
    damaged: Annotated[
        bool,
        switch("--damaged", "Take the rest of damaged shards that were mended. Left out: whole shards that failed."),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a limit or how to run, such as limits.max_pixels=1000000; repeatable. Left out: as before.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    workers: Workers = None,
    batch: Batch = None,
    no_ray: NoRay = False,
    in_process: InProcess = False,
    ray_address: RayAddress = None,
    storage_option: StorageOptions = None,
) -> None:
    """Try again what the finished dataset in DIR lacks, and add what is won back as a new generation.

    Nothing that is there changes. The same command goes on with a retry that was interrupted."""
    if samples and damaged:
        raise SpecError("--samples and --damaged cannot go together; run one retry after the other.")
    kind: RetryKind = "retry-samples" if samples else "retry-damaged" if damaged else "retry"
    values: dict[str, Any] = {}
    for setting in settings or ():
        path, text = split_pair("--set", setting)
        assign("--set", values, path, parse_yaml(f"--set {path}", text))
    for name, number in (("workers", workers), ("batch", batch)):
        if number is not None:
            assign(f"--{name}", values, f"run.{name}", number)
    if shards:
        values["shards"] = list(shards)
    asked = parse_spec(values, source="command line")
    runner = runner_name(no_ray=no_ray, in_process=in_process, ray_address=ray_address)
    options = storage_options(storage_option or ())

    def start(observer: Observer) -> JobOutcome:
        from jobs.retry import retry_job

        return retry_job(
            out,
            kind,
            asked=asked,
            runner=runner,
            ray_address=ray_address,
            force=force,
            observer=observer,
            storage_options=options,
        )

    run_job(start)
