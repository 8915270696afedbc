"""A failure table holds any key and message as valid UTF-8, and says where the trouble is."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipeline.parquet import read_parquet
from schemas.errors import LabelNotInteger, MediaTruncated, TarTruncated
from schemas.failures import (
    FAILURE_SCHEMA,
    MAX_MESSAGE_CHARS,
    MAX_NAME_CHARS,
    Failure,
    bounded_name,
    serialise_failures,
)


def read(data: bytes) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = read_parquet(data).to_pylist()
    return rows


def test_an_error_becomes_a_row_that_names_stage_class_and_place():
    error = MediaTruncated("the JPEG ends\n  after 80 of 240 lines", member="a/0007.jpg")
    failure = Failure.of_sample(error, key="a/0007", position=7, member=None, source_offset=1536)
    assert read(serialise_failures([failure], {})) == [
        {
            "key": "a/0007",
            "member": "a/0007.jpg",
            "position": 7,
            "clip": None,
            "stage": "decode",
            "error": "MediaTruncated",
            "message": "the JPEG ends after 80 of 240 lines",
            "severity": "failed",
            "source_offset": 1536,
        }
    ]


def test_a_damaged_archive_has_a_row_without_a_key():
    failure = Failure.of_archive(TarTruncated("ends at byte 700", offset=700))
    assert (failure.key, failure.stage, failure.error, failure.source_offset) == (None, "read", "TarTruncated", 700)


def test_a_bad_sidecar_is_a_warning():
    failure = Failure.of_sample(LabelNotInteger("'x'"), key="k", position=0, member="k.cls", source_offset=0)
    assert (failure.severity, failure.stage, failure.member) == ("warning", "sidecar", "k.cls")


def test_rows_keep_their_order_and_the_metadata_stays_with_them():
    failures = [
        Failure(key=f"k{number}", position=number, stage="group", error="NoMedia", message="") for number in (3, 1, 2)
    ]
    data = serialise_failures(failures, {"bsqtok.shard": "42"})
    assert [row["key"] for row in read(data)] == ["k3", "k1", "k2"]
    assert (pq.read_metadata(io.BytesIO(data)).metadata or {})[b"bsqtok.shard"] == b"42"
    assert pq.read_schema(io.BytesIO(data)).equals(FAILURE_SCHEMA)
    assert serialise_failures(failures, {"bsqtok.shard": "42"}) == data


@given(key=st.binary(max_size=30), message=st.text(max_size=3000))
def test_any_bytes_of_a_tar_and_any_message_can_be_stored(key: bytes, message: str):
    name = key.decode("utf-8", "surrogateescape")
    failure = Failure.of_sample(MediaTruncated(message), key=name, position=0, member=name, source_offset=None)
    (row,) = read(serialise_failures([failure], {}))
    assert row["key"] == key.decode("utf-8", "backslashreplace")
    assert len(str(row["message"])) <= MAX_MESSAGE_CHARS
    assert "\n" not in str(row["message"])


def test_long_keys_take_little_room_and_are_told_apart():
    assert bounded_name("k" * MAX_NAME_CHARS) == "k" * MAX_NAME_CHARS
    names = [bounded_name("k" * 16_000 + end) for end in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]
    assert {len(name) for name in names} == {MAX_NAME_CHARS}
    error = MediaTruncated("cut", member="m" * 16_000)
    failure = Failure.of_sample(error, key="k" * 16_000 + "a", position=0, member=None, source_offset=None)
    assert failure.key == names[0] and failure.member == bounded_name("m" * 16_000)
