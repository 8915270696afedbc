"""Records survive the ledger, newer fields are passed over, damage is named by segment and line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BsqError
from schemas.ledger import (
    Arithmetic,
    Attempt,
    Commit,
    FileRecord,
    GivenUp,
    SourceRecord,
    StageSeconds,
    Summary,
    parse_lines,
    segment_name,
    segment_range,
)

counts = st.integers(0, 2**62)
# Every character that JSON and str.splitlines treat in a special way, among the usual ones.
names = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r\x85\u2028"\\'), max_size=20)
seconds = st.floats(0, 1e9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)

commits = st.builds(
    Commit,
    shard=counts,
    part=counts,
    attempt=counts,
    file=names,
    bytes=counts,
    sha256=names,
    rows=counts,
    tokens=counts,
    samples=counts,
    failed=counts,
    warnings=counts,
    partial=st.booleans(),
    min_frames=counts,
    max_frames=counts,
    min_key=st.none() | names,
    max_key=st.none() | names,
    row_groups=st.lists(counts, max_size=3),
    tokens_offset=st.lists(counts, max_size=3),
    failures=st.none() | st.builds(FileRecord, file=names, bytes=counts, sha256=names),
    source=st.builds(SourceRecord, bytes=counts, etag=names),
    arithmetic=names,
    seconds=st.builds(StageSeconds, read=seconds, decode=seconds, encode=seconds, write=seconds, wall=seconds),
    worker=names,
    at=names,
)
attempts = st.builds(
    Attempt,
    shard=counts,
    attempt=counts,
    stage=names,
    error=names,
    message=names,
    keys_in_flight=st.lists(names, max_size=3),
    counts=st.booleans(),
    worker=names,
    at=names,
)
given_up = st.builds(GivenUp, shard=counts, attempts=counts, error=names, message=names, at=names)
arithmetic = st.builds(Arithmetic, id=names, value=st.dictionaries(names, json_values, max_size=3))
summaries = st.builds(Summary, counts=st.dictionaries(names, counts, max_size=3))


@given(st.lists(commits | attempts | given_up | arithmetic | summaries, max_size=6))
def test_records_read_back_as_they_were_written(records: list[Any]):
    data = "".join(record.to_line() + "\n" for record in records).encode()
    assert list(parse_lines(data, name="x")) == records


def test_a_commit_reads_as_documented():
    line = (
        '{"kind": "commit", "shard": 42, "part": 0, "attempt": 1, "file": "tokens/0000/0000042-1f0c9a3e.parquet", '
        '"bytes": 23117824, "sha256": "ab", "rows": 10000, "tokens": 10240000, "samples": 10003, "failed": 3, '
        '"warnings": 0, "partial": false, "min_frames": 1, "max_frames": 1, "min_key": "a", "max_key": "z", '
        '"row_groups": [1024], "tokens_offset": [4], '
        '"failures": {"file": "failures/0000/0000042-c01d77e0.parquet", "bytes": 4113, "sha256": "cd"}, '
        '"source": {"bytes": 1219840000, "etag": "e"}, "arithmetic": "a1b2c3d4", '
        '"seconds": {"read": 31.0, "decode": 88.2, "encode": 70.1, "write": 0.4, "wall": 74.9}, '
        '"worker": "node3/gpu1", "at": "2026-01-01T00:00:00Z", "field_of_a_later_version": 1}'
    )
    (commit,) = parse_lines(line.encode(), name="x")
    assert isinstance(commit, Commit)
    assert (commit.shard, commit.rows, commit.seconds.wall) == (42, 10000, 74.9)
    assert commit.failures == FileRecord(file="failures/0000/0000042-c01d77e0.parquet", bytes=4113, sha256="cd")


@pytest.mark.parametrize(
    "damage", ["{", '{"kind": "commit"}', '{"kind": "sum"}', "[]", "\udcff".encode(errors="surrogateescape")]
)
def test_a_damaged_line_is_named_by_segment_and_line(damage):
    bad = damage if isinstance(damage, bytes) else damage.encode()
    good = Summary(counts={}).to_line().encode()
    with pytest.raises(BsqError, match=r"ledger/0000/000000003\.jsonl, line 2") as caught:
        list(parse_lines(good + b"\n" + bad + b"\n", name="ledger/0000/000000003.jsonl"))
    assert "\n" not in str(caught.value)


@given(first=st.integers(0, 10**9 - 1), extra=st.integers(0, 10**6))
def test_segment_names_read_back_and_sort_by_number(first: int, extra: int):
    last = min(first + extra, 10**9 - 1)
    assert segment_range(segment_name(first, last)) == (first, last)
    assert segment_range(segment_name(first)) == (first, first)
    if first + 1 < 10**9:
        assert segment_name(first) < segment_name(first + 1)


def test_segment_names_are_those_of_the_format():
    assert segment_name(17) == "000000017.jsonl"
    assert segment_name(64, 127) == "000000064-000000127.jsonl"


@pytest.mark.parametrize(
    "name", ["17.jsonl", ".000000017.jsonl.1.tmp", "000000017.json", "lease.json", "x000000017.jsonl"]
)
def test_other_files_are_no_segments(name):
    assert segment_range(name) is None
