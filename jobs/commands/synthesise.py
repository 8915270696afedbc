"""Commands that make new pictures: train-generator and generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.commands import app
from jobs.commands.options import ResumeRun, RunFolder, StorageOptions, storage_options
from schemas.errors import SpecError

SAMPLING = "Sampling"
INPAINTING = "Inpainting"


@app.command(rich_help_panel="Synthesise")
def train_generator(
    config: Annotated[
        Path,
        typer.Argument(metavar="TRAIN.YAML", help="Settings of the run (docs/synthesis.md).", show_default=False),
    ],
    resume: ResumeRun = False,
    out: RunFolder = None,
    storage_option: StorageOptions = None,
) -> None:
    """Train a masked model on datasets of tokens, for `bsq generate`; under torchrun on several devices.

    A signal ends the run with everything saved."""
    from jobs.train_generator import train_generator as train_on_tokens

    generator = train_on_tokens(config, resume=resume, out=out, storage_options=storage_options(storage_option or ()))
    typer.echo(f"Wrote {generator}; use it with: bsq generate --weights {generator} --out grid.png")


@app.command(rich_help_panel="Synthesise")
def generate(
    weights: Annotated[
        str, typer.Option("--weights", metavar="DIR", help="Folder or URL of a generator.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="GRID.PNG", help="Picture to write.", show_default=False)],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="CLASS",
            help="Class of the pictures; several times for several classes. Left out: no label.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Pictures of each class.")] = 16,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed, the same pictures.")] = 0,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Runs of the model.", rich_help_panel=SAMPLING)
    ] = 24,
    guidance: Annotated[
        float,
        typer.Option(
            "--guidance",
            metavar="W",
            min=0,
            help="How far to push away from pictures without label.",
            rich_help_panel=SAMPLING,
        ),
    ] = 2.0,
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        typer.Option("--schedule", help="How guidance rises over the steps.", rich_help_panel=SAMPLING),
    ] = "linear",
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            min=0,
            help="Divides logits; below 1: likelier tokens.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            metavar="NATS",
            min=0,
            help="Of the order in which tokens are unmasked, at first.",
            rich_help_panel=SAMPLING,
        ),
    ] = 4.0,
    inpaint: Annotated[
        Path | None,
        typer.Option(
            "--inpaint",
            metavar="PICTURE",
            help="Draw a part of this picture anew. Left out: whole pictures.",
            rich_help_panel=INPAINTING,
            show_default=False,
        ),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            "--box",
            metavar="L,T,R,B",
            help="Which part: left, top, right, bottom as shares of the sides. Left out: 0.25,0.25,0.75,0.75.",
            rich_help_panel=INPAINTING,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="NAME|DIR", help="Tokenizer whose tokens the weights make.")
    ] = "default",
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where it runs.")] = "cpu",
    storage_option: StorageOptions = None,
) -> None:
    """Draw new pictures of a class into GRID.PNG.

    The same options give the same picture."""
    sides = None if box is None else _sides(box)
    from jobs.generate import GenerateOptions
    from jobs.generate import generate as generate_pictures
    from tokenizer.unmasking import SamplingOptions

    options = GenerateOptions(
        weights=weights,
        labels=label or (),
        count=count,
        seed=seed,
        sampling=SamplingOptions(
            steps=steps, guidance=guidance, guidance_schedule=schedule, temperature=temperature, noise=noise
        ),
        inpaint=inpaint,
        box=sides,
        tokenizer=tokenizer,
        device=device,
    )
    number = generate_pictures(options, out, storage_options=storage_options(storage_option or ()))
    typer.echo(f"Wrote {number:,} pictures to {out}")


def _sides(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(side) for side in text.split(","))
    except ValueError as error:
        raise SpecError(f"--box is {text!r}; give four numbers, such as 0.25,0.25,0.75,0.75.") from error
    return left, top, right, bottom
