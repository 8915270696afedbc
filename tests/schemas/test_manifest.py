"""The manifest is the commit records in order, with what a reader adds up made explicit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parquet import read_parquet
from schemas.ledger import Commit, FileRecord, SourceRecord
from schemas.manifest import (
    MANIFEST_SCHEMA,
    ManifestSummary,
    count_samples,
    latest_parts,
    manifest_table,
    merge_manifests,
    serialise_manifest,
)


def commit(shard: int, rows: int = 3, *, failures: bool = False) -> Commit:
    return Commit(
        shard=shard,
        attempt=1,
        file=f"tokens/0000/{shard:07d}-01234567.parquet",
        bytes=1000 + rows,
        sha256="a" * 64,
        rows=rows,
        tokens=16 * rows,
        samples=rows + failures,
        failed=int(failures),
        warnings=0,
        partial=False,
        min_frames=min(rows, 1),
        max_frames=min(rows, 1),
        min_key="a" if rows else None,
        max_key="b" if rows else None,
        row_groups=[rows] if rows else [],
        tokens_offset=[321] if rows else [],
        failures=FileRecord(file="failures/0000/0000001-89abcdef.parquet", bytes=77, sha256="b" * 64)
        if failures
        else None,
        source=SourceRecord(bytes=10_240, etag="e"),
        arithmetic="a1b2c3d4",
        worker="host/cpu0",
        at="2026-01-01T00:00:00Z",
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=20))
def test_first_row_is_the_running_sum_of_rows(rows: list[int]):
    table = manifest_table((commit(shard, count), f"s3://b/{shard}.tar", 0) for shard, count in enumerate(rows))
    assert table["first_row"].to_pylist() == [sum(rows[:index]) for index in range(len(rows))]
    assert table.schema.equals(MANIFEST_SCHEMA)


def test_a_manifest_reads_back_with_all_that_the_records_say():
    table = manifest_table([(commit(0), "a.tar", 0), (commit(1, failures=True), "b.tar", 1)])
    read = read_parquet(serialise_manifest(table))
    assert read.equals(table)
    first, second = read.to_pylist()
    assert first["failures_file"] is None
    assert second["failures_file"] == "failures/0000/0000001-89abcdef.parquet"
    assert (second["failures_bytes"], second["failures_sha256"]) == (77, "b" * 64)
    assert (second["url"], second["generation"], second["first_row"]) == ("b.tar", 1, 3)
    assert (second["source_bytes"], second["source_etag"]) == (10_240, "e")
    assert (second["row_groups"], second["tokens_offset"]) == ([3], [321])


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=16), st.integers(0, 16))
def test_merged_manifests_are_the_manifest_of_all_their_commits(parts: set[tuple[int, int]], cut: int):
    """And of a shard the last part counts, which is checked against a dictionary."""
    entries = [
        (commit(shard, rows=part + 1).model_copy(update={"part": part, "samples": 10 * shard + part}), "x.tar", part)
        for shard, part in sorted(parts, key=lambda pair: hash((pair, cut)))
    ]
    whole = manifest_table(entries)
    assert merge_manifests(manifest_table(entries[:cut]), manifest_table(entries[cut:])).equals(whole)
    last = {shard: max(part for other, part in parts if other == shard) for shard, _ in parts}
    keys = zip(whole["shard"].to_pylist(), whole["part"].to_pylist(), strict=True)
    assert latest_parts(whole).tolist() == [last[shard] == part for shard, part in keys]
    counts = count_samples(whole)
    assert counts.parts == len(parts) - len(last)
    assert counts.samples == sum(10 * shard + part for shard, part in last.items())


def test_every_field_of_a_commit_but_its_timings_is_in_the_manifest():
    told = set(MANIFEST_SCHEMA.names)
    # What of its samples is poison stands in the summary, by shard.
    assert set(Commit.model_fields) - told == {"kind", "seconds", "failures", "source", "poison"}


def test_a_summary_reads_back_and_passes_over_newer_fields():
    summary = ManifestSummary(
        fingerprint="f" * 64,
        generation=0,
        files=2,
        rows=6,
        tokens=96,
        samples=7,
        failed=1,
        warnings=0,
        failed_shards=0,
        first_failed_shards=[],
        partial_shards=0,
        bytes=2006,
        bits=18,
        group_size=9,
        grid=(4, 4),
        views=1,
        manifest_sha256="c" * 64,
        complete=True,
        created_by="bsqtok 0.1.0",
    )
    text = summary.model_dump_json()
    assert ManifestSummary.model_validate_json(text) == summary
    assert ManifestSummary.model_validate_json('{"later": 1, ' + text[1:]) == summary
