"""Commands for jobs on a Ray cluster: submit, jobs, logs and stop."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands import app
from jobs.commands.options import StorageOptions, storage_options, storage_pairs, switch
from jobs.commands.tokenize import make_spec

if TYPE_CHECKING:
    from jobs.submit import Cluster

PANEL = "Run on a cluster"

Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=False,
        show_default=False,
        help="Dashboard of the Ray cluster. Left out: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, as `bsq jobs` names it.", show_default=False)]
DASHBOARD = "http://127.0.0.1:8265"


@app.command(rich_help_panel=PANEL)
def submit(
    config: Annotated[
        Path, typer.Argument(metavar="JOB.YAML", help="Job file, as bsq tokenize takes it.", show_default=False)
    ],
    address: Address = DASHBOARD,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set any field of the job file; repeatable. Left out: what the file says.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool, switch("--follow", "Show what the job writes until it ends. Left out: print its id and return.")
    ] = False,
    no_pip: Annotated[
        bool, switch("--no-pip", "Use the packages of the cluster's nodes. Left out: install the versions used here.")
    ] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Hand in the job that JOB.YAML describes to a Ray cluster, with this code and the packages that it needs.

    It is the job that bsq tokenize --config JOB.YAML runs here. Handing it in again goes on where it stopped."""
    from jobs.submit import Cluster, local_paths

    spec = make_spec(shards=(), config=config, settings=settings or (), options={})
    pairs = storage_pairs(storage_option or ())
    storage_options(pairs)  # what means nothing is refused here, not there
    cluster = Cluster(address)
    job_id = cluster.submit(spec, ship_packages=not no_pip, storage_options=pairs)
    typer.echo(job_id)
    paths = local_paths(spec)
    if paths:
        typer.echo(f"{paths[-1]} is a local path: every node must reach it under this name.", err=True)
    if not follow:
        typer.echo(f"Read along with `bsq logs {job_id} --follow`, stop it with `bsq stop {job_id}`.", err=True)
        return
    _follow(cluster, job_id)


@app.command(rich_help_panel=PANEL)
def jobs(
    address: Address = DASHBOARD,
    as_json: Annotated[bool, switch("--json", "Print JSON for programs. Left out: a table.")] = False,
) -> None:
    """List the jobs of bsqtok that a Ray cluster remembers."""
    from jobs.submit import Cluster

    found = Cluster(address).list()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(job) for job in found], default=str, indent=1))
        return
    if not found:
        typer.echo("No jobs. Hand one in with `bsq submit JOB.YAML`.")
        return
    typer.echo(f"{'id':<14}{'state':<11}{'began (UTC)':<18}{'ran':>10}  output")
    for job in found:
        began = job.began.strftime("%Y-%m-%d %H:%M") if job.began else "not yet"
        typer.echo(f"{job.id:<14}{job.state:<11}{began:<18}{timedelta(seconds=int(job.seconds))!s:>10}  {job.out}")


@app.command(rich_help_panel=PANEL)
def logs(
    job_id: JobId,
    address: Address = DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="Go on until the job ends. Left out: what there is.")
    ] = False,
) -> None:
    """Show what a job on a Ray cluster has written.

    With --follow the exit code is that of the job, and 130 when it was stopped."""
    from jobs.submit import Cluster

    cluster = Cluster(address)
    if follow:
        _follow(cluster, job_id)
    typer.echo(cluster.logs(job_id), nl=False)
    job = cluster.find(job_id)
    if job.state == "FAILED" and job.exit_code is None:
        # It never came to run: only Ray knows why.
        typer.echo(job.message, err=True)


@app.command(rich_help_panel=PANEL)
def stop(job_id: JobId, address: Address = DASHBOARD) -> None:
    """Ask a job on a Ray cluster to finish what it has read and end, and wait for that.

    What is committed stays; handing in the same job file again goes on."""
    from jobs.submit import Cluster

    job = Cluster(address).stop(job_id)
    typer.echo(f"{job.id}: {job.state}" + ("" if job.has_ended else "; it has not ended yet, look again later"))


def _follow(cluster: Cluster, job_id: str) -> None:
    """Show a job's log until it ends, then end this process as the job ended."""
    try:
        for piece in cluster.follow(job_id):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(f"\nThe job goes on. Stop it with `bsq stop {job_id}`.", err=True)
        raise typer.Exit(0) from None
    job = cluster.wait(job_id)
    if job.state == "FAILED" and job.exit_code is None:
        typer.echo(job.message, err=True)
    raise typer.Exit(job.outcome)
