"""Commands about the tokenizer itself: import-checkpoint and train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import switch


@app.command(rich_help_panel="Make a tokenizer")
def import_checkpoint(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE.PT", help="Checkpoint of the reference.", show_default=False)
    ],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.YAML", help="The config it was trained with.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the tokenizer to.", show_default=False)],
    no_ema: Annotated[bool, switch("--no-ema", "Take the raw weights. Left out: their moving average (EMA).")] = False,
) -> None:
    """Convert a checkpoint of the BSQ-ViT reference implementation into a tokenizer folder.

    Nothing in the checkpoint is executed."""
    from tokenizer.reference_import import import_reference_checkpoint

    import_reference_checkpoint(reference, config, out, use_ema=not no_ema)
    typer.echo(f"Wrote {out}; use it with: bsq tokenize SHARDS... --tokenizer {out} --out DIR")


@app.command(rich_help_panel="Make a tokenizer")
def train(
    config: Annotated[
        Path, typer.Argument(metavar="TRAIN.YAML", help="Settings of the run (docs/training.md).", show_default=False)
    ],
    resume: Annotated[
        bool, switch("--resume", "Go on with the run in its folder, or begin it. Left out: the folder must be new.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the run. Left out: what the file names.", show_default=False
        ),
    ] = None,
    decode_to: Annotated[
        Path | None,
        typer.Option(
            "--decode-to",
            metavar="DIR",
            help="Only decode what is learnt from into DIR, for a machine without codecs. Left out: train.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a tokenizer as TRAIN.YAML says; under torchrun, on several devices.

    A signal ends the run with everything saved."""
    from jobs.train import save_frames
    from jobs.train import train as train_tokenizer

    if decode_to is not None:
        save_frames(config, decode_to)
        typer.echo(
            f"Wrote {decode_to}; train with: python -m tokenizer.trainer --frames {decode_to} "
            f"--config {decode_to / 'config.json'} --out DIR"
        )
        return
    tokenizer = train_tokenizer(config, resume=resume, out=out)
    typer.echo(f"Wrote {tokenizer}; use it with: bsq tokenize SHARDS... --tokenizer {tokenizer} --out DIR")
