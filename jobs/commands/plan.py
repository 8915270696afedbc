"""The command that says what a job would take: plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import StorageOptions, Workers, option, spec_help, storage_options, switch
from jobs.commands.tokenize import make_spec


@app.command(rich_help_panel="Run a job")
def plan(
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="SHARDS", help=spec_help("shards"), show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="JOB.YAML", help="Job file. Left out: options only.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Set any field; repeatable. Left out: none.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[str | None, option("--tokenizer", "tokenizer", "Running")] = None,
    workers: Workers = None,
    cpus_per_worker: Annotated[int | None, option("--cpus-per-worker", "run.cpus_per_worker", "Running", "N")] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="How long to measure. Left out: 20.")
    ] = 20.0,
    as_json: Annotated[bool, switch("--json", "Print JSON for programs. Left out: a few lines.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Tokenize some samples of SHARDS, and say how many there are and what all of them would take.

    Nothing is written. It measures this machine: run it where the workers will run."""
    from jobs.plan import plan_job

    named = {"tokenizer": tokenizer, "workers": workers, "cpus_per_worker": cpus_per_worker, "out": "unwritten"}
    given = {name: value for name, value in named.items() if value is not None}
    spec = make_spec(shards=shards or (), config=config, settings=settings or (), options=given)
    made = plan_job(spec, seconds=seconds, storage_options=storage_options(storage_option or ()))
    typer.echo(json.dumps(made.to_json_dict(), indent=1) if as_json else made.describe())
