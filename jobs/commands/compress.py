"""Commands that code tokens with a prior: compress and decompress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.commands import app
from jobs.commands.options import StorageOptions, parse_yaml, storage_options, switch
from schemas.errors import SpecError

MODELS = "Models"
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False)]
Tokenizer = Annotated[
    str,
    typer.Option("--tokenizer", metavar="NAME|DIR", help="Tokenizer of pictures and clips.", rich_help_panel=MODELS),
]
Prior = Annotated[
    str,
    typer.Option("--prior", metavar="NAME|DIR", help="Prior over its tokens.", rich_help_panel=MODELS),
]


@app.command(rich_help_panel="Compress")
def compress(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Pictures, clips, and datasets, whose rows are taken.", show_default=False
        ),
    ],
    out: Out,
    pack: Annotated[
        bool, switch("--pack", "Write one file for all inputs, out of which nothing is read alone. Left out: one each.")
    ] = False,
    fps: Annotated[
        str,
        typer.Option("--fps", metavar="RATE", help="Frames per second that are picked from a clip; source: all."),
    ] = "source",
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="The most rows of each dataset. Left out: all.", show_default=False
        ),
    ] = None,
    tokenizer: Tokenizer = "default",
    prior: Prior = "default",
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option("--device", help="Where probabilities are computed; files are decompressed on the same kind."),
    ] = "cpu",
    storage_option: StorageOptions = None,
) -> None:
    """Compress pictures, clips and rows of datasets into .bsq files with a prior.

    Larger pictures are cut into tiles of the tokenizer's size, smaller ones are padded. What is lost is lost by the
    tokenizer; the tokens come back exactly."""
    from jobs.compress import CompressOptions, describe_file
    from jobs.compress import compress as compress_inputs

    rate = parse_yaml("--fps", fps)
    if rate != "source" and not (isinstance(rate, int | float) and rate > 0):
        raise SpecError(f"--fps is {fps!r}; give frames per second, or source.")
    options = CompressOptions(tokenizer=tokenizer, prior=prior, pack=pack, fps=rate, limit=limit, device=device)
    written = compress_inputs(inputs, out, options, storage_options=storage_options(storage_option or ()))
    for each in written:
        typer.echo(f"{each.path}: {describe_file(each.file, each.num_bytes)}")


@app.command(rich_help_panel="Compress")
def decompress(
    files: Annotated[list[str], typer.Argument(metavar="FILE.BSQ", help="Files to read.", show_default=False)],
    out: Out,
    tokens: Annotated[
        bool, switch("--tokens", "Write indices of tokens as .npy. Left out: pictures as PNG, clips as MP4.")
    ] = False,
    tokenizer: Tokenizer = "default",
    prior: Prior = "default",
    storage_option: StorageOptions = None,
) -> None:
    """Write the pictures and clips of .bsq files into a folder."""
    from jobs.decompress import decompress as decompress_files

    options = storage_options(storage_option or ())
    written = decompress_files(files, out, tokenizer=tokenizer, prior=prior, tokens=tokens, storage_options=options)
    for path in written:
        typer.echo(str(path))
