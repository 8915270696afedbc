"""The tour of docs/loading.md runs from top to bottom, on a dataset as `bsq demo` leaves it, but small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.export import read_sequence_format
from pipeline.sequence import SequenceFormat
from tests.tiny_corpus import BSQ, REPOSITORY, bsq_environment

PAGE = (REPOSITORY / "docs" / "loading.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(small_shards: list[Path], tmp_path: Path) -> Path:
    arguments = ["tokenize", *small_shards[:3], "--out", "demo/tokens", "--tokenizer", "untrained:vit-tiny-32-l18"]
    command = [*BSQ, *map(str, arguments), "--in-process"]
    subprocess.run(command, env=bsq_environment(), cwd=tmp_path, capture_output=True, timeout=120, check=True)
    return tmp_path


def test_the_tour_runs(folder: Path) -> None:
    assert len(BLOCKS) >= 7
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(BLOCKS)],
        env=bsq_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("27 samples of 4 x 4 tokens of 18 bits\nepoch 1 comes next\n"), done.stdout
    assert "a vocabulary of 1,026 ids" in done.stdout


def test_the_sequence_for_an_export_is_that_of_the_tour(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```\n(group_bits.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(text)
    (tmp_path / "sequence.yaml").write_text(text, encoding="utf-8")
    form = SequenceFormat(group_bits=(9, 9), id_offset=(0, 512), boi=1024, eoi=1025)
    assert read_sequence_format(tmp_path / "sequence.yaml", 18).fingerprint == form.fingerprint
