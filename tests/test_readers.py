"""Tools that know nothing of this project read the same tokens out of a token file, row by row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from schemas.tokenfile import TokenFooter, serialise_token_file, token_schema
from tests.tiny_corpus import REPOSITORY
from tokenizer.codes import pack_bits, unpack_bits, unpack_indices

GRID = (3, 5)
"""15 tokens in a frame: with 18 or 36 bits a row does not end at a byte, so there is padding to get wrong."""
NUM_ROWS = 1100
"""More than one row group."""


class Written:
    """A token file and what was put into it."""

    def __init__(self, folder: Path, bits: int, max_frames: int) -> None:
        generator = np.random.default_rng(bits)
        self.bits = bits
        self.frames = [1 + row % max_frames for row in range(NUM_ROWS)]
        self.bits_of_row: list[npt.NDArray[np.bool_]] = [
            generator.integers(0, 2, (frames * GRID[0] * GRID[1], bits)).astype(bool) for frames in self.frames
        ]
        self.tokens = [pack_bits(row[np.newaxis])[0].tobytes() for row in self.bits_of_row]
        is_clip = max_frames > 1
        table = pa.table(
            {
                "key": [f"ключ/{row:05d}" for row in range(NUM_ROWS)],
                "clip": [0] * NUM_ROWS,
                "view": [0] * NUM_ROWS,
                "frames": self.frames,
                "tokens": self.tokens,
                "width": [640] * NUM_ROWS,
                "height": [480] * NUM_ROWS,
                "crop": [[80, 0, 480, 480]] * NUM_ROWS,
                "flipped": [row % 2 == 0 for row in range(NUM_ROWS)],
                "start": [0.5 if is_clip else None] * NUM_ROWS,
                "frame_times": [[n / 8 for n in range(count)] if is_clip else None for count in self.frames],
                "position": list(range(NUM_ROWS)),
                "source_offset": [512 + 1024 * row for row in range(NUM_ROWS)],
                "caption": [None if row % 3 else f"picture {row}" for row in range(NUM_ROWS)],
            },
            schema=token_schema(["caption"]),
        )
        footer = TokenFooter(
            fingerprint="f" * 64,
            shard=0,
            bits=bits,
            group_size=9,
            grid=GRID,
            views=1,
            samples=NUM_ROWS,
            failed=0,
            source_bytes=1,
        )
        self.path = folder / "0000000-01234567.parquet"
        self.path.write_bytes(serialise_token_file(table, footer).data)
        self.columns = table.to_pydict()


@pytest.fixture(scope="module", params=[(18, 1), (36, 1), (18, 4), (36, 4)], ids=lambda pair: f"L{pair[0]}-T{pair[1]}")
def written(request, tmp_path_factory) -> Written:
    bits, max_frames = request.param
    return Written(tmp_path_factory.mktemp("readers"), bits, max_frames)


def same_columns(read: dict[str, list[Any]], written: Written) -> None:
    assert list(read) == list(written.columns)
    for name, values in written.columns.items():
        assert read[name] == values, name


def test_pyarrow(written):
    same_columns(pq.read_table(written.path).to_pydict(), written)
    same_columns(pa.dataset.dataset(written.path).to_table().to_pydict(), written)


def test_duckdb(written):
    with duckdb.connect() as connection:
        result = connection.execute("SELECT * FROM read_parquet(?) ORDER BY position", [str(written.path)])
        names = [column[0] for column in result.description]
        rows = result.fetchall()
        same_columns(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), written)
        total = connection.execute(
            "SELECT sum(octet_length(tokens)) FROM read_parquet(?) WHERE key >= 'ключ/00900'", [str(written.path)]
        ).fetchone()
        assert total == (sum(map(len, written.tokens[900:])),)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_polars(written, lazy):
    frame = polars.scan_parquet(written.path).collect() if lazy else polars.read_parquet(written.path)
    same_columns(frame.to_dict(as_series=False), written)


HUGGING_FACE = """
import os, sys
import datasets
import pyarrow as pa

source, cache = sys.argv[1:]
loaded = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=cache)
streamed = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
with pa.ipc.new_file(cache + "/loaded.arrow", loaded.data.table.schema) as sink:
    sink.write_table(loaded.data.table)
tokens = pa.table({"tokens": pa.array([row["tokens"] for row in streamed], pa.binary())})
with pa.ipc.new_file(cache + "/streamed.arrow", tokens.schema) as sink:
    sink.write_table(tokens)
# pyarrow's threads still hold Python files at the end of the interpreter, and would now and then abort it.
os._exit(0)
"""


def test_hugging_face_datasets(written, tmp_path):
    command = [sys.executable, "-c", HUGGING_FACE, str(written.path), str(tmp_path)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    same_columns(pa.ipc.open_file(tmp_path / "loaded.arrow").read_all().to_pydict(), written)
    streamed = pa.ipc.open_file(tmp_path / "streamed.arrow").read_all()
    assert streamed["tokens"].to_pylist() == written.tokens


def test_plain_numpy_finds_the_bits_by_the_rule_of_the_format(written):
    """Value t is `bits` bits from bit t * bits on, least significant first; channel 0 is the highest."""
    for row, tokens in enumerate(pq.read_table(written.path, columns=["tokens"])["tokens"].to_pylist()):
        stream = np.unpackbits(np.frombuffer(tokens, np.uint8), bitorder="little")
        count = len(written.bits_of_row[row])
        assert np.array_equal(stream[: count * written.bits].reshape(count, -1)[:, ::-1], written.bits_of_row[row])
        assert not stream[count * written.bits :].any()
        assert len(tokens) == -(-count * written.bits // 8)


def test_this_project_reads_them_as_well(written):
    for row in range(0, NUM_ROWS, 50):
        packed = np.frombuffer(written.tokens[row], np.uint8)[np.newaxis]
        bits = written.bits_of_row[row]
        assert np.array_equal(unpack_bits(packed, len(bits), written.bits)[0], bits)
        weights = 1 << np.arange(written.bits - 1, -1, -1, dtype=np.int64)
        assert np.array_equal(unpack_indices(packed, len(bits), written.bits)[0], bits @ weights)


def run_example(path: Path) -> subprocess.CompletedProcess[str]:
    # Isolated (-I): neither the repository nor its packages are on the path of the example.
    command = [sys.executable, "-I", str(REPOSITORY / "examples" / "read_tokens.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, encoding="utf-8")


def test_the_example_prints_every_index(written):
    done = run_example(written.path)
    if written.bits > 25:
        assert done.returncode != 0
        assert "64-bit word" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == NUM_ROWS
    weights = 1 << np.arange(written.bits - 1, -1, -1, dtype=np.int64)
    for row, line in enumerate(lines):
        key, clip, view, *indices = line.split()
        assert (key, clip, view) == (written.columns["key"][row], "0", "0")
        assert np.array_equal(np.array(indices, np.int64), written.bits_of_row[row] @ weights)


@pytest.mark.parametrize("name", ["schemas", "tokenizer", "pipeline", "jobs"])
def test_the_example_needs_nothing_of_this_project(name):
    source = (REPOSITORY / "examples" / "read_tokens.py").read_text(encoding="utf-8")
    assert f"import {name}" not in source
    assert f"from {name}" not in source
