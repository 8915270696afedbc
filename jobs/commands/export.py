"""The command that hands a dataset to other loaders: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import OutputFolder, StorageOptions, storage_options


@app.command(rich_help_panel="Use a dataset")
def export(
    dataset: OutputFolder,
    target: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="megatron, mds, webdataset or npy.", show_default=False)
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR|URL", help="Empty folder to write to, or an export to go on with.")
    ],
    sequence: Annotated[
        Path | None,
        typer.Option(
            "--sequence",
            metavar="FILE.YAML",
            help="Special ids around the tokens, for megatron (docs/loading.md). Left out: indices alone.",
            show_default=False,
        ),
    ] = None,
    generation: Annotated[
        int | None,
        typer.Option(
            "--generation", metavar="N", min=0, help="Generation to read. Left out: the newest.", show_default=False
        ),
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Write the dataset in DIR in the format of another loader.

    Interrupted, it goes on when run again."""
    from jobs.export import export_with_bar

    options = storage_options(storage_option or ())
    written = export_with_bar(dataset, out, target, sequence=sequence, generation=generation, storage_options=options)
    typer.echo(written.describe())
