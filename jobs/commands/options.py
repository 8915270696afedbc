"""What several commands share: their options, and the reading of KEY=VALUE pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from schemas.errors import SpecError
from schemas.jobspec import JobSpec

if TYPE_CHECKING:
    from jobs.outcome import JobOutcome
    from schemas.lease import Progress

    Observer = Callable[[Progress, str | None], None]

RunnerName = Literal["ray", "local", "in-process"]


def spec_help(path: str) -> str:
    """Help of an option that sets a field of the job spec: the field's own words and its default."""
    section: Any = JobSpec
    for name in path.split("."):
        field = section.model_fields[name]
        section = field.annotation
    words = " ".join((field.description or "").split())
    # In a job file these two are always needed, from there or from here.
    left_out = "what the job file names" if path in ("shards", "out") else field.default
    return f"{words} Left out: {left_out}.".replace("[", "\\[")


def option(flag: str, path: str, panel: str, metavar: str | None = None, min: int | None = None) -> Any:
    help = spec_help(path)
    return typer.Option(flag, help=help, metavar=metavar, min=min, rich_help_panel=panel, show_default=False)


def switch(flag: str, help: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(flag, help=help, metavar="", rich_help_panel=panel, **settings)


SQUARE, CLIPS, RUNNING, OUTPUT = "From a frame to a square", "From a video to clips", "Running", "Output"
STORAGE = "Storage"

OutputFolder = Annotated[str, typer.Argument(help="Folder or URL of the dataset.", metavar="DIR", show_default=False)]
RunFolder = Annotated[
    str | None,
    typer.Option("--out", metavar="DIR", help="Folder of the run. Left out: what the file names.", show_default=False),
]
ResumeRun = Annotated[
    bool, switch("--resume", "Go on with the run in its folder, or begin it. Left out: the folder must be new.")
]
NoRay = Annotated[
    bool,
    switch("--no-ray", "Run the workers as processes of this host. Left out: Ray runs them.", RUNNING),
]
InProcess = Annotated[
    bool,
    switch(
        "--in-process",
        "Run the one worker inside this process, for debugging. Left out: workers are processes.",
        RUNNING,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="Join the Ray cluster at this address (auto: the one of this host). Left out: start Ray for this job.",
        rich_help_panel=RUNNING,
        show_default=False,
    ),
]
Workers = Annotated[int | None, option("--workers", "run.workers", RUNNING, "N", min=0)]
Batch = Annotated[int | None, option("--batch", "run.batch", RUNNING, "N", min=1)]
Force = Annotated[
    bool,
    switch(
        "--force", "Take over an output whose driver may still be alive; nothing is deleted. Left out: refuse.", OUTPUT
    ),
]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="Pass a setting to the storage, such as anon=true or client_kwargs.endpoint_url=https://...; repeatable. "
        "@FILE reads them from a file, one a line. Left out: the storage's own defaults.",
        rich_help_panel=STORAGE,
        show_default=False,
    ),
]


def runner_name(*, no_ray: bool, in_process: bool, ray_address: str | None) -> RunnerName:
    """Which runner the options ask for.  Raises SpecError when they contradict each other."""
    if (no_ray or in_process) and ray_address is not None:
        raise SpecError(f"--ray-address cannot go with {'--in-process' if in_process else '--no-ray'}; leave one out.")
    if in_process:
        return "in-process"
    return "local" if no_ray else "ray"


def storage_options(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Settings for the storage from KEY=VALUE pairs; None without any.

    Values are text, so that a secret of digits stays whole, except true, false, and {...} and [...] as in YAML."""
    options: dict[str, Any] = {}
    for pair in storage_pairs(pairs):
        path, text = split_pair("--storage-option", pair)
        structured = text in ("true", "false") or text.startswith(("{", "["))
        value = parse_yaml(f"--storage-option {path}", text) if structured else text
        assign("--storage-option", options, path, value)
    return options or None


def storage_pairs(pairs: Sequence[str]) -> list[str]:
    """The KEY=VALUE pairs, with @FILE replaced by the lines of that file.  Raises SpecError when it cannot be read."""
    found: list[str] = []
    for pair in pairs:
        if not pair.startswith("@"):
            found.append(pair)
            continue
        try:
            lines = Path(pair[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"--storage-option {pair}: it cannot be read. Name a file of KEY=VALUE lines.") from error
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return found


def run_job(start: Callable[[Observer], JobOutcome]) -> None:
    from jobs.display import JobDisplay, describe_summary

    with JobDisplay() as display:
        outcome = start(display.observe)
    typer.echo(describe_summary(outcome.progress))
    for line in outcome.lines:
        typer.echo(line)
    raise typer.Exit(outcome.exit_code)


def split_pair(flag: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name.strip():
        # The text is not repeated: it may be a secret.
        raise SpecError(f"{flag} takes KEY=VALUE, for example {flag} {_PAIR_EXAMPLES[flag]}.")
    return name.strip(), value


_PAIR_EXAMPLES = {"--set": "preprocess.filter=bicubic", "--storage-option": "anon=true"}


def assign(flag: str, values: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise SpecError(f"{flag}: {'.'.join(sections[: depth + 1])} is one value, so {path} cannot be set.")
    values[name] = value


def parse_yaml(where: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: the value is not valid YAML. Put quotes around text with special signs.") from error
