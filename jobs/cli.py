"""The command line: options become a JobSpec, everything else happens elsewhere.

Commands import what they need when they run, so that help and completion load neither torch nor Ray."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from schemas.errors import BsqError, SpecError
from schemas.jobspec import Filter, JobSpec, parse_spec, read_spec

if TYPE_CHECKING:
    from jobs.driver import JobOutcome
    from schemas.lease import Progress

    Observer = Callable[[Progress, str | None], None]

RunnerName = Literal["ray", "local", "in-process"]

app = typer.Typer(
    name="bsq",
    help="Turn WebDataset shards of images and videos into datasets of bit-packed visual tokens.",
    epilog="Start with: bsq demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

# typer raises click's errors, from click or from a copy of its own, depending on its version.
_CommandLineError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point of `bsq`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.  The one place that turns an error into a line."""
    try:
        code = app(list(arguments), prog_name="bsq", standalone_mode=False)
        sys.stdout.flush()
    except _CommandLineError as error:
        error.show()
        return int(error.exit_code)
    except BsqError as error:
        _complain(f"{type(error).__name__}: {error}")
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


def _spec_help(path: str) -> str:
    """Help of an option that sets a field of the job spec: the field's own words and its default."""
    section: Any = JobSpec
    for name in path.split("."):
        field = section.model_fields[name]
        section = field.annotation
    words = " ".join((field.description or "").split())
    # In a job file these two are always needed, from there or from here.
    left_out = "what the job file names" if path in ("shards", "out") else field.default
    return f"{words} Left out: {left_out}.".replace("[", "\\[")


def _option(flag: str, path: str, panel: str, metavar: str | None = None, min: int | None = None) -> Any:
    help = _spec_help(path)
    return typer.Option(flag, help=help, metavar=metavar, min=min, rich_help_panel=panel, show_default=False)


def _switch(flag: str, help: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(flag, help=help, metavar="", rich_help_panel=panel, **settings)


_SQUARE, _CLIPS, _RUNNING, _OUTPUT = "From a frame to a square", "From a video to clips", "Running", "Output"

OutputFolder = Annotated[str, typer.Argument(help="Folder or URL of the dataset.", metavar="DIR", show_default=False)]
NoRay = Annotated[
    bool,
    _switch("--no-ray", "Run the workers as processes of this host. Left out: Ray runs them.", _RUNNING),
]
InProcess = Annotated[
    bool,
    _switch(
        "--in-process",
        "Run the one worker inside this process, for debugging. Left out: workers are processes.",
        _RUNNING,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="Join the Ray cluster at this address (auto: the one of this host). Left out: start Ray for this job.",
        rich_help_panel=_RUNNING,
        show_default=False,
    ),
]
Workers = Annotated[int | None, _option("--workers", "run.workers", _RUNNING, "N", min=0)]
Batch = Annotated[int | None, _option("--batch", "run.batch", _RUNNING, "N", min=1)]
Force = Annotated[
    bool,
    _switch(
        "--force", "Take over an output whose driver may still be alive; nothing is deleted. Left out: refuse.", _OUTPUT
    ),
]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="Pass a setting to the storage, such as anon=true or client_kwargs.endpoint_url=https://...; repeatable. "
        "Left out: the storage's own defaults.",
        rich_help_panel=_RUNNING,
        show_default=False,
    ),
]

