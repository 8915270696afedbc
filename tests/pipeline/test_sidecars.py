"""A carried member arrives unaltered, or as null with a warning that says why; it never costs the sample."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample import Member
from pipeline.sidecars import read_sidecars
from schemas.jobspec import LimitsSpec

ALL = ("caption", "label", "metadata")


def read(carry=ALL, limits=None, **payloads):
    members = {
        extension: Member(f"key.{extension}", "file", len(payload), 0, payload)
        for extension, payload in payloads.items()
    }
    return read_sidecars(members, carry, limits or LimitsSpec())


def the_warning(sidecars):
    (warning,) = sidecars.warnings
    assert warning.stage == "sidecar"
    assert warning.severity == "warning"
    return warning.error, str(warning)


def test_good_members_are_carried():
    sidecars = read(txt="naïve café 日本語\n".encode(), cls=b"7", json=b'{"b": [1, 2.5, null], "a": "\\u00e9"}')
    assert sidecars.caption == "naïve café 日本語\n"
    assert sidecars.label == 7
    assert sidecars.metadata == '{"b":[1,2.5,null],"a":"é"}'
    assert sidecars.warnings == []


def test_only_what_is_asked_for_is_read():
    sidecars = read(carry=("label",), txt=b"\xff", cls=b"7", json=b"{")
    assert (sidecars.caption, sidecars.label, sidecars.metadata, sidecars.warnings) == (None, 7, None, [])


def test_txt_comes_before_caption_and_case_does_not_matter():
    assert read(txt=b"a", caption=b"b").caption == "a"
    assert read(caption=b"b").caption == "b"
    assert read(TXT=b"c").caption == "c"


@pytest.mark.parametrize(
    ("payload", "caption"),
    [(b"", ""), (b"before\0after", "before\0after"), (b"\xef\xbb\xbfwith a BOM", "with a BOM"), (b" \n", " \n")],
)
def test_odd_captions_are_kept(payload, caption):
    sidecars = read(txt=payload)
    assert sidecars.caption == caption
    assert sidecars.warnings == []


@pytest.mark.parametrize("payload", [b"caf\xe9", "text".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\xaf"])
def test_captions_that_are_not_utf8_are_left_out(payload):
    sidecars = read(txt=payload)
    assert sidecars.caption is None
    error, message = the_warning(sidecars)
    assert error == "CaptionNotText"
    assert "key.txt" in message


@pytest.mark.parametrize(
    ("payload", "label"),
    [(b"0", 0), (b" 7\r\n", 7), (b"-3", -3), (b"+3", 3), (b"9223372036854775807", 2**63 - 1), (b"007", 7)],
)
def test_labels_that_are_integers(payload, label):
    assert read(cls=payload).label == label


@pytest.mark.parametrize(
    "payload",
    [b"seven", b"3.7", b"9223372036854775808", b"", b"1_000", "٣".encode(), b"7 8", b"1e3", b"9" * 5000, b"\xff"],
)
def test_labels_that_are_no_64_bit_integers_are_left_out(payload):
    sidecars = read(cls=payload)
    assert sidecars.label is None
    assert the_warning(sidecars)[0] == "LabelNotInteger"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"w": 96, "h": ', "Expecting value"),
        (b"", "Expecting value"),
        (b'{"score": NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "Out of range"),
        (b"[" * 20_000 + b"]" * 20_000, "nested deeper"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper"),
        (b'{"n": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'["\\ud800"]', "surrogate"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "Expecting"),
    ],
)
def test_metadata_that_is_not_strict_json_is_left_out(payload, reason):
    sidecars = read(json=payload)
    assert sidecars.metadata is None
    error, message = the_warning(sidecars)
    assert error == "MetadataNotJSON"
    assert reason in message


def test_depth_is_counted_in_the_structure_and_not_in_texts():
    assert read(json=json.dumps(["[" * 500, '\\"[{' * 100]).encode()).warnings == []
    assert read(json=b"[" * 100 + b"]" * 100).warnings == []


def test_a_string_that_never_ends_is_read_once():
    # In quadratic time this would take hours.
    endless = b'"' + b'\\"' * 250_000
    assert "nested deeper" in the_warning(read(json=b"[" * 101 + endless))[1]
    assert "Unterminated string" in the_warning(read(json=b"[" + b"[]," * 101 + endless))[1]


def test_members_over_the_limit_or_without_content_are_left_out():
    limits = LimitsSpec(max_sidecar_bytes=10)
    assert the_warning(read(limits=limits, txt=b"x" * 11))[0] == "CaptionNotText"
    assert read(limits=limits, txt=b"x" * 10).caption == "x" * 10
    unread = {
        "txt": Member("key.txt", "file", 2_000_000, 0, None),
        "json": Member("key.json", "link", 0, 0, None),
    }
    sidecars = read_sidecars(unread, ALL, LimitsSpec())
    assert [warning.error for warning in sidecars.warnings] == ["CaptionNotText", "MetadataNotJSON"]
    assert "2,000,000 bytes" in str(sidecars.warnings[0])
    assert "link" in str(sidecars.warnings[1])


@given(st.binary(max_size=200))
def test_any_bytes_give_valid_columns_or_a_warning(payload):
    sidecars = read(txt=payload, cls=payload, json=payload)
    values = (sidecars.caption, sidecars.label, sidecars.metadata)
    assert len(sidecars.warnings) == values.count(None)
    if sidecars.caption is not None:
        sidecars.caption.encode()
    if sidecars.metadata is not None:
        json.loads(sidecars.metadata.encode())
    for warning in sidecars.warnings:
        str(warning).encode()
