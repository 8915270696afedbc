"""The example of a language model is killed, started again, and goes on with the same losses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_corpus import REPOSITORY, bsq_environment
from tests.token_datasets import TokenDatasetWriter

SMALL = ["--save-every", 8, "--seq-len", 70, "--width", 32, "--layers", 1, "--batch", 4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Images and clips of 4 x 4 tokens in three files; an epoch is over after some 25 steps."""
    out = tmp_path_factory.mktemp("train-lm") / "tokens"
    TokenDatasetWriter(
        url=str(out), clips_of_file=[40, 40, 25], grid=(4, 4), frames=lambda file, clip: 1 + (file + clip) % 3
    ).write()
    return out


def start(dataset: Path, run: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, REPOSITORY / "examples" / "train_lm.py", dataset, run, "--steps", steps, *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # One thread: the order in which sums are taken must not depend on how many cores are free.
    environment = bsq_environment({"OMP_NUM_THREADS": "1"})
    return subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes)


def num_lines(run: Path) -> int:
    log = run / "losses.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


@pytest.mark.longest
def test_killed_and_started_again_it_draws_the_same_curve(dataset, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for kill_at in (13, 38):
        process = start(dataset, killed, 1_000_000)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and num_lines(killed) < kill_at:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, complaint
        assert num_lines(killed) >= kill_at
    steps = num_lines(killed) + 10
    for run in (killed, unbroken):
        process = start(dataset, run, steps)
        said, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        assert ("going on behind step" in said) == (run == killed)
    assert [line["step"] for line in losses(killed)] == list(range(1, steps + 1))
    assert losses(killed) == losses(unbroken)
    assert losses(killed)[-1]["loss"] != losses(killed)[-2]["loss"]
