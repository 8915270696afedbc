"""A dataset as written verifies clean; whatever is changed in it afterwards, or was written wrong, is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.verify import verify_dataset
from pipeline.check_files import _padding_is_set
from pipeline.dataset_files import serialise_plan
from schemas.errors import BsqError, SpecError


def only_problem(dataset: Any, words: str) -> None:
    """Verification finds something, and every line that it says is about `words`."""
    result = verify_dataset(dataset.url, dataset.storage_options)
    assert result.problems, "nothing was found"
    assert not [problem for problem in result.problems if words not in problem], result.problems
    assert not result.ok
    assert words in result.describe()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"views": 3},
        {"frames": lambda position: 1 + 2 * position},
        {"frames": lambda position: 1 + 2 * position, "views": 2},
        {"num_shards": 0},
        {"given_up": (1,)},
    ],
    ids=["images", "views", "clips", "clips-views", "no-shards", "given-up"],
)
def test_a_dataset_as_written_is_clean(write_dataset, options):
    dataset = write_dataset(**options)
    seen = []
    result = verify_dataset(dataset.url, on_progress=lambda done, total: seen.append((done, total)))
    assert result.problems == []
    assert result.finished
    assert result.files == len(dataset.commits)
    assert result.samples == 5 * result.files
    assert result.failed == result.files
    assert seen == [(done, result.files) for done in range(1, result.files + 1)]
    assert "Everything is as recorded." in result.describe()


def test_given_up_shards_are_told(write_dataset):
    assert "1 shard was given up: 1." in verify_dataset(write_dataset(given_up=(1,)).url).describe()


def test_a_folder_without_a_dataset_is_refused_in_one_line(tmp_path):
    with pytest.raises(SpecError, match="no dataset here"):
        verify_dataset(str(tmp_path / "nothing"))


# --- a dataset that is not finished


def test_what_is_committed_is_checked_before_the_end(write_dataset):
    dataset = write_dataset(finished=False)
    result = verify_dataset(dataset.url)
    assert result.ok
    assert not result.finished
    assert result.files == 3
    assert "Not finished: only the manifest is missing" in result.describe()
    flip_a_bit(dataset.path(dataset.commits[1].file), 50)
    only_problem(dataset, dataset.commits[1].file)


def test_files_without_a_record_are_no_damage_while_the_job_may_go_on(write_dataset):
    dataset = write_dataset(finished=False)
    dataset.storage.publish("tokens/0000/0000009-01234567.parquet", b"x")
    dataset.path("tokens/0000/.0000010-01234567.parquet.12.0123456789abcdef.tmp").write_bytes(b"x")
    result = verify_dataset(dataset.url)
    assert result.ok
    assert "0000009-01234567.parquet" in result.describe()
    assert ".tmp" in result.describe()


def test_a_dataset_in_an_object_store_is_checked_as_well(write_dataset, object_store):
    dataset = write_dataset(url=f"{object_store.url}/dataset", storage_options=object_store.storage_options)
    result = verify_dataset(dataset.url, dataset.storage_options)
    assert (result.problems, result.files, result.finished) == ([], 3, True)
    dataset.storage.delete(dataset.commits[1].file)
    only_problem(dataset, "the file is gone")


# --- changed after it was written


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "bit of a token file": (
        lambda dataset: flip_a_bit(dataset.path(dataset.commits[0].file), 700),
        "its bytes were changed",
    ),
    "bit of a failure table": (
        lambda dataset: flip_a_bit(dataset.path(dataset.commits[0].failures.file), 50),
        "its bytes were changed",
    ),
    "token file cut": (
        lambda dataset: dataset.path(dataset.commits[0].file).write_bytes(b"PAR1"),
        "4 bytes, the ledger says",
    ),
    "token file gone": (lambda dataset: dataset.path(dataset.commits[2].file).unlink(), "the file is gone"),
    "failure table gone": (lambda dataset: dataset.path(dataset.commits[2].failures.file).unlink(), "the file is gone"),
    "file of nobody": (
        lambda dataset: dataset.storage.publish("tokens/0000/0000001-01234567.parquet", b"x"),
        "tokens/0000/0000001-01234567.parquet: belongs to no record",
    ),
    "failure table of nobody": (
        lambda dataset: dataset.storage.publish("failures/0000/0000001-01234567.parquet", b"x"),
        "failures/0000/0000001-01234567.parquet: belongs to no record",
    ),
    "temporary": (
        lambda dataset: dataset.path("tokens/0000/.x.parquet.12.0123456789abcdef.tmp").write_bytes(b"x"),
        "temporary",
    ),
    "another plan": (
        lambda dataset: write_other_plan(dataset),
        "plan/0000.parquet: not the plan that the job began with",
    ),
    "other weights": (
        lambda dataset: flip_a_bit(dataset.path(f"{dataset.job.tokenizer.folder}/model.safetensors"), -1),
        "not the weights that made the tokens",
    ),
    "weights gone": (
        lambda dataset: dataset.path(f"{dataset.job.tokenizer.folder}/model.safetensors").unlink(),
        "the tokenizer's copy cannot be used",
    ),
    "another fingerprint": (
        lambda dataset: edit_json(dataset.path("job.json"), fingerprint="0" * 64),
        "fingerprint",
    ),
    "manifest table": (
        lambda dataset: flip_a_bit(dataset.path("manifest/0000.parquet"), 100),
        "manifest/0000.parquet: not the file",
    ),
    "manifest counts": (
        lambda dataset: edit_json(dataset.path("manifest/0000.json"), rows=11),
        "rows is 11, but the records give 12",
    ),
    "manifest promises": (
        lambda dataset: edit_json(dataset.path("manifest/0000.json"), complete=False),
        "complete is False, but the records give True",
    ),
}


def write_other_plan(dataset: Any) -> None:
    dataset.storage.publish("plan/0000.parquet", serialise_plan([url + "x" for url in dataset.urls]))
    # The manifest repeats the URLs; here only the plan is wrong.
    dataset.path("manifest/0000.json").unlink()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_and_named(write_dataset, change):
    dataset = write_dataset()
    act, words = CHANGES[change]
    act(dataset)
    only_problem(dataset, words)


def test_a_commit_that_the_manifest_does_not_list_is_named(write_dataset):
    dataset = write_dataset(num_shards=3, given_up=(2,))
    dataset.append(4, dataset.commits[0].model_copy(update={"shard": 2}).to_line())
    result = verify_dataset(dataset.url)
    assert [problem for problem in result.problems if "it is committed, but the manifest does not list it" in problem]
    assert [problem for problem in result.problems if "it lists 2 token files, the ledger 3" in problem]


def test_a_missing_ledger_segment_ends_it_with_one_line(write_dataset):
    dataset = write_dataset()
    dataset.path("ledger/0000/000000001.jsonl").unlink()
    with pytest.raises(BsqError, match="a segment of ledger/0000 is missing"):
        verify_dataset(dataset.url)


def test_a_late_second_commit_counts_for_nothing_and_its_file_is_named(write_dataset):
    dataset = write_dataset()
    late = dataset.commits[0].model_copy(update={"file": "tokens/0000/0000000-99999999.parquet", "rows": 99})
    dataset.append(4, late.to_line())
    assert verify_dataset(dataset.url).problems == []
    dataset.storage.publish(late.file, b"late")
    only_problem(dataset, "tokens/0000/0000000-99999999.parquet: a second commit of its shard")


# --- written wrong, with hashes and sizes that agree


def set_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        values = pa.array(change(table[name].to_pylist()), field.type)
        return table.set_column(table.schema.names.index(name), field, values)

    return edit


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


WRONG_TABLES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "rows out of order": (lambda table: table.take([1, 0, 2, 3]), "not in the order position, clip, view"),
    "token bytes too long": (
        set_column("tokens", lambda values: [values[0] + b"\0", *values[1:]]),
        "token bytes of the wrong length, the first is row 0",
    ),
    "a row missing": (lambda table: table.slice(0, 3), "position 3 has neither"),
    "a column missing": (lambda table: table.drop_columns(["caption"]), "columns are"),
    "a column too many": (lambda table: table.append_column("extra", pa.array([1] * len(table))), "columns are"),
    "crop outside": (set_column("crop", first([400, 0, 480, 480])), "crop that is not inside their picture"),
    "crop of two numbers": (set_column("crop", first([0, 0])), "a crop is not four numbers"),
    "image with a start": (set_column("start", first(1.5)), "start without frame times"),
    "key of another sample": (set_column("key", lambda values: [values[1], *values[1:]]), "one to one"),
    "position past the end": (set_column("position", lambda values: [*values[:3], 9]), "position 3 has neither"),
}


@pytest.mark.parametrize("mistake", WRONG_TABLES)
def test_a_mistake_in_the_rows_is_named(write_dataset, mistake):
    edit, words = WRONG_TABLES[mistake]
    result = verify_dataset(write_dataset(edit_table=edit).url)
    assert [problem for problem in result.problems if words in problem], result.problems


def test_a_missing_view_is_named(write_dataset):
    dataset = write_dataset(views=2, edit_table=lambda table: pa.concat_tables([table.slice(0, 3), table.slice(4)]))
    only_problem(dataset, "a clip does not have all its 2 views, the first at row 2")


def test_views_with_wrong_numbers_are_named(write_dataset):
    dataset = write_dataset(views=2, edit_table=set_column("view", lambda values: [0, 2, *values[2:]]))
    only_problem(dataset, "a clip does not have all its 2 views")


def test_padding_bits_must_be_zero():
    """18 bits times 16 tokens fill whole bytes, so the check is asked directly, with 3 tokens."""
    rows = [b"\xff" * 6 + b"\x3f", b"\xff" * 6 + b"\x7f", b"\0" * 7]
    sizes = np.array([7, 7, 7], np.int32)
    found = _padding_is_set(pa.chunked_array([rows], pa.binary()), sizes, np.array([54, 54, 54]))
    assert found.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "0" * 64),
        ("shard", 41),
        ("part", 1),
        ("bits", 36),
        ("group_size", 6),
        ("views", 2),
        ("bit_order", "msb_first"),
        ("channel_order", "lsb_first"),
        ("samples", 6),
        ("failed", 0),
        ("failures_sha256", ""),
        ("source_bytes", 1),
        ("source_etag", "other"),
        ("partial", True),
    ],
)
def test_a_footer_that_disagrees_is_named(write_dataset, name, value):
    dataset = write_dataset(edit_footer=lambda footer: dataclasses.replace(footer, **{name: value}))
    result = verify_dataset(dataset.url)
    assert [problem for problem in result.problems if f"the footer says {name} {value!r}" in problem]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 5}, "4 rows, the ledger says 5"),
        ({"tokens": 1}, "the ledger says tokens 1, the rows give 64"),
        ({"samples": 6}, "the footer says samples 5, expected 6"),
        ({"failed": 2}, "1 samples failed, the ledger says 2"),
        ({"warnings": 0}, "1 warnings, the ledger says 0"),
        ({"min_key": ""}, "the ledger says min_key"),
        ({"max_key": "zzz"}, "the ledger says max_key"),
        ({"max_frames": 2}, "the ledger says max_frames 2, the rows give 1"),
        ({"row_groups": [2, 2]}, "row groups of [4] rows, the ledger says [2, 2]"),
        ({"tokens_offset": [4]}, "does not begin where the ledger says"),
        ({"failures": None}, "no failure table is recorded"),
        ({"arithmetic": "ffffffff"}, "the ledger does not say what arithmetic"),
        ({"shard": 77}, "shard 77 is in no plan"),
        ({"partial": True}, "a damaged archive has a row without a key"),
        ({"sha256": "0" * 64}, "its bytes were changed"),
    ],
)
def test_a_record_that_disagrees_is_named(write_dataset, change, words):
    dataset = write_dataset(num_shards=1, edit_commit=lambda commit: commit.model_copy(update=change))
    result = verify_dataset(dataset.url)
    assert [problem for problem in result.problems if words in problem], result.problems


def test_a_failure_of_no_known_severity_is_named(write_dataset):
    dataset = write_dataset(edit_failures=lambda rows: [dataclasses.replace(rows[0], severity="bad"), *rows[1:]])
    assert [problem for problem in verify_dataset(dataset.url).problems if "severity 'bad'" in problem]


def test_a_shard_that_is_neither_committed_nor_given_up_is_named(write_dataset):
    dataset = write_dataset(num_shards=3, given_up=(1,))
    dataset.path("ledger/0000/000000003.jsonl").write_bytes(b"")
    result = verify_dataset(dataset.url)
    assert [
        problem for problem in result.problems if "1 shard of the plan is neither committed nor given up" in problem
    ]


def test_many_problems_are_cut_in_what_is_shown_and_kept_in_what_is_returned(write_dataset):
    dataset = write_dataset(num_shards=30)
    for commit in dataset.commits:
        dataset.path(commit.file).unlink()
    result = verify_dataset(dataset.url)
    assert len(result.problems) == 30
    assert "and 10 more" in result.describe()
    assert len(result.describe().splitlines()) < 30
