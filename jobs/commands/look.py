"""Commands that look at a dataset: status, verify, inspect and reconstruct."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import OutputFolder, StorageOptions, storage_options, switch


@app.command(rich_help_panel="Look at a dataset")
def status(
    out: OutputFolder,
    as_json: Annotated[bool, switch("--json", "Print JSON for programs. Left out: a few lines.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show how far the job that writes to DIR has come, from anywhere and at any time."""
    from jobs.progress import read_status

    state = read_status(out, storage_options=storage_options(storage_option or ()))
    typer.echo(state.to_json() if as_json else state.describe())


@app.command(rich_help_panel="Look at a dataset")
def verify(
    out: OutputFolder,
    decode: Annotated[
        int,
        typer.Option(
            "--decode",
            metavar="N",
            min=0,
            help="Also tokenize N random rows again from their sources and compare bits. Left out: none.",
            show_default=False,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Chooses the rows of --decode.")] = 0,
    storage_option: StorageOptions = None,
) -> None:
    """Check every file of the dataset in DIR against job, plan, ledger and manifest, byte by byte.

    Ends with exit code 3 and a list when something is wrong."""
    from jobs.verify import verify_dataset

    options = storage_options(storage_option or ())
    verification = verify_dataset(out, storage_options=options)
    typer.echo(verification.describe())
    ok = verification.ok
    if decode:
        from jobs.verify_decode import retokenize

        retokenization = retokenize(out, decode, seed=seed, storage_options=options)
        typer.echo(retokenization.describe())
        ok &= retokenization.ok
    if not ok:
        raise typer.Exit(3)


@app.command(rich_help_panel="Look at a dataset")
def inspect(
    url: Annotated[
        str,
        typer.Argument(
            metavar="FILE|DIR",
            help="A dataset, token file, failure table, tokenizer, prior or .bsq file.",
            show_default=False,
        ),
    ],
    storage_option: StorageOptions = None,
) -> None:
    """Describe what lies in a dataset or in one of its files."""
    from jobs.inspect import describe

    typer.echo(describe(url, storage_options=storage_options(storage_option or ())))


@app.command(rich_help_panel="Look at a dataset")
def reconstruct(
    out: OutputFolder,
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="Key of the sample.", show_default=False)],
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="X.PNG|X.MP4",
            help="File to write. Left out: named after the key, in this folder.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[int, typer.Option("--clip", metavar="N", min=0, help="Number of the clip within its video.")] = 0,
    view: Annotated[int, typer.Option("--view", metavar="N", min=0, help="Number of the view.")] = 0,
    shard: Annotated[
        int | None,
        typer.Option(
            "--shard",
            metavar="N",
            min=0,
            help="Number of the shard, for a key that several have. Left out: the only one that has it.",
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
    """Decode the tokens of one sample back into a picture or a clip."""
    from jobs.reconstruct import reconstruct as reconstruct_sample

    options = storage_options(storage_option or ())
    written = reconstruct_sample(
        out, key, target=target, clip=clip, view=view, shard=shard, generation=generation, storage_options=options
    )
    typer.echo(str(written))
