"""What the README and docs/ name exists: commands, options, settings, files, links, classes, columns."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel

from jobs.cli import app
from schemas import errors
from schemas.failures import FAILURE_SCHEMA
from schemas.job import GenerationRecord, Job, TokenizerRecord
from schemas.jobspec import JobSpec, parse_spec
from schemas.lease import Lease
from schemas.ledger import Commit
from schemas.manifest import MANIFEST_SCHEMA, ManifestSummary
from schemas.tokenfile import CARRIED_COLUMNS, TokenFooter, token_schema
from tests.tiny_corpus import REPOSITORY, bsq_environment
from tokenizer.codes import pack_indices
from tokenizer.config import PRESETS

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<mark><!-- runs -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ROOT_OPTIONS = {"--version", "--help", "--install-completion", "--show-completion"}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, *languages: str) -> Iterator[re.Match[str]]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["language"] in languages:
            yield match


def spans(page: Path) -> list[str]:
    """Inline code, without that of blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> Iterator[list[str]]:
    """Every `bsq ...` of a page, in code spans and in blocks that show a shell."""
    lines = [span for span in spans(page) if span.startswith("bsq ")]
    for block in blocks(page, "sh", "console"):
        lines += [line.strip().removeprefix("$ ") for line in block["body"].splitlines()]
    for line in lines:
        if line.startswith("bsq "):
            yield shlex.split(line, comments=True)[1:]


def options_of(command: str) -> set[str]:
    parameters = COMMANDS[command].params
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@page
def test_every_command_and_its_options_exist(page: Path) -> None:
    for name, *arguments in commands(page):
        if name.startswith("-"):
            assert name in ROOT_OPTIONS, name
            continue
        assert name in COMMANDS, f"bsq {name}"
        flags = {argument for argument in arguments if argument.startswith("--")}
        assert flags <= options_of(name), f"bsq {name}: {flags - options_of(name)}"


@page
def test_every_option_exists_somewhere(page: Path) -> None:
    known = ROOT_OPTIONS.union(*(options_of(name) for name in COMMANDS))
    if page.name == "training.md":
        known |= set(
            re.findall(r'"(--[a-z-]+)"', (REPOSITORY / "tokenizer" / "trainer.py").read_text(encoding="utf-8"))
        )
        known.add("--nproc-per-node")
        known.add("--no-python")
    for span in spans(page):
        if span.startswith("--"):
            assert span.split()[0].partition("=")[0] in known, span


def test_the_readme_has_every_command() -> None:
    assert {name for name, *_ in commands(REPOSITORY / "README.md") if not name.startswith("-")} == set(COMMANDS)


@page
def test_every_setting_exists(page: Path) -> None:
    if page.name == "training.md":
        pytest.skip("speaks of training files, and tests/jobs/test_train.py holds it to them")
    known = set(setting_paths(JobSpec))
    for span in spans(page):
        name = span.partition(":")[0].partition("=")[0]
        if re.fullmatch(r"(preprocess|clips|limits|run)\.[a-z_]+", name):
            assert name in known, span


def setting_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_paths(field.annotation, f"{prefix}{name}.")


@page
def test_job_files_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        parse_spec(yaml.safe_load(block["body"]), source=page.name)


@page
def test_every_file_exists(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"(schemas|tokenizer|pipeline|jobs|tests|benchmarks|examples|docs)/[\w./-]*(\.\w+|/)", span):
            if span.endswith((".json", ".safetensors", ".parquet")):
                continue  # inside a dataset, which has a folder `tokenizer/` of its own
            assert (REPOSITORY / span).exists(), span


@page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [span for span in spans(page) if span.startswith("make ")]
    for block in blocks(page, "sh", "console"):
        named += [line for line in block["body"].splitlines() if line.startswith("make ")]
    for span in named:
        assert span.split()[1] in targets, span


@page
def test_every_link_inside_the_repository_resolves(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)]:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Fragment names that are made of the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_layout_names_existing_files() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^## Layout\n\n```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert tree is not None
    folder = ""
    named = set()
    for line in tree[1].splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            assert (REPOSITORY / folder).is_dir(), folder
            continue
        for name in re.findall(r"\b\w+\.py\b", line):
            assert (REPOSITORY / folder / name).is_file(), folder + name
            named.add(folder + name)
    assert {"pipeline/worker.py", "jobs/driver.py", "schemas/jobspec.py", "tokenizer/bsqvit.py"} <= named


def test_no_failure_class_and_no_exit_code_is_forgotten() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]\w+)`", text))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BsqError)]
    leaves = {kind.__name__ for kind in kinds if issubclass(kind, errors.InputError) and not kind.__subclasses__()}
    assert leaves <= named, leaves - named
    codes = set(re.findall(r"^\| (\d+) \|", text.partition("## Exit codes")[2].partition("\n## ")[0], re.MULTILINE))
    assert {str(kind.exit_code) for kind in kinds} | {"0"} == codes


def test_the_page_on_formats_names_every_column_and_key() -> None:
    named = set(re.findall(r"`(\w+)`", (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")))
    models: list[type[BaseModel]] = [Job, TokenizerRecord, GenerationRecord, Commit, ManifestSummary, Lease]
    required = {
        *token_schema(list(CARRIED_COLUMNS)).names,
        *FAILURE_SCHEMA.names,
        *MANIFEST_SCHEMA.names,
        *(field.name for field in dataclasses.fields(TokenFooter)),
        *(name for model in models for name in model.model_fields),
    }
    assert required <= named, sorted(required - named)


def test_the_page_on_the_model_names_every_preset() -> None:
    text = (REPOSITORY / "docs" / "model.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(vit-[\w-]+)`", text)) == set(PRESETS)


@pytest.fixture(scope="module")
def demo_folder(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo/tokens` in it, as `bsq demo` leaves it, but small."""
    folder = tmp_path_factory.mktemp("readme")
    arguments = ["tokenize", small_shards[2], "--out", "demo/tokens", "--tokenizer", "untrained:vit-tiny-32-l18"]
    done = subprocess.run(
        [sys.executable, "-c", "from jobs.entry import main; main()", *map(str, arguments), "--no-ray"],
        env=bsq_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


RUNNING = [(page, number) for page in PAGES for number, block in enumerate(blocks(page, "python")) if block["mark"]]


@pytest.mark.parametrize(("page", "number"), RUNNING, ids=[f"{page.name}-{number}" for page, number in RUNNING])
def test_code_that_is_marked_as_such_runs(page: Path, number: int, demo_folder: Path) -> None:
    code = list(blocks(page, "python"))[number]["body"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=bsq_environment(),
        cwd=demo_folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in {"000200", "clip-b"}, done.stdout


def test_the_readme_and_the_formats_have_code_that_runs() -> None:
    assert {page.name for page, _ in RUNNING} >= {"README.md", "formats.md"}


def test_the_bits_worked_out_by_hand_are_right() -> None:
    text = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    assert "1 + 4 + 8 + 16 + 128 = 157 = 0x9d" in text
    assert pack_indices(np.array([[5, 3, 6]]), 3).tobytes() == bytes([157, 1])
    assert "indices 1, 131072, 5, 100000 are the nine bytes `01 00 00 00 58 00 00 a8 61`" in text
    assert pack_indices(np.array([[1, 131072, 5, 100000]]), 18).tobytes().hex(" ") == "01 00 00 00 58 00 00 a8 61"
