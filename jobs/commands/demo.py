"""The command that shows everything at once: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands import app
from jobs.commands.options import NoRay


@app.command(rich_help_panel="Begin here")
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write to; an earlier demo in it is replaced.")
    ] = Path("demo"),
    no_ray: NoRay = False,
) -> None:
    """Tokenize a small corpus of real photographs and clips, and show what came of it.

    Needs the packages of pip install 'bsqtok\\[demo]' and no network."""
    from jobs.demo import run_demo

    raise typer.Exit(run_demo(out, runner="local" if no_ray else "ray"))
