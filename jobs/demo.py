"""A first run, from nothing to a picture: corpus, tokens, reconstructions, and where to look next."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import typer

from jobs.demo_corpus import build_demo_corpus
from jobs.display import JobDisplay, describe_bytes, describe_seconds, describe_summary
from schemas.errors import OutputNotOurs
from schemas.job import Job
from schemas.jobspec import parse_spec

MARKER = "README.txt"
_README = """\
Written by `bsq demo`, which replaces everything in this folder when it runs again.

corpus/              photographs and clips in WebDataset shards
tokens/              the dataset of tokens made of them
reconstructions.png  originals beside what their tokens decode to
"""
PICTURED_KEYS = [
    "astronaut-00",
    "chelsea-00",
    "coffee-00",
    "motorcycle_left-00",
    "china-00",
    "flower-03",
    "camera-00",
    "clip-02-astronaut",
]
"""In the picture, as far as the corpus has them."""


def run_demo(out: Path, *, runner: Literal["ray", "local"] = "ray") -> int:
    """Build the corpus in `out`, tokenize it, draw the picture; returns the exit code of the job.

    Raises OutputNotOurs when `out` holds something that no demo has written."""
    from jobs.reconstruct import side_by_side
    from jobs.start import start_job

    begun = time.monotonic()
    _make_room(out)

    corpus = build_demo_corpus(out / "corpus")
    typer.echo(
        f"Built {out / 'corpus'}: {corpus.num_images} pictures and {corpus.num_clips} clips in "
        f"{len(corpus.shards)} shards, {describe_bytes(corpus.num_bytes)}."
    )

    shards, tokens = str(out / "corpus" / "*.tar"), str(out / "tokens")
    bsq = shlex.quote(_program())
    command = f"{bsq} tokenize {shlex.quote(shards)} --out {shlex.quote(tokens)}" + " --no-ray" * (runner == "local")
    typer.echo(f"\nTokenizing it, as this command would:\n  {command}")
    spec = parse_spec({"shards": [str(path) for path in corpus.shards], "out": tokens}, source="demo")
    with JobDisplay() as display:
        outcome = start_job(spec, runner=runner, observer=display.observe)
    typer.echo(describe_summary(outcome.progress))
    for line in outcome.lines:
        typer.echo(line)

    pictured = [key for key in PICTURED_KEYS if key in corpus.keys]
    picture = side_by_side(tokens, out / "reconstructions.png", pictured)
    typer.echo(f"\nDrew {picture}: originals above, what their tokens decode to below.")
    trained, name = _is_trained(out / "tokens")
    if not trained:
        typer.echo(
            f"The tokenizer is {name} with random weights, not a trained one: its tokens are stored and read back "
            f"exactly, but the pictures that they decode to look like noise."
        )
    where = shlex.quote(tokens)
    typer.echo(
        f"\nLook around:\n"
        f"  {bsq} status {where}\n"
        f"  {bsq} inspect {where}\n"
        f"  {bsq} verify {where}\n"
        f"  {bsq} report {where}\n"
        f"  {bsq} reconstruct {where} --key {pictured[0]}\n"
        f"\nDone in {describe_seconds(time.monotonic() - begun)}."
    )
    return outcome.exit_code


def _make_room(out: Path) -> None:
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file()):
            raise OutputNotOurs(f"{out}: holds something that is no demo of bsqtok. Name another folder with --out.")
        for name in ("corpus", "tokens"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(_README, encoding="utf-8")


def _program() -> str:
    """What a person types to run us: `bsq`, or its path where the environment is not active (`make demo`)."""
    called = Path(sys.argv[0])
    found = shutil.which("bsq")
    if called.name == "bsq" and (found is None or not called.exists() or not called.samefile(found)):
        return str(called)
    return "bsq"


def _is_trained(tokens: Path) -> tuple[bool, str]:
    job = Job.model_validate_json((tokens / "job.json").read_bytes())
    config = job.tokenizer.config
    return bool(config.get("trained")), str(config.get("preset", job.tokenizer.name))
