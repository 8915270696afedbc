"""Generations above the first: a dataset that grows or wins back what had failed is what one run would have made."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.append import append_job
from jobs.inspect import describe
from jobs.outcome import JobOutcome
from jobs.progress import read_status
from jobs.retry import RetryKind, retry_job
from jobs.start import resume_job, start_job
from jobs.verify import verify_dataset
from pipeline.dataset import TokenDataset
from pipeline.dataset_files import list_generations, read_manifest
from pipeline.find_rows import find_rows, why_missing
from pipeline.generations import list_begun, read_generation
from pipeline.parquet import read_parquet
from pipeline.storage import open_storage
from schemas.errors import FingerprintDiffers, Refused, SpecError
from schemas.jobspec import JobSpec, parse_spec
from schemas.manifest import latest_parts
from tests.tiny_corpus import dataset_files, jpeg, mp4, photo_members, write_tar

WIDE = 1 << 20
"""Pixels: more than any picture here has."""


def job_spec(shards: Sequence[Path | str], out: Path, **values: Any) -> JobSpec:
    fixed = {"tokenizer": "stub", "preprocess": {"size": 64}, "clips": {"clip_frames": 4}}
    values = fixed | {"shards": [str(shard) for shard in shards], "out": str(out)} | values
    return parse_spec(values, source="test")


def tokenize(shards: Sequence[Path | str], out: Path, **values: Any) -> JobOutcome:
    return start_job(job_spec(shards, out, **values), runner="in-process")


def append(shards: Sequence[Path | str], out: Path, **values: Any) -> JobOutcome:
    spec = parse_spec({"shards": [str(shard) for shard in shards], "out": str(out)} | values, source="test")
    return append_job(spec, runner="in-process")


def retry(out: Path, kind: RetryKind, **values: Any) -> JobOutcome:
    return retry_job(str(out), kind, asked=parse_spec(values, source="test"), runner="in-process")


def all_rows(out: Path, generation: int | None = None) -> list[dict[str, Any]]:
    """Every row of a dataset with its shard, whatever part it is in, in source order."""
    storage = open_storage(str(out))
    manifest = read_manifest(storage, generation)
    assert manifest is not None
    rows = [
        {"shard": entry["shard"]} | row
        for entry in manifest.table.select(["shard", "file"]).to_pylist()
        for row in read_parquet(storage.read_bytes(entry["file"])).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["shard"], row["position"], row["clip"], row["view"]))


def loaded_rows(out: Path, generation: int | None = None) -> list[tuple[Any, ...]]:
    """Every row of a dataset as whoever trains on it gets it, in source order but for the shards."""
    names = ["position", "clip", "view", "key", "frames"]
    dataset = TokenDataset(out, names, "packed", "all", allow_partial=True, generation=generation)
    rows = dataset.__getitems__(range(len(dataset)))
    return sorted((*(row[name] for name in names), row["packed"].numpy().tobytes()) for row in rows)


def all_failures(out: Path) -> list[dict[str, Any]]:
    """What the failure tables that count say, by shard."""
    storage = open_storage(str(out))
    manifest = read_manifest(storage)
    assert manifest is not None
    latest = manifest.table.filter(pa.array(latest_parts(manifest.table)))
    return [
        {"shard": entry["shard"]} | row
        for entry in latest.select(["shard", "failures_file"]).to_pylist()
        if entry["failures_file"] is not None
        for row in read_parquet(storage.read_bytes(entry["failures_file"])).to_pylist()
    ]


def counts(out: Path) -> dict[str, Any]:
    """What a manifest says of a dataset, apart from how many files and generations it took."""
    manifest = read_manifest(open_storage(str(out)))
    assert manifest is not None
    summary = manifest.summary.model_dump()
    names = ("rows", "tokens", "samples", "failed", "warnings", "failed_shards", "partial_shards", "complete")
    return {name: summary[name] for name in names}


def assert_same_dataset(out: Path, expected: Path) -> None:
    """Both hold the same rows, failures and counts, though perhaps in other files; and both verify."""
    assert all_rows(out) == all_rows(expected)
    assert all_failures(out) == all_failures(expected)
    assert counts(out) == counts(expected)
    for folder in (out, expected):
        names = ("position", "clip", "view", "key", "frames", "tokens")
        assert loaded_rows(folder) == sorted(tuple(row[name] for name in names) for row in all_rows(folder))
        result = verify_dataset(str(folder))
        assert (result.problems, result.finished) == ([], True)
    assert result.samples == counts(out)["samples"] and result.failed == counts(out)["failed"]


def assert_adds(out: Path, before: dict[str, str]) -> None:
    """Nothing that was there has changed."""
    assert before.items() <= dataset_files(out).items()


# ---- samples that are won back

KINDS: dict[str, Callable[[int], list[tuple[str, bytes]]]] = {
    "small": lambda number: [(f"{number:03d}.jpg", jpeg(number, 48, 40)), (f"{number:03d}.txt", b"small")],
    "large": lambda number: [(f"{number:03d}.jpg", jpeg(number, 96, 80)), (f"{number:03d}.txt", b"large")],
    "large, caption no text": lambda number: [(f"{number:03d}.jpg", jpeg(number)), (f"{number:03d}.txt", b"\xff\xfe")],
    "small, caption no text": lambda number: [
        (f"{number:03d}.jpg", jpeg(number, 48, 40)),
        (f"{number:03d}.txt", b"\xff\xfe"),
    ],
    "video": lambda number: [(f"{number:03d}.mp4", mp4(number, 9, width=48, height=40))],
    "large video": lambda number: [(f"{number:03d}.mp4", mp4(number, 6))],
    "no media": lambda number: [(f"{number:03d}.txt", b"nothing to see")],
    "damaged": lambda number: [(f"{number:03d}.jpg", b"\xff\xd8\xff" + bytes(500))],
    "same key again": lambda number: [("000.jpg", jpeg(number, 48, 40))],
}


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.sampled_from(sorted(KINDS)), max_size=6), min_size=1, max_size=3))
@example([["small", *sorted(KINDS)], ["small"], []])
def test_a_retry_with_wide_limits_gives_what_wide_limits_give_from_the_start(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("retry")
    tars = [
        write_tar(folder / f"{n}.tar", [member for i, kind in enumerate(kinds) for member in KINDS[kind](i)])
        for n, kinds in enumerate(shards)
    ]
    tokenize(tars, folder / "out", limits={"max_pixels": 48 * 40})
    before = dataset_files(folder / "out")
    outcome = retry(folder / "out", "retry-samples", limits={"max_pixels": WIDE})
    if any("large" in kind for kinds in shards for kind in kinds):
        assert list_generations(open_storage(str(folder / "out"))) == [0, 1]
    tokenize(tars, folder / "wide", limits={"max_pixels": WIDE})
    assert_same_dataset(folder / "out", folder / "wide")
    assert_adds(folder / "out", before)
    assert outcome.exit_code == (3 if counts(folder / "out")["failed"] else 0)


def test_a_video_that_was_mended_keeps_the_clips_it_had(tmp_path: Path) -> None:
    whole = mp4(1, 32)
    torn = bytearray(whole)
    torn[int(len(whole) * 0.6) : int(len(whole) * 0.8)] = bytes(int(len(whole) * 0.8) - int(len(whole) * 0.6))
    others = photo_members(0, 2)
    write_tar(tmp_path / "a.tar", [*others, ("film.mp4", bytes(torn)), *photo_members(5, 2)])
    tokenize([tmp_path / "a.tar"], tmp_path / "out")
    clips = [row["clip"] for row in all_rows(tmp_path / "out") if row["key"] == "film"]
    assert 0 < len(clips) < 8, "the damage lies behind some clips"
    write_tar(tmp_path / "a.tar", [*others, ("film.mp4", whole), *photo_members(5, 2)])
    assert retry(tmp_path / "out", "retry-samples").exit_code == 0
    manifest = read_manifest(open_storage(str(tmp_path / "out")))
    assert manifest is not None
    part = manifest.table.slice(1, 1).to_pylist()[0]
    assert (part["shard"], part["part"], part["generation"], part["rows"]) == (0, 1, 1, 8 - len(clips))
    assert part["file"].startswith("tokens/0000/0000000.r1-")
    tokenize([tmp_path / "a.tar"], tmp_path / "whole")
    assert_same_dataset(tmp_path / "out", tmp_path / "whole")


def test_what_still_fails_after_a_retry_is_told_by_its_table_alone(tmp_path: Path) -> None:
    members = [member for i, kind in enumerate(["large", "no media", "small", "large"]) for member in KINDS[kind](i)]
    shard = write_tar(tmp_path / "a.tar", members)
    out = tmp_path / "out"
    tokenize([shard], out, limits={"max_pixels": 48 * 40})
    storage = open_storage(str(out))
    assert "ImageTooLarge" in (why_missing(storage, "000") or "")
    assert counts(out)["failed"] == 3
    outcome = retry(out, "retry-samples", limits={"max_pixels": WIDE})
    assert counts(out)["failed"] == 1
    assert why_missing(storage, "000") is None
    assert "NoMedia" in (why_missing(storage, "001") or "")
    assert [row.source.part for row in find_rows(storage, "000")] == [1]
    assert [row.source.part for row in find_rows(storage, "002")] == [0]
    assert find_rows(storage, "000", generation=0) == []
    assert "ImageTooLarge" not in describe(str(out)) and "NoMedia" in describe(str(out))
    assert outcome.exit_code == 3
    assert any("1 of 4 samples failed" in line for line in outcome.lines)
    assert any("bsq retry" in line and "--samples" in line for line in outcome.lines)
    # And again: nothing can be won, and that is a generation too.
    retry(out, "retry-samples")
    assert list_generations(storage) == [0, 1, 2]
    assert counts(out)["failed"] == 1
    assert verify_dataset(str(out)).problems == []
    assert read_generation(storage, _job(out), 2).spec.limits.max_pixels == WIDE, "settings stay until they are changed"


def _job(out: Path) -> Any:
    from pipeline.dataset_files import read_job

    return read_job(open_storage(str(out)))


@pytest.mark.parametrize("how", ["more samples", "fewer samples", "another key"])
def test_a_retry_never_mixes_rows_with_those_of_another_shard(tmp_path: Path, how: str) -> None:
    members = [member for i, kind in enumerate(["small", "large", "small"]) for member in KINDS[kind](i)]
    shard = write_tar(tmp_path / "a.tar", members)
    out = tmp_path / "out"
    tokenize([shard], out, limits={"max_pixels": 48 * 40})
    before = all_rows(out)
    changed = {
        "more samples": [*members, *KINDS["small"](9)],
        "fewer samples": members[:-2],
        "another key": [*KINDS["small"](7), *members[2:]],
    }[how]
    write_tar(tmp_path / "a.tar", changed)
    outcome = retry(out, "retry-samples", limits={"max_pixels": WIDE})
    assert outcome.exit_code == 3
    assert any("not the shard that was tokenized" in line for line in outcome.lines)
    assert all_rows(out) == before
    assert counts(out)["failed"] == 1 and counts(out)["complete"]
    assert verify_dataset(str(out)).problems == []
    # Its own shard put back, it can be won back after all.
    write_tar(tmp_path / "a.tar", members)
    assert retry(out, "retry-samples", limits={"max_pixels": WIDE}).exit_code == 0
    assert len(all_rows(out)) == 3


# ---- shards that failed


def test_a_shard_that_came_late_is_the_shard_it_would_have_been(tmp_path: Path, small_shards: list[Path]) -> None:
    late = tmp_path / "late.tar"
    shards = [small_shards[0], late, small_shards[1]]
    out = tmp_path / "out"
    outcome = tokenize(shards, out)
    assert outcome.exit_code == 3
    assert any(f"bsq retry {out}" in line for line in outcome.lines)
    assert read_status(str(out)).failed_shards[0].shard == 1
    again = retry(out, "retry")
    assert again.exit_code == 3 and counts(out)["failed_shards"] == 1
    shutil.copy(small_shards[2], late)
    assert retry(out, "retry").exit_code == 0
    tokenize(shards, tmp_path / "all")
    assert dataset_files(out) == dataset_files(tmp_path / "all")
    assert_same_dataset(out, tmp_path / "all")
    status = read_status(str(out))
    assert (status.state, status.generation, status.progress.committed, status.failed_shards) == ("complete", 2, 3, [])
    assert "Nothing to try again: no shard failed." in retry(out, "retry").lines
    assert list_generations(open_storage(str(out))) == [0, 1, 2]


def test_files_that_a_failed_attempt_left_are_not_taken_for_those_of_the_retry(
    tmp_path: Path, small_shards: list[Path]
) -> None:
    """What was made with other limits, and published without a record, must not be adopted."""
    out, late = tmp_path / "out", tmp_path / "late.tar"
    tokenize([small_shards[0], late], out)
    shutil.copy(small_shards[1], late)
    tokenize([small_shards[0], late], tmp_path / "narrow", limits={"max_pixels": 64})
    stray = next((tmp_path / "narrow/tokens/0000").glob("0000001-*"))
    (out / "tokens/0000" / stray.name).write_bytes(stray.read_bytes())
    assert retry(out, "retry").exit_code == 0
    assert counts(out)["failed"] == 0
    assert not (out / "tokens/0000" / stray.name).exists()


def test_more_shards_may_fail_in_a_retry_than_a_first_run_may_lose_in_a_row(tmp_path: Path) -> None:
    gone = [tmp_path / f"gone-{number}.tar" for number in range(24)]
    tokenize(gone[:12], tmp_path / "out")
    append(gone[12:], tmp_path / "out")
    outcome = retry(tmp_path / "out", "retry")
    assert outcome.exit_code == 3 and counts(tmp_path / "out")["failed_shards"] == 24


# ---- damaged archives


@pytest.mark.parametrize("share", [0.3, 0.62, 0.97])
def test_the_rest_of_a_mended_shard_joins_what_was_read_before_the_damage(tmp_path: Path, share: float) -> None:
    members = [*photo_members(0, 5), ("film.mp4", mp4(3, 9)), *KINDS["no media"](77), *photo_members(20, 5)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    shard = tmp_path / "a.tar"
    shard.write_bytes(whole[: int(len(whole) * share)])
    out = tmp_path / "out"
    outcome = tokenize([shard], out)
    assert counts(out)["partial_shards"] == 1
    assert any("bsq retry" in line and "--damaged" in line for line in outcome.lines)
    before = dataset_files(out)
    # As long as it is damaged, a retry only confirms it.
    retry(out, "retry-damaged")
    assert counts(out)["partial_shards"] == 1
    shard.write_bytes(whole)
    retry(out, "retry-damaged")
    assert counts(out)["partial_shards"] == 0
    tokenize([shard], tmp_path / "all")
    assert_same_dataset(out, tmp_path / "all")
    assert_adds(out, before)


def test_failed_samples_of_a_damaged_shard_come_back_without_its_rest(tmp_path: Path) -> None:
    members = [*KINDS["large"](0), *KINDS["small"](1), *photo_members(20, 6)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    shard = tmp_path / "a.tar"
    shard.write_bytes(whole[: int(len(whole) * 0.5)])
    out = tmp_path / "out"
    tokenize([shard], out, limits={"max_pixels": 96 * 80 - 1})
    tokenize([shard], tmp_path / "wide")
    retry(out, "retry-samples", limits={"max_pixels": WIDE})
    assert_same_dataset(out, tmp_path / "wide")
    # Mended, and still only the failed samples are asked for: here the one at which the archive had broken off.
    shard.write_bytes(whole)
    num_samples = counts(out)["samples"]
    retry(out, "retry-samples")
    assert (counts(out)["samples"], counts(out)["failed"], counts(out)["partial_shards"]) == (num_samples, 0, 1)
    assert verify_dataset(str(out)).problems == []
    retry(out, "retry-damaged")
    tokenize([shard], tmp_path / "all")
    assert_same_dataset(out, tmp_path / "all")


def test_a_shard_that_was_whole_is_not_committed_damaged_by_a_retry(tmp_path: Path) -> None:
    members = [*KINDS["large"](0), *photo_members(20, 6)]
    shard = write_tar(tmp_path / "a.tar", members)
    out = tmp_path / "out"
    tokenize([shard], out, limits={"max_pixels": 96 * 80 - 1})
    shard.write_bytes(shard.read_bytes()[:20_000])
    outcome = retry(out, "retry-samples", limits={"max_pixels": WIDE})
    assert outcome.exit_code == 3 and any("TarTruncated" in line for line in outcome.lines)
    assert counts(out)["partial_shards"] == 0 and counts(out)["samples"] == 7


# ---- all of it together


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
    record = read_generation(open_storage(str(tmp_path / "out")), _job(tmp_path / "out"), 1)
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
