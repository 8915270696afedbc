"""Rows tokenized again are equal where nothing changed, and what did change, or is gone, is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli import run
from jobs.commit_table import read_commit_table
from jobs.sample_rows import choose_rows, read_rows
from jobs.start import start_job
from jobs.verify_decode import retokenize
from pipeline.storage import open_storage
from schemas.errors import SpecError
from schemas.jobspec import parse_spec
from tests.tiny_corpus import jpeg, mp4, photo_members, write_tar

TINY = "untrained:vit-tiny-32-l18"


def tokenize(folder: Path, **values: object) -> str:
    """A real dataset: twelve pictures and a clip of 11 frames in two shards, two views of each."""
    shards = [
        write_tar(folder / "photos.tar", photo_members(0, 10)),
        write_tar(folder / "clips.tar", [("walk.mp4", mp4(1, 11)), ("x.jpg", jpeg(77)), ("y.jpg", jpeg(78))]),
    ]
    spec = {"shards": [str(path) for path in shards], "out": str(folder / "tokens"), "tokenizer": TINY}
    spec |= {"preprocess": {"crop": "random", "views": 2, "flip": 0.5}} | values
    assert start_job(parse_spec(spec, source="test"), runner="in-process").exit_code == 0
    return str(spec["out"])


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokenize(tmp_path_factory.mktemp("untouched"))


def test_every_row_of_an_untouched_dataset_is_equal(untouched):
    seen = []
    result = retokenize(untouched, 1000, on_progress=lambda *place: seen.append(place))
    assert result.ok and not result.unreachable
    (agreement,) = result.agreements.values()
    # The clip of 11 frames at 8 a second gives rows of 8 and of 3 frames, two views of each.
    assert (result.compared, agreement.equal, agreement.flipped) == (28, 28, 0)
    assert agreement.bits == (24 + 2 * 8 + 2 * 3) * 16 * 18
    assert len(agreement.decibels) == 28
    assert seen[-1] == (28, 28)
    assert "28 of 28 rows equal, 0 of 13,248 bits flipped" in result.describe()
    assert result.describe().endswith("Every bit is the same.")


def test_the_seed_chooses_the_rows_and_each_is_as_likely(untouched):
    commits = read_commit_table(open_storage(untouched))
    chosen = [choose_rows(commits, 5, seed) for seed in range(400)]
    assert chosen[3] == choose_rows(commits, 5, 3) != chosen[4]
    counts = np.unique([file * 100 + row for rows in chosen for file, row in rows], return_counts=True)[1]
    assert len(counts) == 28
    assert counts.min() > 0.6 * 5 * 400 / 28


def test_rows_come_from_their_places(untouched):
    storage = open_storage(untouched)
    commits = read_commit_table(storage)
    every = [(file, row) for file, rows in enumerate(commits.column("rows").tolist()) for row in range(rows)]
    keys = [(row.values["key"], row.values["clip"], row.values["view"]) for row in read_rows(storage, commits, every)]
    tables = [pq.read_table(storage.url_of(name), use_threads=False) for name in commits.table["file"].to_pylist()]
    rows = [row for table in tables for row in table.select(["key", "clip", "view"]).to_pylist()]
    assert keys == [(row["key"], row["clip"], row["view"]) for row in rows]


def test_other_pixels_under_the_same_key_are_a_problem(tmp_path):
    out = tokenize(tmp_path)
    members = photo_members(0, 10)
    other = [(name, jpeg(99) if name == "000004.jpg" else payload) for name, payload in members]
    write_tar(tmp_path / "photos.tar", other)
    result = retokenize(out, 1000)
    (agreement,) = result.agreements.values()
    assert (agreement.rows, agreement.equal) == (28, 26)
    assert not result.ok
    assert "2 rows made by the same arithmetic differ" in result.describe()


def test_flips_that_another_arithmetic_does_not_explain_are_a_problem(tmp_path):
    out = tokenize(tmp_path)
    for segment in Path(out, "ledger", "0000").glob("*.jsonl"):
        text = segment.read_text()
        (made_by,) = {value["id"] for value in map(json.loads, text.splitlines()) if value.get("id")} or {""}
        segment.write_text(text.replace(made_by, "feedface") if made_by else text)
    few = retokenize(out, 1000)
    assert few.ok and list(few.agreements) == ["feedface"]
    write_tar(tmp_path / "photos.tar", [(f"{n:06d}.jpg", jpeg(500 + n)) for n in range(10)])
    write_tar(tmp_path / "clips.tar", [("walk.mp4", mp4(9, 11)), ("x.jpg", jpeg(177)), ("y.jpg", jpeg(178))])
    many = retokenize(out, 1000)
    assert "more than another arithmetic explains" in many.describe()


def test_a_source_that_is_gone_is_one_line_and_no_problem(tmp_path):
    out = tokenize(tmp_path)
    (tmp_path / "photos.tar").unlink()
    result = retokenize(out, 1000)
    assert result.ok
    assert (result.compared, dict(result.unreachable)) == (8, {"ShardNotFound": 20})
    (line,) = [line for line in result.describe().splitlines() if "not compared" in line]
    assert line.startswith("  20 rows not compared, the first because of ShardNotFound: ")
    (tmp_path / "clips.tar").unlink()
    assert retokenize(out, 3).describe().endswith("Nothing could be compared.")


def test_a_clip_of_another_length_is_said(tmp_path):
    out = tokenize(tmp_path)
    write_tar(tmp_path / "clips.tar", [("walk.mp4", mp4(1, 9)), ("x.jpg", jpeg(77)), ("y.jpg", jpeg(78))])
    result = retokenize(out, 1000)
    assert result.unreachable["SourceChanged"] >= 2
    assert "frames, not 3" in result.examples["SourceChanged"]


def test_the_stub_is_compared_without_pictures(tmp_path):
    out = tokenize(tmp_path, tokenizer="stub", preprocess={"size": 32})
    (agreement,) = retokenize(out, 1000).agreements.values()
    assert (agreement.rows, agreement.equal, agreement.decibels) == (13, 13, [])


def test_a_damaged_file_is_named_and_the_others_are_compared(tmp_path):
    out = tokenize(tmp_path)
    victim = sorted(Path(out, "tokens").rglob("*.parquet"))[0]
    victim.write_bytes(b"nothing")
    result = retokenize(out, 1000)
    assert result.compared == 8
    assert not result.ok and victim.name in result.problems[0]


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(SpecError, match="no dataset here"):
        retokenize(str(tmp_path), 3)


def test_the_command_says_it_all_and_ends_with_3(tmp_path, capsys):
    out = tokenize(tmp_path)
    assert run(["verify", out, "--decode", "6", "--seed", "2"]) == 0
    said = capsys.readouterr()
    assert "Everything is as recorded." in said.out and said.err == ""
    assert "Tokenized 6 of 6 random rows again (seed 2), on cpu" in said.out
    write_tar(tmp_path / "photos.tar", [(f"{n:06d}.jpg", jpeg(500 + n)) for n in range(10)])
    assert run(["verify", out, "--decode", "20"]) == 3
    assert "their sources or the weights are not those" in capsys.readouterr().out
