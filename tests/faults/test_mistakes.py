"""Small mistakes, one by one: each is told in a line, with the right exit code, and nothing is lost."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.cli import run
from pipeline.dataset_files import read_ledger
from pipeline.storage import open_storage
from tests.tiny_corpus import dataset_files, jpeg, photo_members, write_tar


@pytest.fixture(autouse=True)
def _restore_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said before it ended."""

    exit_code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The line on stderr that is no progress line, which is all that there may be."""
        lines = [line for line in self.err.splitlines() if not (line[:2].isdigit() and line[2] == ":")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def tokenize(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `bsq tokenize` in this process, with the stub encoder and the worker inside."""

    def call(*arguments: object, tokenizer: str = "stub", size: int = 64) -> Said:
        capsys.readouterr()
        fixed = ["--tokenizer", tokenizer, "--in-process", "--max-failed-fraction", "1"]
        fixed += ["--size", str(size)] if size else []
        exit_code = run(["tokenize", *map(str, arguments), *fixed])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Said(exit_code, captured.out, captured.err)

    return call


def tables(out: Path, shard: int = 0) -> tuple[list[str], list[tuple[str | None, str]]]:
    """Keys that were tokenized, and (key, class) of every failure row, of one committed shard."""
    commit = read_ledger(open_storage(str(out)), 0).commits[shard, 0]
    rows = pq.read_table(out / commit.file).to_pylist()
    failures = pq.read_table(out / commit.failures.file).to_pylist() if commit.failures else []
    assert commit.samples == len({row["position"] for row in [*rows, *failures] if row["position"] is not None})
    return [row["key"] for row in rows], [(row["key"], row["error"]) for row in failures]


def test_a_truncated_tar_keeps_what_came_before_the_cut(tmp_path: Path, tokenize: Any) -> None:
    whole = write_tar(tmp_path / "whole.tar", photo_members(0, 4))
    with tarfile.open(whole) as archive:
        third = archive.getmember("000002.jpg")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: third.offset_data + 100])
    said = tokenize(cut, "--out", tmp_path / "out")
    assert said.exit_code == 3
    assert "shard 0: damaged archive, committed 2 rows read before the damage" in said.err
    keys, failures = tables(tmp_path / "out")
    assert keys == ["000000", "000001"]
    assert failures == [("000002", "SampleCutOff"), (None, "TarTruncated")]


def test_damaged_shards_fail_as_a_whole_where_that_is_asked_for(tmp_path: Path, tokenize: Any) -> None:
    whole = write_tar(tmp_path / "whole.tar", photo_members(0, 4))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:20_000])
    said = tokenize(cut, whole, "--out", tmp_path / "out", "--damaged-shards", "fail")
    assert said.exit_code == 3
    assert "shard 0 failed" in said.out
    ledger = read_ledger(open_storage(str(tmp_path / "out")), 0)
    assert ledger.given_up[0].error == "TarTruncated"
    assert [shard for shard, _ in ledger.commits] == [1]
    assert [name for name in dataset_files(tmp_path / "out") if "0000000-" in name] == []


def test_a_key_that_comes_again_is_tokenized_once_and_listed(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "twice.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("a.jpg", jpeg(3))])
    assert tokenize(shard, "--out", tmp_path / "out").exit_code == 0
    assert tables(tmp_path / "out") == (["a", "b"], [("a", "KeyDuplicated")])


def test_a_key_interleaved_with_another_is_listed(tmp_path: Path, tokenize: Any) -> None:
    members = [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("a.txt", b"of a"), ("b.txt", b"of b")]
    shard = write_tar(tmp_path / "interleaved.tar", members)
    assert tokenize(shard, "--out", tmp_path / "out").exit_code == 0
    assert tables(tmp_path / "out") == (["a", "b"], [("a", "KeySplit"), ("b", "KeySplit")])


def test_an_empty_shard_commits_with_no_rows(tmp_path: Path, tokenize: Any) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    full = write_tar(tmp_path / "full.tar", photo_members(0, 3))
    said = tokenize(empty, full, "--out", tmp_path / "out")
    assert (said.exit_code, said.err.count("failed")) == (0, 0)
    assert tables(tmp_path / "out", 0) == ([], [])
    assert len(tables(tmp_path / "out", 1)[0]) == 3


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, "ShardNotFound", "no such"),
        (b"", "NotATar", "the file is empty"),
        (b"<html>502 Bad Gateway</html>", "NotATar", "no tar archive"),
    ],
)
def test_a_shard_that_is_missing_or_no_archive_fails_in_one_line_and_the_rest_goes_on(
    tmp_path: Path, tokenize: Any, content: bytes | None, error: str, words: str
) -> None:
    bad = tmp_path / "bad.tar"
    if content is not None:
        bad.write_bytes(content)
    good = write_tar(tmp_path / "good.tar", photo_members(0, 3))
    said = tokenize(bad, good, "--out", tmp_path / "out")
    assert said.exit_code == 3
    lines = [line for line in said.out.splitlines() if line.startswith("shard 0 failed")]
    assert len(lines) == 1 and str(bad) in lines[0] and words in lines[0].lower()
    ledger = read_ledger(open_storage(str(tmp_path / "out")), 0)
    assert ledger.given_up[0].error == error
    assert ledger.given_up[0].attempts == 1, "trying again cannot help"
    assert tables(tmp_path / "out", 1)[0] == ["000000", "000001", "000002"]


