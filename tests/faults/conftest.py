"""What tests of faults share: shards with something to fail in them, and what an undisturbed job makes of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.running_jobs import STUB
from tests.tiny_corpus import BSQ, bsq_environment, dataset_files, mp4, photo_members, write_tar


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six shards of eight pictures; the third has two clips too, and every second one a sample that fails."""
    folder = tmp_path_factory.mktemp("fault-shards")
    found = []
    for number in range(6):
        members = photo_members(100 * number, 8)
        if number == 2:
            members[8:8] = [("clip-a.mp4", mp4(1, 5)), ("clip-a.txt", b"five frames")]
            members += [("clip-b.mp4", mp4(2, 11))]
        if number % 2:
            members[4:4] = [(f"bad-{number}.jpg", b"no picture")]
        found.append(write_tar(folder / f"shard-{number:02d}.tar", members))
    return found


@pytest.fixture(scope="session")
def undisturbed(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names and hashes of what an undisturbed job leaves."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    arguments = ["tokenize", *map(str, shards), "--out", str(out), *STUB, *LENIENT, "--in-process"]
    subprocess.run([*BSQ, *arguments], check=True, capture_output=True, env=bsq_environment())
    return dataset_files(out)


LENIENT = ["--max-failed-fraction", "0.5"]
"""Failed samples are part of these tests and no reason for an exit code."""
