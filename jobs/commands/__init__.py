"""The commands of `bsq`, a module for each kind; every one adds its commands to `app`.

Commands import what they need when they run, so that help and completion load neither torch nor Ray."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="bsq",
    help="Turn WebDataset shards of images and videos into datasets of bit-packed visual tokens.",
    epilog="Start with: bsq demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
