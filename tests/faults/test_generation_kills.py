"""A later generation that is killed at any point, and run again or resumed, leaves what an undisturbed one leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.start import start_job
from jobs.verify import verify_dataset
from pipeline.dataset_files import list_generations
from pipeline.generations import list_begun
from pipeline.storage import open_storage
from schemas.jobspec import parse_spec
from tests.tiny_corpus import BSQ, RunBsq, bsq_environment, dataset_files, temporaries

PATIENCE_SECONDS = 60.0
PIXELS = "limits.max_pixels=1000000"


@pytest.fixture(scope="module")
def narrow(small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset of four shards: in three every picture failed, the fourth was not there."""
    folder = tmp_path_factory.mktemp("narrow")
    values = {
        "shards": [*map(str, small_shards[:3]), str(folder / "late.tar")],
        "out": str(folder / "out"),
        "tokenizer": "stub",
        "preprocess": {"size": 64},
        "limits": {"max_pixels": 64},
    }
    start_job(parse_spec(values, source="test"), runner="in-process")
    shutil.copy(small_shards[3], folder / "late.tar")
    return folder / "out"


def arguments(kind: str, out: Path, small_shards: list[Path]) -> list[str]:
    if kind == "append":
        return ["tokenize", *map(str, small_shards[4:]), "--out", str(out), "--append", "--set", PIXELS]
    return ["retry", str(out), *(["--samples"] if kind == "retry-samples" else []), "--set", PIXELS]


@pytest.fixture(scope="module")
def undisturbed(
    narrow: Path, small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """The files of each kind of generation, made without being killed, by two workers."""
    files = {}
    for kind in ("append", "retry", "retry-samples"):
        out = tmp_path_factory.mktemp(kind) / "out"
        shutil.copytree(narrow, out)
        command = [*BSQ, *arguments(kind, out, small_shards), "--no-ray", "--workers", "2"]
        subprocess.run(command, env=bsq_environment(), check=False, capture_output=True, timeout=120)
        assert list_generations(open_storage(str(out))) == [0, 1]
        files[kind] = dataset_files(out)
    return files


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Whatever a test starts is gone when it ends, held children included."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


pytestmark = pytest.mark.long

CASES = [
    ("append", "before_generation", "again"),
    ("append", "before_plan", "resume"),
    ("append", "after_generation", "resume"),
    ("retry-samples", "after_publish", "resume"),
    *(
        pytest.param(kind, step, how, marks=pytest.mark.longest)
        for kind, step, how in [
            ("retry-samples", "before_generation", "again"),
            ("retry-samples", "after_temp", "resume"),
            ("retry-samples", "after_ledger", "again"),
            ("retry-samples", "before_manifest", "resume"),
            ("append", "before_tokens", "again"),
            ("append", "before_manifest", "again"),
            ("retry", "before_ledger", "again"),
            ("retry", "after_publish", "resume"),
        ]
    ),
]


@pytest.mark.parametrize(("kind", "step", "how"), CASES)
def test_a_generation_that_was_killed_is_completed_by_its_own_command_or_by_resume(
    kind: str,
    step: str,
    how: str,
    narrow: Path,
    small_shards: list[Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    bsq: RunBsq,
    processes: list[subprocess.Popen[bytes]],
) -> None:
    out, markers = tmp_path / "out", tmp_path / "markers"
    markers.mkdir()
    shutil.copytree(narrow, out)
    before = dataset_files(out)
    job = subprocess.Popen(
        [*BSQ, *arguments(kind, out, small_shards), "--no-ray"],
        env=bsq_environment({"BSQTOK_HOLD_AT": f"{step}:{markers}"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    processes.append(job)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(markers.iterdir()):
        assert time.monotonic() < deadline and job.poll() is None, f"nothing reached {step}"
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()

    storage = open_storage(str(out))
    assert list_begun(storage) == ([0] if step == "before_generation" else [0, 1])
    assert list_generations(storage) == [0]
    published = [name for name in dataset_files(out).keys() - before.keys() if not name.endswith(".tmp")]
    early = ("before_generation", "before_plan", "after_generation", "before_tokens", "after_temp")
    assert bool(published) == (step not in early)
    assert bool(list((out / "ledger").glob("0001/*"))) == (step in ("after_ledger", "before_manifest"))
    assert verify_dataset(str(out)).problems == []

    command = arguments(kind, out, small_shards) if how == "again" else ["resume", str(out)]
    finished = bsq(*command, "--no-ray")
    assert finished.returncode in (0, 3), finished.stderr
    assert dataset_files(out) == undisturbed[kind]
    assert temporaries(out) == [] and not (out / "lease.json").exists()
    result = verify_dataset(str(out))
    assert (result.problems, result.finished) == ([], True)