_SPEC_PATHS = {
    "out": "out",
    "tokenizer": "tokenizer",
    "dtype": "dtype",
    "device": "device",
    "damaged_shards": "damaged_shards",
    "size": "preprocess.size",
    "crop": "preprocess.crop",
    "filter": "preprocess.filter",
    "views": "preprocess.views",
    "flip": "preprocess.flip",
    "seed": "preprocess.seed",
    "fps": "clips.fps",
    "clip_frames": "clips.clip_frames",
    "stride": "clips.stride",
    "short_clips": "clips.short_clips",
    "workers": "run.workers",
    "batch": "run.batch",
    "cpus_per_worker": "run.cpus_per_worker",
    "max_failed_fraction": "run.max_failed_fraction",
}
"""Field of the job spec that each option of `bsq tokenize` sets."""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, _switch("--version", "Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"bsqtok {_version()}")
        raise typer.Exit


@app.command()
def tokenize(
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="SHARDS", help=_spec_help("shards"), show_default=False)
    ] = None,
    out: Annotated[str | None, _option("--out", "out", _OUTPUT, "DIR")] = None,
    force: Force = False,
    tokenizer: Annotated[str | None, _option("--tokenizer", "tokenizer", "Job", "NAME|DIR")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="JOB.YAML",
            help="Read settings from a job file; options given here win over it. Left out: the defaults below.",
            rich_help_panel="Job",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any field of the job file, such as limits.max_pixels=1000000 or carry=\\[caption]; repeatable.",
            rich_help_panel="Job",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str | None, _option("--size", "preprocess.size", _SQUARE, "PIXELS")] = None,
    crop: Annotated[Literal["center", "random", "exact"] | None, _option("--crop", "preprocess.crop", _SQUARE)] = None,
    filter: Annotated[Filter | None, _option("--filter", "preprocess.filter", _SQUARE)] = None,
    views: Annotated[int | None, _option("--views", "preprocess.views", _SQUARE, "N")] = None,
    flip: Annotated[float | None, _option("--flip", "preprocess.flip", _SQUARE, "SHARE")] = None,
    seed: Annotated[int | None, _option("--seed", "preprocess.seed", _SQUARE, "N")] = None,
    fps: Annotated[str | None, _option("--fps", "clips.fps", _CLIPS, "RATE")] = None,
    clip_frames: Annotated[str | None, _option("--clip-frames", "clips.clip_frames", _CLIPS, "N")] = None,
    stride: Annotated[str | None, _option("--stride", "clips.stride", _CLIPS, "N")] = None,
    short_clips: Annotated[
        Literal["keep", "drop"] | None, _option("--short-clips", "clips.short_clips", _CLIPS)
    ] = None,
    workers: Workers = None,
    batch: Batch = None,
    cpus_per_worker: Annotated[int | None, _option("--cpus-per-worker", "run.cpus_per_worker", _RUNNING, "N")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"] | None, _option("--dtype", "dtype", _RUNNING)] = None,
    device: Annotated[Literal["auto", "cuda", "cpu"] | None, _option("--device", "device", _RUNNING)] = None,
    max_failed_fraction: Annotated[
        float | None, _option("--max-failed-fraction", "run.max_failed_fraction", _RUNNING, "SHARE")
    ] = None,
    damaged_shards: Annotated[
        Literal["keep", "fail"] | None, _option("--damaged-shards", "damaged_shards", _RUNNING)
    ] = None,
    no_ray: NoRay = False,
    in_process: InProcess = False,
    ray_address: RayAddress = None,
    storage_option: StorageOptions = None,
) -> None:
    """Tokenize SHARDS into a dataset of tokens, or go on with one that was begun.

    The same command on a dataset that was begun goes on where it stopped; with other settings it is refused."""
    given = {name: value for name, value in locals().items() if name in _SPEC_PATHS and value is not None}
    spec = make_spec(shards=shards or (), config=config, settings=settings or (), options=given)
    runner = runner_name(no_ray=no_ray, in_process=in_process, ray_address=ray_address)
    options = storage_options(storage_option or ())

    def start(observer: Observer) -> JobOutcome:
        from jobs.driver import start_job

        return start_job(
            spec,
            runner=runner,
            ray_address=ray_address,
            force=force,
            observer=observer,
            storage_options=options,
        )

    _run_job(start)


@app.command()
def resume(
    out: OutputFolder,
    force: Force = False,
    workers: Workers = None,
    batch: Batch = None,
    no_ray: NoRay = False,
    in_process: InProcess = False,
    ray_address: RayAddress = None,
    storage_option: StorageOptions = None,
) -> None:
    """Go on with the job that writes to DIR, with the settings that it was begun with.

    What is committed is passed over; shards that were given up are not tried again."""
    runner = runner_name(no_ray=no_ray, in_process=in_process, ray_address=ray_address)
    options = storage_options(storage_option or ())

    def start(observer: Observer) -> JobOutcome:
        from jobs.driver import resume_job

        return resume_job(
            out,
            runner=runner,
            ray_address=ray_address,
            force=force,
            workers=workers,
            batch=batch,
            observer=observer,
            storage_options=options,
        )

    _run_job(start)


