"""The example of a language model is killed, started again, and goes on with the same losses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.token_rows import TokenRows
from tests.tiny_corpus import REPOSITORY, bsq_environment

STEPS = 60
SMALL = ["--steps", STEPS, "--save-every", 8, "--seq-len", 70, "--width", 32, "--layers", 1, "--batch", 4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Images of 4 x 4 tokens in three files; an epoch is over after some 25 steps."""
    out = tmp_path_factory.mktemp("train-lm") / "tokens"
    TokenRows(num_rows=210, rows_per_file=75, grid=(4, 4)).write_dataset(out)
    return out


def start(dataset: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, REPOSITORY / "examples" / "train_lm.py", dataset, run, *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # One thread: the order in which sums are taken must not depend on how many cores are free.
    environment = bsq_environment({"OMP_NUM_THREADS": "1"})
    return subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes)


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def test_killed_and_started_again_it_draws_the_same_curve(dataset, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    process = start(dataset, unbroken)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint

    for kill_at in (13, 38):
        process = start(dataset, killed)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            log = killed / "losses.jsonl"
            if log.exists() and len(log.read_bytes().splitlines()) >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        _, complaint = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGKILL, complaint
        assert kill_at <= len((killed / "losses.jsonl").read_bytes().splitlines()) < STEPS
    process = start(dataset, killed)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert "going on behind step" in said
    assert [line["step"] for line in losses(killed)] == list(range(1, STEPS + 1))
    assert losses(killed) == losses(unbroken)
    assert losses(killed)[-1]["loss"] != losses(killed)[-2]["loss"]
