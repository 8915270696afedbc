"""The command that writes a page about a dataset: report."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import OutputFolder, StorageOptions, storage_options


@app.command(rich_help_panel="Look at a dataset")
def report(
    out: OutputFolder,
    target: Annotated[
        str, typer.Option("--out", metavar="X.HTML", help="File to write, a path or URL.")
    ] = "report.html",
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Chooses the rows and tables that are looked at.")
    ] = 0,
    storage_option: StorageOptions = None,
) -> None:
    """Write one HTML page about the dataset in DIR, finished or not, and name what deserves a look.

    Speed, failures, attempts, code usage, shards that drift, and originals beside reconstructions."""
    from jobs.report import write_report

    written = write_report(out, target, seed=seed, storage_options=storage_options(storage_option or ()))
    typer.echo(written.describe())
