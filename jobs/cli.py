"""Entry point of `bsq`: runs one command and turns every error into a line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.models import CommandInfo

# Importing a module adds its commands.
from jobs.commands import (  # noqa: F401
    app,
    cluster,
    compress,
    demo,
    export,
    look,
    model,
    plan,
    report,
    retry,
    synthesise,
    tokenize,
)
from jobs.commands.options import switch
from schemas.errors import BsqError

PANELS = (
    "Begin here",
    "Run a job",
    "Look at a dataset",
    "Use a dataset",
    "Use the tokens",
    "Make a tokenizer",
    "Compress",
    "Synthesise",
    "Run on a cluster",
)
"""Of the help, in the order in which somebody new needs them."""
FIRST_OF_PANEL = ("tokenize", "resume", "plan", "status", "inspect", "report", "train", "train_generator")
"""Commands before the others of their panel."""


def _place_in_help(command: CommandInfo) -> tuple[int, int]:
    panel, name = str(command.rich_help_panel), getattr(command.callback, "__name__", "")
    return (
        PANELS.index(panel) if panel in PANELS else len(PANELS),
        FIRST_OF_PANEL.index(name) if name in FIRST_OF_PANEL else len(FIRST_OF_PANEL),
    )


app.registered_commands.sort(key=_place_in_help)

# typer raises click's errors, from click or from a copy of its own, depending on its version.
_CommandLineError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.  The one place that turns an error into a line."""
    try:
        code = app(list(arguments), prog_name="bsq", standalone_mode=False)
        sys.stdout.flush()
    except _CommandLineError as error:
        # Values are checked by pydantic, which speaks to programmers.
        error.message = error.message.removeprefix("Value error, ").replace("Input should be", "it must be")
        error.show()
        return int(error.exit_code)
    except BsqError as error:
        # The family's own name says nothing: such an error is about a damaged file, which the message names.
        kind = "Error" if type(error) is BsqError else type(error).__name__
        _complain(f"{kind}: {error}")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough (`bsq inspect FILE | head`); typer also ends with 1 then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback reaches the screen
        _complain(_describe_unexpected(error))
        return 1
    if code == 130:
        _complain("Interrupted.")
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    try:
        print(message, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        return  # nobody listens any more


def _describe_unexpected(error: Exception) -> str:
    text = str(error).strip().splitlines()
    what = f"Unexpected {type(error).__name__}" + (f": {text[0]}" if text else "")
    try:
        handle, path = tempfile.mkstemp(prefix="bsq-error-", suffix=".log", text=True)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"bsqtok {_version()}, Python {sys.version}\n{sys.argv}\n\n")
            traceback.print_exception(error, file=log)
    except OSError:
        return what
    return f"{what}\nThis is a defect of bsqtok; please report it with {path}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bsqtok")
    except PackageNotFoundError:
        return "(not installed)"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, switch("--version", "Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"bsqtok {_version()}")
        raise typer.Exit