@app.command()
def status(
    out: OutputFolder,
    as_json: Annotated[bool, _switch("--json", "Print JSON for programs. Left out: a few lines.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show how far the job that writes to DIR has come, from anywhere and at any time."""
    from jobs.progress import read_status

    state = read_status(out, storage_options=storage_options(storage_option or ()))
    typer.echo(state.to_json() if as_json else state.describe())


@app.command()
def verify(out: OutputFolder, storage_option: StorageOptions = None) -> None:
    """Check every file of the dataset in DIR against job, plan, ledger and manifest, byte by byte.

    Ends with exit code 3 and a list when something is wrong."""
    from jobs.verify import verify_dataset

    verification = verify_dataset(out, storage_options=storage_options(storage_option or ()))
    typer.echo(verification.describe())
    if not verification.ok:
        raise typer.Exit(3)


@app.command()
def inspect(
    url: Annotated[
        str,
        typer.Argument(
            metavar="FILE|DIR", help="A dataset, token file, failure table or tokenizer.", show_default=False
        ),
    ],
    storage_option: StorageOptions = None,
) -> None:
    """Describe what lies in a dataset or in one of its files."""
    from jobs.inspect import describe

    typer.echo(describe(url, storage_options=storage_options(storage_option or ())))


@app.command()
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


@app.command()
def import_checkpoint(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE.PT", help="Checkpoint of the reference.", show_default=False)
    ],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.YAML", help="The config it was trained with.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the tokenizer to.", show_default=False)],
    no_ema: Annotated[bool, _switch("--no-ema", "Take the raw weights. Left out: their moving average (EMA).")] = False,
) -> None:
    """Convert a checkpoint of the BSQ-ViT reference implementation into a tokenizer folder.

    Nothing in the checkpoint is executed."""
    from tokenizer.reference_import import import_reference_checkpoint

    import_reference_checkpoint(reference, config, out, use_ema=not no_ema)
    typer.echo(f"Wrote {out}; use it with: bsq tokenize SHARDS... --tokenizer {out} --out DIR")


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="TRAIN.YAML", help="Settings of the run (docs/training.md).", show_default=False)
    ],
    resume: Annotated[
        bool, _switch("--resume", "Go on with the run in its folder, or begin it. Left out: the folder must be new.")
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


@app.command()
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


def make_spec(
    *, shards: Sequence[str], config: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> JobSpec:
    """Join job file, `--set` settings and options, the later winning.  Raises SpecError for the first mistake."""
    values: dict[str, Any] = {}
    if config is not None:
        values = read_spec(config)
        parse_spec(values, source=str(config))
    for setting in settings:
        path, text = _split_pair("--set", setting)
        _assign("--set", values, path, _parse_yaml(f"--set {path}", text))
    if settings:
        parse_spec(values, source="--set")
    for name, value in options.items():
        path = _SPEC_PATHS[name]
        text_option = name in ("size", "fps", "clip_frames", "stride")
        _assign(_flag(name), values, path, _parse_yaml(_flag(name), value) if text_option else value)
    if shards:
        values["shards"] = list(shards)
    try:
        spec = parse_spec(values, source="command line")
    except SpecError as error:
        raise SpecError(_with_flag(str(error), options)) from error
    if not spec.shards:
        raise SpecError(
            "No shards are named. Give their URLs, for example: bsq tokenize 'data/{000..127}.tar' --out DIR"
        )
    if not spec.out:
        raise SpecError("No output is named. Add --out DIR, a folder or URL for the dataset.")
    return spec


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
    for pair in pairs:
        path, text = _split_pair("--storage-option", pair)
        structured = text in ("true", "false") or text.startswith(("{", "["))
        value = _parse_yaml(f"--storage-option {path}", text) if structured else text
        _assign("--storage-option", options, path, value)
    return options or None


def _run_job(start: Callable[[Observer], JobOutcome]) -> None:
    from jobs.display import describe_summary, job_display

    with job_display() as display:
        outcome = start(display.observe)
    typer.echo(describe_summary(outcome.progress))
    for line in outcome.lines:
        typer.echo(line)
    raise typer.Exit(outcome.exit_code)


def _split_pair(flag: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name.strip():
        # The text is not repeated: it may be a secret.
        raise SpecError(f"{flag} takes KEY=VALUE, for example {flag} {_PAIR_EXAMPLES[flag]}.")
    return name.strip(), value


_PAIR_EXAMPLES = {"--set": "preprocess.filter=bicubic", "--storage-option": "anon=true"}


def _assign(flag: str, values: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise SpecError(f"{flag}: {'.'.join(sections[: depth + 1])} is one value, so {path} cannot be set.")
    values[name] = value


def _parse_yaml(where: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: the value is not valid YAML. Put quotes around text with special signs.") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_flag(message: str, options: Mapping[str, Any]) -> str:
    """The message in the words of the command line: `--fps` instead of `command line: clips.fps`."""
    for name in options:
        message = message.replace(f"command line: {_SPEC_PATHS[name]} ", f"{_flag(name)} ", 1)
    return message


if __name__ == "__main__":
    main()
