"""Every example runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from schemas.jobspec import JobSpec
from tests.tiny_corpus import REPOSITORY, RunBsq, bsq_environment, jpeg, mp4

EXAMPLES = REPOSITORY / "examples"
QUICK = ("--tokenizer", "untrained:vit-tiny-32-l18", "--no-ray")

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures and a clip as people keep them: in folders, with dots in names, one with a caption."""
    folder = tmp_path / "holiday"
    (folder / "day.1").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "beach.jpg").write_bytes(jpeg(1))
    (folder / "beach.txt").write_text("a beach", encoding="utf-8")
    (folder / "day.1" / "img 12.03.JPG").write_bytes(jpeg(2))
    (folder / "day.1" / "beach.jpg").write_bytes(jpeg(3))
    (folder / "walk.mp4").write_bytes(mp4(4, 5))
    (folder / ".cache" / "thumbnail.jpg").write_bytes(jpeg(5))
    (folder / "notes.pdf").write_bytes(b"%PDF")
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run a script that finds this Python and this `bsq` on its path, as in an activated environment."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, command in (("python", ""), ("bsq", ' -c "from jobs.entry import main; main()"')):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            timeout=120,
            env=bsq_environment({"PATH": path}),
            check=False,
        )

    return run


def test_shards_hold_every_picture_and_video_under_a_key_of_its_own(folder: Path, tmp_path: Path, shell: Shell) -> None:
    shards = tmp_path / "shards"
    done = shell("python", EXAMPLES / "make_shards.py", folder, shards, "--samples", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Wrote 4 samples in 2 shards to {shards}.\n"
    members = {}
    for shard in sorted(shards.iterdir()):
        with tarfile.open(shard) as tar:
            members[shard.name] = tar.getnames()
    assert members == {
        "shard-000000.tar": [
            *("0000000-beach.jpg", "0000000-beach.json", "0000000-beach.txt"),
            *("0000001-beach.jpg", "0000001-beach.json"),
            *("0000002-img-12-03.jpg", "0000002-img-12-03.json"),
        ],
        "shard-000001.tar": ["0000003-walk.json", "0000003-walk.mp4"],
    }


def test_a_folder_without_pictures_is_refused_in_words(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "empty").mkdir()
    done = shell("python", EXAMPLES / "make_shards.py", tmp_path / "empty", tmp_path / "shards")
    assert done.returncode == 2
    assert "holds no picture and no video" in done.stderr
    assert not (tmp_path / "shards").exists()


@pytest.mark.long
def test_a_folder_becomes_a_checked_dataset(folder: Path, tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "out"
    done = shell(EXAMPLES / "tokenize_folder.sh", folder, out, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Everything is as recorded." in done.stdout
    table = pq.read_table(out / "tokens" / "tokens")
    assert table["key"].to_pylist() == ["0000000-beach", "0000001-beach", "0000002-img-12-03", "0000003-walk"]
    assert table["caption"].to_pylist() == ["a beach", None, None, None]
    assert table["metadata"][2].as_py() == '{"path":"day.1/img 12.03.JPG"}'
    assert table["frames"].to_pylist() == [1, 1, 1, 5]


def test_the_job_file_names_every_setting_at_its_default() -> None:
    values = yaml.safe_load((EXAMPLES / "job.yaml").read_text(encoding="utf-8"))
    defaults = JobSpec().model_dump(mode="json")

    def names(section: dict[str, Any]) -> dict[str, Any]:
        return {name: names(value) if isinstance(value, dict) else None for name, value in section.items()}

    assert names(values) == names(defaults)
    assert values.pop("shards") and values.pop("out")
    assert values == {name: value for name, value in defaults.items() if name not in ("shards", "out")}


def test_the_job_file_runs(small_shards: list[Path], tmp_path: Path, bsq: RunBsq) -> None:
    out = tmp_path / "out"
    done = bsq("tokenize", small_shards[0], "--config", EXAMPLES / "job.yaml", "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(out / "tokens").num_rows == 8
