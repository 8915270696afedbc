"""Commands about the tokenizer itself: import-checkpoint, train and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.commands import app
from jobs.commands.options import (
    RUNNING,
    RayAddress,
    ResumeRun,
    RunFolder,
    StorageOptions,
    storage_options,
    switch,
)
from schemas.errors import SpecError
from schemas.jobspec import Filter

AHEAD = "Decoding ahead"
FEATURES = "Measures that need weights (nothing is ever fetched)"


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
    resume: ResumeRun = False,
    out: RunFolder = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            "--ray-workers",
            metavar="N",
            min=1,
            help="Train in N processes of a Ray cluster, with one GPU each where the run uses GPUs. Left out: here.",
            rich_help_panel=RUNNING,
            show_default=False,
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            "--cpus-per-worker",
            metavar="N",
            min=1,
            help="CPUs of each such process. Left out: an even share of the cluster's.",
            rich_help_panel=RUNNING,
            show_default=False,
        ),
    ] = None,
    ray_address: RayAddress = None,
    decode_to: Annotated[
        Path | None,
        typer.Option(
            "--decode-to",
            metavar="DIR",
            help="Only decode what is learnt from into DIR, for a machine without codecs. Left out: train.",
            rich_help_panel=AHEAD,
            show_default=False,
        ),
    ] = None,
    compact: Annotated[
        int | None,
        typer.Option(
            "--compact",
            metavar="MB",
            min=1,
            help="With --decode-to: keep frames as JPEG, as good as fits into so many megabytes. Left out: as bytes.",
            rich_help_panel=AHEAD,
            show_default=False,
        ),
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Train a tokenizer as TRAIN.YAML says; under torchrun, or with --ray-workers, on several devices.

    A signal ends the run with everything saved."""
    storage = storage_options(storage_option or ())
    if decode_to is not None:
        from jobs.train import decode_ahead

        decode_ahead(
            config, decode_to, most_bytes=None if compact is None else compact * 1_000_000, storage_options=storage
        )
        typer.echo(
            f"Wrote {decode_to}; train with: python -m tokenizer.trainer --frames {decode_to} "
            f"--config {decode_to / 'config.json'} --out DIR"
        )
        return
    if compact is not None:
        raise SpecError("--compact goes with --decode-to only; leave it out, or name a folder.")
    if ray_workers is None:
        if cpus_per_worker is not None or ray_address is not None:
            raise SpecError(
                "--cpus-per-worker and --ray-address go with --ray-workers only; leave them out, or add it."
            )
        from jobs.train import train as train_tokenizer

        tokenizer = train_tokenizer(config, resume=resume, out=out, storage_options=storage)
    else:
        from jobs.ray_train import train_on_ray

        tokenizer = train_on_ray(
            config,
            ray_workers,
            ray_address=ray_address,
            cpus_per_worker=cpus_per_worker,
            resume=resume,
            out=out,
            storage_options=storage,
        )
    typer.echo(f"Wrote {tokenizer}; use it with: bsq tokenize SHARDS... --tokenizer {tokenizer} --out DIR")


@app.command(rich_help_panel="Compress")
def train_prior(
    config: Annotated[
        Path,
        typer.Argument(metavar="TRAIN.YAML", help="Settings of the run (docs/compression.md).", show_default=False),
    ],
    resume: ResumeRun = False,
    out: RunFolder = None,
    storage_option: StorageOptions = None,
) -> None:
    """Train a prior on datasets of tokens, for `bsq compress`; under torchrun on several devices.

    A signal ends the run with everything saved."""
    from jobs.train_prior import train_prior as train_on_tokens

    prior = train_on_tokens(config, resume=resume, out=out, storage_options=storage_options(storage_option or ()))
    typer.echo(f"Wrote {prior}; use it with: bsq compress INPUT... --prior {prior} --out DIR")


@app.command(rich_help_panel="Make a tokenizer")
def evaluate(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="Name, folder or URL of a tokenizer.", show_default=False)
    ],
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS", help="Shards whose pictures and clips are measured on.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report and pictures.")] = Path(
        "evaluation"
    ),
    filter: Annotated[Filter, typer.Option("--filter", help="How originals are resized, always antialiased.")] = (
        "lanczos"
    ),
    crop: Annotated[
        Literal["center", "exact"],
        typer.Option("--crop", help="The largest centred square, or the whole picture squeezed to a square."),
    ] = "center",
    fps: Annotated[
        str, typer.Option("--fps", metavar="RATE|source", help="Frames per second picked from a video; source: all.")
    ] = "source",
    clips_per_video: Annotated[
        int, typer.Option("--clips-per-video", metavar="N", min=1, help="The most clips of one video, from its start.")
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="The most pictures, and the most videos, to read. Left out: all.",
            show_default=False,
        ),
    ] = None,
    no_codecs: Annotated[
        bool, switch("--no-codecs", "Leave codecs out. Left out: JPEG, WebP ... and x264 at equal bytes.")
    ] = False,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Frames that the tokenizer is given together.")
    ] = 32,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option("--device", help="Where the tokenizer runs.")] = (
        "auto"
    ),
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--dtype", help="Its arithmetic; auto: bfloat16 on GPUs that have it."),
    ] = "auto",
    lpips: Annotated[
        Path | None,
        typer.Option(
            "--lpips", metavar="DIR", help="Folder of VGG-16 and LPIPS weights, for LPIPS.", rich_help_panel=FEATURES
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception",
            metavar="FILE",
            help="Weights of the FID Inception network, for rFID of pictures.",
            rich_help_panel=FEATURES,
        ),
    ] = None,
    i3d: Annotated[
        Path | None,
        typer.Option("--i3d", metavar="FILE", help="Weights of I3D, for rFVD of clips.", rich_help_panel=FEATURES),
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Measure how well TOKENIZER reconstructs the pictures and clips of SHARDS, beside codecs at equal bytes.

    Writes DIR/evaluation.json and pictures of the best, median and worst. Ends with exit code 3 when samples were
    left out because they cannot be read."""
    from jobs.evaluate import EvaluationOptions
    from jobs.evaluate import evaluate as evaluate_tokenizer
    from jobs.evaluation_sheet import describe_report

    given = {"lpips": lpips, "inception": inception, "i3d": i3d}
    options = EvaluationOptions(
        filter=filter,
        crop=crop,
        fps=_frames_per_second(fps),
        clips_per_video=clips_per_video,
        limit=limit,
        codecs=not no_codecs,
        batch=batch,
        device=device,
        dtype=dtype,
        networks={name: str(path) for name, path in given.items() if path is not None},
    )
    storage = storage_options(storage_option or ())
    report = evaluate_tokenizer(tokenizer, shards, out, options, storage_options=storage)
    typer.echo(describe_report(report))
    pictures = [str(out / result.picture) for result in report.results if result.picture]
    typer.echo(f"\nWrote {out / 'evaluation.json'}, {', '.join(pictures)}")
    if report.left_out:
        raise typer.Exit(3)


def _frames_per_second(text: str) -> float | Literal["source"]:
    if text == "source":
        return "source"
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise SpecError(f"--fps is {text!r}; give frames per second, such as 8, or source.")
    return rate
