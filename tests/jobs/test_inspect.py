"""Whatever a user points at, inspect says what it is, and a stranger's file is one clear line."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.inspect import describe
from schemas.errors import BsqError, SpecError
from schemas.lease import Lease
from schemas.ledger import Attempt


def test_a_dataset_is_described_with_its_tokenizer_counts_and_failures(write_dataset):
    dataset = write_dataset(frames=lambda position: 1 + 2 * position)
    text = describe(dataset.url + "/")
    assert text.splitlines()[0] == f"{dataset.url}: bsqtok dataset, finished (generation 0)"
    assert "random weights: it was never trained" in text
    assert "4 x 4 for each frame of 32 x 32 px, 18 bits each in groups of 9" in text
    assert "15, of which 3 failed; 3 warnings" in text
    assert "12 of 1 to 7 frames, 768 tokens" in text
    assert "(0.281 for the tokens alone)" in text  # 18 bits for 8 x 8 pixels
    assert dataset.job.fingerprint in text
    assert "3 failed  group   NoMedia, for example: only a .txt member" in text
    assert "3 warning sidecar CaptionNotText, for example: not text" in text


def test_shards_that_failed_are_named(write_dataset):
    text = describe(write_dataset(given_up=(0, 2)).url)
    assert "finished (generation 0), but 2 shards failed" in text
    assert "failed shards  0, 2" in text


def test_a_dataset_that_is_not_finished_says_so_and_counts_what_is_there(write_dataset):
    dataset = write_dataset(finished=False)
    text = describe(dataset.url)
    assert "not finished: 3 of 3 shards committed. `bsq resume` goes on" in text
    assert "12 of one frame, 192 tokens" in text
    assert "3 failed  group   NoMedia" in text


def test_a_dataset_without_rows_is_described(write_dataset):
    assert "no pixels" in describe(write_dataset(num_shards=0).url)


def test_a_token_file_is_described_with_its_first_indices(write_dataset):
    dataset = write_dataset(views=2)
    text = describe(str(dataset.path(dataset.commits[1].file)))
    assert "token file of shard 1, 8 rows" in text
    assert "5, of which 1 failed" in text
    assert "4 x 4 for each frame, 18 bits each in groups of 9, lsb_first, channels msb_first, 2 views" in text
    assert f"tokens at byte {dataset.commits[1].tokens_offset[0]:,}" in text
    assert "001/00000 clip 0 view 1: 1 frame, 640x480 cropped to 80,0 480x480" in text
    row = pq.read_table(dataset.path(dataset.commits[1].file))["tokens"][0].as_py()
    value = int.from_bytes(row, "little")
    assert f"indices {value & 0x3FFFF} {value >> 18 & 0x3FFFF} " in text
    assert "and 3 more" in text


def test_a_token_file_without_rows_is_described(write_dataset):
    dataset = write_dataset(num_shards=1, edit_table=lambda table: table.slice(0, 0))
    assert "token file of shard 0, 0 rows" in describe(str(dataset.path(dataset.commits[0].file)))


def test_each_kind_of_file_says_what_it_is(write_dataset):
    dataset = write_dataset()
    lease = Lease(owner="o", host="node3", boot_id="b", pid_namespace="n", pid=77, process_started="1")
    dataset.storage.publish("lease.json", lease.model_dump_json().encode())
    attempt = Attempt(shard=2, attempt=1, stage="open", error="ShardUnreadable", message="no answer", worker="w", at="")
    dataset.append(4, attempt.to_line())
    for name, words in {
        dataset.commits[0].failures.file: "failure table of shard 0, 2 rows",
        "manifest/0000.parquet": "manifest, 3 token files, 12 rows",
        "manifest/0000.json": "manifest of generation 0 (complete): 3 token files, 12 rows, 192 tokens",
        "plan/0000.parquet": "the plan of a dataset, 3 shards",
        "job.json": "the identity of a dataset",
        "lease.json": "process 77 on node3",
        "ledger/0000/000000001.jsonl": "ledger segment, 1 record (1 commit)",
        "ledger/0000/000000004.jsonl": "shard 2, attempt 1: ShardUnreadable: no answer",
        dataset.job.tokenizer.folder: "4 x 4 tokens of 18 bits for each frame",
        f"{dataset.job.tokenizer.folder}/config.json": "a JSON file with",
    }.items():
        assert words in describe(str(dataset.path(name))), name


def test_a_strangers_file_is_one_clear_line(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    (tmp_path / "x.tar").write_bytes(b"\0" * 257 + b"ustar\0" + b"\0" * 249)
    (tmp_path / "x.txt").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    for name, words in {
        "x.parquet": "a Parquet file of 1 row, but none of bsqtok (a)",
        "x.tar": "a tar archive of 512 bytes",
        "x.txt": "no file of a bsqtok dataset; it begins with b'hello'",
        "empty": "no file of a bsqtok dataset; it is empty",
    }.items():
        text = describe(str(tmp_path / name))
        assert words in text
        assert "\n" not in text


@pytest.mark.parametrize("name", ["", "nothing"])
def test_nothing_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(SpecError, match="no dataset") as caught:
        describe(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest/0000.parquet", "manifest/0000.json", "ledger/0000/000000001.jsonl"])
def test_a_damaged_file_is_an_error_that_names_it(write_dataset, name):
    dataset = write_dataset()
    path = dataset.path(name)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BsqError) as caught:
        describe(str(path))
    assert path.name in str(caught.value)


def test_what_came_from_data_cannot_steer_the_terminal(write_dataset):
    def edit(rows):
        return [rows[0], dataclasses.replace(rows[1], key="\x1b[2Jkey", message="\x1b]0;title\x07")]

    dataset = write_dataset(edit_failures=edit)
    for url in (dataset.url, str(dataset.path(dataset.commits[0].failures.file))):
        text = describe(url)
        assert "\x1b" not in text
        assert "\\x1b]0;title" in text


def test_a_dataset_in_an_object_store_is_described_as_well(write_dataset, object_store):
    dataset = write_dataset(url=f"{object_store.url}/dataset", storage_options=object_store.storage_options)
    assert "12 of one frame" in describe(dataset.url, dataset.storage_options)
    text = describe(f"{dataset.url}/{dataset.commits[0].file}", dataset.storage_options)
    assert "token file of shard 0, 4 rows" in text
