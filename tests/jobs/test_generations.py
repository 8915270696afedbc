"""Generations above the first: a dataset that grows or wins back what had failed is what one run would have made."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.append import append_job
from jobs.inspect import describe
from jobs.progress import read_status
from jobs.retry import retry_job
from jobs.start import resume_job, start_job
from jobs.verify import verify_dataset
from pipeline.dataset_files import list_generations, read_manifest
from pipeline.generations import list_begun, read_generation
from pipeline.storage import open_storage
from schemas.errors import FingerprintDiffers, Refused, SpecError
from schemas.jobspec import parse_spec
from tests.jobs.generations import (
    KINDS,
    WIDE,
    all_rows,
    append,
    assert_same_dataset,
    counts,
    job_of,
    job_spec,
    loaded_rows,
    retry,
    tokenize,
)
from tests.tiny_corpus import dataset_files, photo_members, write_tar


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations(["retry", "retry-samples", "retry-damaged", "append"]))
def test_in_whatever_order_a_dataset_is_completed_it_becomes_the_same(
    tmp_path_factory: pytest.TempPathFactory, order: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    mixed = [member for i, kind in enumerate(sorted(KINDS)) for member in KINDS[kind](i)]
    shards = [write_tar(folder / f"{number}.tar", [*mixed, *photo_members(50 * number, 3)]) for number in range(4)]
    whole = {shard: shard.read_bytes() for shard in shards}
    shards[1].write_bytes(whole[shards[1]][:30_000])
    shards[2].unlink()
    out = folder / "out"
    tokenize(shards[:3], out, limits={"max_pixels": 48 * 40})
    for shard, data in whole.items():
        shard.write_bytes(data)
    for step in order:
        if step == "append":
            append(shards[3:], out, limits={"max_pixels": WIDE})
        else:
            retry(out, step, limits={"max_pixels": WIDE})  # type: ignore[arg-type]
    tokenize(shards, folder / "all", limits={"max_pixels": WIDE})
    assert_same_dataset(out, folder / "all")
    assert list_generations(open_storage(str(out))) == [0, 1, 2, 3, 4]


def test_generations_on_an_object_store(object_store: Any, tmp_path: Path, small_shards: list[Path]) -> None:
    out, options = f"{object_store.url}/tokens", object_store.storage_options
    narrow = job_spec([small_shards[0], small_shards[1]], Path("out"), limits={"max_pixels": 64})
    start_job(narrow.model_copy(update={"out": out}), runner="in-process", storage_options=options)
    wide = parse_spec({"limits": {"max_pixels": WIDE}}, source="test")
    retry_job(out, "retry-samples", asked=wide, runner="in-process", storage_options=options)
    added = parse_spec({"shards": [str(small_shards[2])], "out": out}, source="test")
    assert append_job(added, runner="in-process", storage_options=options).exit_code == 0
    result = verify_dataset(out, options)
    assert (result.problems, result.finished, result.rows, result.failed) == ([], True, 29, 0)
    assert read_status(out, options).generation == 2


# ---- a corpus that grows


def test_a_dataset_that_grew_is_the_one_made_at_once_and_earlier_generations_stay_readable(
    tmp_path: Path, small_shards: list[Path]
) -> None:
    out = tmp_path / "out"
    tokenize(small_shards[:2], out)
    first = all_rows(out)
    append(small_shards[2:3], out)
    assert append(small_shards[3:], out).exit_code == 0
    tokenize(small_shards, tmp_path / "all")
    assert dataset_files(out) == dataset_files(tmp_path / "all")
    assert_same_dataset(out, tmp_path / "all")
    assert all_rows(out, generation=0) == first
    assert [len(loaded_rows(out, generation)) for generation in (0, 1, 2)] == [16, 29, 53]
    assert {row["shard"] for row in all_rows(out, generation=1)} == {0, 1, 2}
    manifest = read_manifest(open_storage(str(out)))
    assert manifest is not None
    assert manifest.table["generation"].to_pylist() == [0, 0, 1, 2, 2, 2]
    # The commands that made it find nothing left to do.
    assert tokenize(small_shards[:2], out).exit_code == 0
    assert tokenize(small_shards, out).exit_code == 0
    assert append(small_shards[3:], out).exit_code == 0
    assert resume_job(str(out), runner="in-process").exit_code == 0
    assert list_begun(open_storage(str(out))) == [0, 1, 2]
    assert "generation 2" in describe(str(out))
    assert read_status(str(out)).progress.committed == 6


def test_settings_that_are_not_given_are_the_datasets_own(tmp_path: Path, small_shards: list[Path]) -> None:
    shapes = {"preprocess": {"size": 32, "crop": "exact"}, "clips": {"clip_frames": 2, "stride": 1}, "carry": ["label"]}
    tokenize(small_shards[:1], tmp_path / "out", limits={"max_pixels": WIDE}, **shapes)
    append(small_shards[2:3], tmp_path / "out")
    tokenize([small_shards[0], small_shards[2]], tmp_path / "all", limits={"max_pixels": WIDE}, **shapes)
    assert dataset_files(tmp_path / "out") == dataset_files(tmp_path / "all")
    record = read_generation(open_storage(str(tmp_path / "out")), job_of(tmp_path / "out"), 1)
    assert (record.kind, record.spec.limits.max_pixels) == ("append", WIDE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preprocess": {"crop": "exact"}}, "preprocess.crop: center there, exact asked for"),
        ({"clips": {"fps": 4}}, "clips.fps: 8.0 there, 4.0 asked for"),
        ({"tokenizer": "untrained:vit-tiny-32-l18"}, "tokenizer.bits_per_token: not set there, 18 asked for"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    tmp_path: Path, small_shards: list[Path], values: dict[str, Any], words: str
) -> None:
    tokenize(small_shards[:1], tmp_path / "out")
    with pytest.raises(FingerprintDiffers) as refusal:
        append(small_shards[1:2], tmp_path / "out", **values)
    assert words in str(refusal.value)
    assert list_begun(open_storage(str(tmp_path / "out"))) == [0]


def test_a_shard_that_is_there_is_not_added_again(tmp_path: Path, small_shards: list[Path]) -> None:
    tokenize(small_shards[:2], tmp_path / "out")
    with pytest.raises(Refused, match=r"small-01\.tar \(shard 1\) is in the dataset already"):
        append(small_shards[1:3], tmp_path / "out")
    with pytest.raises(Refused, match=r"and 1 more of those asked for are in the dataset already"):
        append(small_shards[:3], tmp_path / "out")
    append(small_shards[2:3], tmp_path / "out")
    with pytest.raises(Refused, match=r"\(shard 2\)"):
        append(small_shards[2:4], tmp_path / "out")


def test_other_shards_without_append_are_refused_and_append_is_named(tmp_path: Path, small_shards: list[Path]) -> None:
    tokenize(small_shards[:2], tmp_path / "out")
    with pytest.raises(Refused, match="--append"):
        tokenize(small_shards[2:], tmp_path / "out")


def test_where_there_is_no_dataset_nothing_is_added_or_tried_again(tmp_path: Path, small_shards: list[Path]) -> None:
    with pytest.raises(SpecError, match="Leave --append out"):
        append(small_shards, tmp_path / "out")
    with pytest.raises(SpecError, match="no dataset here"):
        retry(tmp_path / "out", "retry")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_dataset_is_finished_first(tmp_path: Path, small_shards: list[Path]) -> None:
    out = tmp_path / "out"
    tokenize(small_shards[:2], out)
    shutil.rmtree(out / "manifest")
    for begin in (lambda: append(small_shards[2:3], out), lambda: retry(out, "retry-samples")):
        with pytest.raises(Refused, match=r"not finished.*bsq resume"):
            begin()
    assert resume_job(str(out), runner="in-process").exit_code == 0
    append(small_shards[2:3], out)
    (out / "manifest/0001.json").unlink()
    with pytest.raises(Refused, match=r"generation 1 \(`bsq tokenize --append`\) is not finished"):
        append(small_shards[3:4], out)
    with pytest.raises(Refused, match="generation 1"):
        retry(out, "retry")
    assert (read_status(str(out)).state, read_status(str(out)).generation) == ("interrupted", 1)
    assert "not finished" in describe(str(out))
    assert verify_dataset(str(out)).problems == []
    assert append(small_shards[2:3], out).exit_code == 0
    assert read_status(str(out)).state == "complete"


def test_a_retry_may_change_limits_but_nothing_that_decides_bits(tmp_path: Path, small_shards: list[Path]) -> None:
    tokenize(small_shards[:1], tmp_path / "out", limits={"max_pixels": 64})
    with pytest.raises(SpecError, match=r"preprocess\.crop cannot be changed by a retry"):
        retry(tmp_path / "out", "retry-samples", preprocess={"crop": "exact"})
    with pytest.raises(SpecError, match="tokenizer cannot be changed"):
        retry(tmp_path / "out", "retry-samples", tokenizer="stub")
    said: list[str] = []
    asked = parse_spec({"limits": {"max_pixels": WIDE}}, source="test")
    retry_job(
        str(tmp_path / "out"),
        "retry-samples",
        asked=asked,
        runner="in-process",
        observer=lambda progress, line: said.append(line) if line else None,
    )
    assert f"limits.max_pixels is {WIDE} in this generation, 64 in the one before" in said


def test_other_limits_for_a_generation_that_was_begun_are_told(tmp_path: Path, small_shards: list[Path]) -> None:
    tokenize(small_shards[:1], tmp_path / "out", limits={"max_pixels": 64})
    outcome = tokenize(small_shards[:1], tmp_path / "out")
    assert any("limits.max_pixels stays 64" in line for line in outcome.lines)


@pytest.fixture
def web_folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which a server shows its files, whatever the query."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_credentials_of_urls_are_asked_for_again_and_never_written(
    tmp_path: Path, small_shards: list[Path], web_folder: tuple[Path, str]
) -> None:
    folder, url = web_folder
    secret, out = f"{url}/late.tar?sig=s3cr3t", tmp_path / "out"
    tokenize([small_shards[0], secret], out)
    assert counts(out)["failed_shards"] == 1
    with pytest.raises(Refused, match="full URLs"):
        retry(out, "retry")
    assert list_begun(open_storage(str(out))) == [0]
    shutil.copy(small_shards[1], folder / "late.tar")
    assert retry(out, "retry", shards=[secret]).exit_code == 0
    shutil.copy(small_shards[2], folder / "more.tar")
    assert append([f"{url}/more.tar?sig=s3cr3t"], out).exit_code == 0
    assert {row["shard"] for row in all_rows(out)} == {0, 1, 2}
    for path in out.rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), path


def test_shards_whose_urls_differ_only_in_what_is_hidden_are_never_mistaken_for_each_other(
    tmp_path: Path, small_shards: list[Path], web_folder: tuple[Path, str]
) -> None:
    folder, url = web_folder
    twins = [f"{url}/get.tar?file={name}" for name in "ab"]
    out = tmp_path / "out"
    tokenize([*twins, small_shards[0]], out)
    with pytest.raises(Refused, match="full URLs"):
        retry(out, "retry", shards=[twins[1]])
    # In the plan's own order there is no doubt.
    shutil.copy(small_shards[1], folder / "get.tar")
    assert retry(out, "retry", shards=twins).exit_code == 0
    assert {row["shard"] for row in all_rows(out)} == {0, 1, 2}


def test_status_names_the_first_of_what_failed_and_how_to_try_again(tmp_path: Path, small_shards: list[Path]) -> None:
    out = tmp_path / "out"
    tokenize([small_shards[0], tmp_path / "gone.tar"], out, limits={"max_pixels": 64})
    status = read_status(str(out))
    assert [shard.shard for shard in status.failed_shards] == [1]
    assert [(sample.shard, sample.key, sample.error) for sample in status.failed_samples[:2]] == [
        (0, "000000", "ImageTooLarge"),
        (0, "000001", "ImageTooLarge"),
    ]
    text = status.describe()
    assert "key '000000': ImageTooLarge" in text
    assert f"bsq retry {out}\n" in text + "\n" and f"bsq retry {out} --samples" in text
    assert json.loads(status.to_json())["failed_samples"][0]["key"] == "000000"
    (out / "manifest/0000.json").unlink()
    status = read_status(str(out))
    assert status.state == "interrupted"
    assert [(shard.shard, shard.error) for shard in status.failed_shards] == [(1, "ShardNotFound")]
    assert len(status.failed_samples) == 5