def test_an_output_that_cannot_be_written_refuses_in_one_line(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "good.tar", photo_members(0, 2))
    (tmp_path / "file").write_text("in the way")
    said = tokenize(shard, "--out", tmp_path / "file" / "out")
    assert said.exit_code == 4
    assert str(tmp_path / "file" / "out") in said.complaint
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_of_other_settings_refuses_and_names_them(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "good.tar", photo_members(0, 2))
    assert tokenize(shard, "--out", tmp_path / "out").exit_code == 0
    before = dataset_files(tmp_path / "out")
    said = tokenize(shard, "--out", tmp_path / "out", "--crop", "exact")
    assert said.exit_code == 4
    assert "preprocess.crop" in said.complaint and "exact" in said.complaint
    said = tokenize(shard, "--out", tmp_path / "out", size=96)
    assert said.exit_code == 4 and "size" in said.complaint
    assert dataset_files(tmp_path / "out") == before


def test_an_output_that_is_not_ours_is_left_alone(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "good.tar", photo_members(0, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    said = tokenize(shard, "--out", tmp_path / "out", "--force")
    assert said.exit_code == 4 and "thesis.tex" in said.complaint
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_other_shards_are_refused_and_the_same_ones_go_on(tmp_path: Path, tokenize: Any) -> None:
    one = write_tar(tmp_path / "one.tar", photo_members(0, 2))
    two = write_tar(tmp_path / "two.tar", photo_members(10, 2))
    assert tokenize(one, "--out", tmp_path / "out").exit_code == 0
    before = dataset_files(tmp_path / "out")
    said = tokenize(one, two, "--out", tmp_path / "out")
    assert said.exit_code == 4 and "other shards" in said.complaint
    assert said.complaint.rstrip().endswith("--append adds those that are not in it."), "it is finished"
    assert tokenize(one, "--out", tmp_path / "out").exit_code == 0
    assert dataset_files(tmp_path / "out") == before


def test_a_shard_named_twice_is_a_mistake(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "good.tar", photo_members(0, 2))
    said = tokenize(shard, tmp_path / "sub" / ".." / "good.tar", "--out", tmp_path / "out")
    assert said.exit_code == 2 and "twice" in said.complaint
    assert not (tmp_path / "out").exists()


def test_an_unknown_tokenizer_is_a_mistake_and_the_nearest_name_is_told(tmp_path: Path, tokenize: Any) -> None:
    shard = write_tar(tmp_path / "good.tar", photo_members(0, 2))
    said = tokenize(shard, "--out", tmp_path / "out", tokenizer="untrained:vit-tiny-32-l81", size=0)
    assert said.exit_code == 2
    assert "vit-tiny-32-l18" in said.complaint.replace("vit-tiny-32-l81", "")
    assert not (tmp_path / "out").exists()


def test_twenty_missing_shards_in_a_row_stop_the_job_with_the_reason(tmp_path: Path, tokenize: Any) -> None:
    said = tokenize(f"{tmp_path}/missing-{{000..099}}.tar", "--out", tmp_path / "out")
    assert said.exit_code == 3
    assert "20 shards failed in a row" in said.err and "missing-" in said.err
    ledger = read_ledger(open_storage(str(tmp_path / "out")), 0)
    assert len(ledger.given_up) == 20
    assert not (tmp_path / "out" / "manifest" / "0000.json").exists()


def test_pyarrow_reads_keys_that_were_not_utf8(tmp_path: Path, tokenize: Any) -> None:
    path = tmp_path / "latin1.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        write_tar(tmp_path / "plain.tar", [("café.jpg", jpeg(1))])
        with tarfile.open(tmp_path / "plain.tar") as plain:
            member = plain.getmembers()[0]
            archive.addfile(member, plain.extractfile(member))
    assert tokenize(path, "--out", tmp_path / "out").exit_code == 0
    file = read_ledger(open_storage(str(tmp_path / "out")), 0).commits[0, 0].file
    keys = pq.read_table(tmp_path / "out" / file)["key"]
    assert keys.to_pylist() == ["caf\\xe9"]
    assert keys.type == pa.string()
