"""Samples and shards that are won back are what they would have been from the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.commit_table import read_commit_table
from jobs.inspect import describe
from jobs.progress import read_status
from jobs.verify import verify_dataset
from pipeline.dataset_files import list_generations, read_manifest
from pipeline.find_rows import find_rows, why_missing
from pipeline.generations import read_generation
from pipeline.missing import MissingSamples
from pipeline.sample import Sample
from pipeline.storage import open_storage
from schemas.errors import NoMedia, ShardDiffers
from schemas.failures import Failure
from tests.jobs.generations import (
    KINDS,
    WIDE,
    all_rows,
    append,
    assert_adds,
    assert_same_dataset,
    counts,
    job_of,
    retry,
    tokenize,
)
from tests.tiny_corpus import dataset_files, mp4, photo_members, write_tar


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


def test_a_failed_sample_with_a_long_key_is_known_again() -> None:
    key = "k" * 16_000
    failure = Failure.of_sample(NoMedia("none"), key=key, position=0, member=None, source_offset=None)
    missing = MissingSamples("a.tar", 1, with_rest=False, failures=[failure], failed={0: failure})
    assert missing.wants(Sample(0, key, {}))
    with pytest.raises(ShardDiffers):
        missing.wants(Sample(0, key + "k", {}))


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
    assert read_generation(storage, job_of(out), 2).spec.limits.max_pixels == WIDE, (
        "settings stay until they are changed"
    )


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
    assert read_commit_table(open_storage(str(out))).given_up == {}, "it is there, only not what was tried for"
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
