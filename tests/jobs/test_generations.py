"""Generations above the first: a dataset that grows or wins back what had failed is what one run would have made."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jobs.begin
import jobs.generation
from jobs.append import append_job
from jobs.finish import write_manifest
from jobs.inspect import describe
from jobs.progress import read_status
from jobs.retry import retry_job
from jobs.start import resume_job, start_job
from jobs.verify import verify_dataset
from pipeline.dataset_files import list_generations, plan_name, read_manifest, serialise_plan
from pipeline.generations import list_begun, read_generation
from pipeline.storage import open_storage
from schemas.errors import BsqError, FingerprintDiffers, LeaseLost, Refused, SpecError
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


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: str, meanwhile: Callable[[], object]) -> None:
    """What happens while the next driver that reaches a step stands there."""

    def reached(step: str) -> None:
        if step == wanted:
            monkeypatch.undo()
            meanwhile()

    monkeypatch.setattr(jobs.begin, "reached", reached)
    monkeypatch.setattr(jobs.generation, "reached", reached)


def die() -> None:
    raise KeyboardInterrupt


def everything(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def assert_sound(out: Path, generations: list[int]) -> None:
    """The dataset can be read, is what its records say, and nothing is left to do."""
    loaded_rows(out)
    assert resume_job(str(out), runner="in-process").exit_code == 0
    result = verify_dataset(str(out))
    assert (result.problems, result.finished) == ([], True)
    storage = open_storage(str(out))
    names = [f"{number:04d}.{ending}" for number in generations for ending in ("json", "parquet")]
    assert storage.list("plan") == names[1:], "no draft is left, and job.json is the record of generation 0"
    assert list_begun(storage) == generations


@pytest.mark.parametrize("others", ["other settings", "other shards"])
def test_a_driver_that_wakes_before_its_job_json_changes_nothing_of_the_dataset_that_another_made(
    tmp_path: Path, small_shards: list[Path], monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    out, made = tmp_path / "out", {}
    shards = small_shards[:1] if others == "other settings" else small_shards[1:3]
    size = 32 if others == "other settings" else 64

    def make() -> None:
        start_job(job_spec(shards, out, preprocess={"size": size}), runner="in-process", force=True)
        made.update(everything(out))

    at_step(monkeypatch, "before_job", make)
    with pytest.raises(LeaseLost, match="another driver has begun the dataset"):
        tokenize(small_shards[:1], out)
    assert everything(out) == made
    assert_sound(out, [0])


def test_a_driver_that_wakes_before_its_generation_changes_nothing_of_the_one_that_another_made(
    tmp_path: Path, small_shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "out", {}
    tokenize(small_shards[:1], out)

    def make() -> None:
        append_job(parse_spec({"shards": [str(small_shards[1])], "out": str(out)}, source="test"),
                   runner="in-process", force=True)  # fmt: skip
        made.update(everything(out))

    at_step(monkeypatch, "before_generation", make)
    with pytest.raises(LeaseLost, match="another driver has begun generation 1"):
        append(small_shards[2:3], out)
    assert everything(out) == made
    assert_sound(out, [0, 1])


@pytest.mark.parametrize("generation", [0, 1])
def test_a_driver_that_wakes_before_its_plan_writes_the_one_that_another_has_worked_with(
    tmp_path: Path, small_shards: list[Path], monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    out, made = tmp_path / "out", {}
    run = append if generation else tokenize
    if generation:
        tokenize(small_shards[:1], out)

    def make() -> None:
        resume_job(str(out), runner="in-process", force=True)
        made.update(everything(out))

    at_step(monkeypatch, "before_plan", make)
    assert run(small_shards[1:3], out).exit_code == 0
    assert everything(out) == made
    assert_sound(out, list(range(generation + 1)))


@pytest.mark.parametrize("step", ["before_job", "before_generation"])
def test_a_driver_that_dies_before_its_record_leaves_room_for_another_plan(
    tmp_path: Path, small_shards: list[Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    run = tokenize
    if step == "before_generation":
        tokenize(small_shards[:1], out)
        run = append
    at_step(monkeypatch, step, die)
    with pytest.raises(KeyboardInterrupt):
        run(small_shards[1:3], out)
    assert run(small_shards[3:4], out).exit_code == 0
    assert_sound(out, [0] if step == "before_job" else [0, 1])


@pytest.mark.parametrize("generation", [0, 1])
def test_a_generation_whose_driver_died_before_its_plan_can_be_looked_at_and_resumed(
    tmp_path: Path, small_shards: list[Path], monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    out = tmp_path / "out"
    if generation:
        tokenize(small_shards[:1], out)
    at_step(monkeypatch, "before_plan", die)
    with pytest.raises(KeyboardInterrupt):
        (append if generation else tokenize)(small_shards[1:3], out)
    assert not (out / plan_name(generation)).exists()
    assert read_status(str(out)).progress.shards == 2
    assert describe(str(out))
    assert verify_dataset(str(out)).problems == []
    assert resume_job(str(out), runner="in-process").exit_code == 0
    assert_sound(out, list(range(generation + 1)))


def test_no_manifest_is_written_from_another_plan_than_the_generation_was_begun_with(
    tmp_path: Path, small_shards: list[Path]
) -> None:
    out = tmp_path / "out"
    tokenize([*small_shards[:1], tmp_path / "gone.tar"], out)
    (out / "manifest/0000.json").unlink()
    storage = open_storage(str(out))
    storage.publish(plan_name(0), serialise_plan([str(small_shards[0])]))
    with pytest.raises(BsqError, match=r"plan/0000\.parquet: not the plan that the generation was begun with"):
        write_manifest(storage, job_of(out), 0)
    assert list_generations(storage) == []
