"""The fingerprint changes with what changes bits and with nothing else; one known vector pins its form."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.fingerprint import differing_fields, fingerprint, fingerprint_fields
from schemas.jobspec import JobSpec, parse_spec

TOKENIZER = {"preset": "small", "image_size": 128, "bits_per_token": 18, "clamp_range": [-1.0, 1.0], "trained": False}
WEIGHTS = "0123456789abcdef" * 4


def of(values: dict[str, Any]) -> str:
    return fingerprint(fingerprint_fields(resolved(values), TOKENIZER, WEIGHTS))


def resolved(values: dict[str, Any]) -> JobSpec:
    spec: dict[str, Any] = {"dtype": "float32"} | values
    spec["preprocess"] = {"size": 128} | spec.get("preprocess", {})
    spec["clips"] = {"clip_frames": 4, "stride": 4} | spec.get("clips", {})
    return parse_spec(spec, source="test")


def test_golden_vector():
    """The canonical text is written out, so that a mistake in it and in the code cannot cancel."""
    canonical = (
        '{"carry":["caption","label","metadata"],"clips":{"clip_frames":4,"stride":4},"dtype":"float32",'
        '"format_version":1,"preprocess":{"size":128},"tokenizer":{"bits_per_token":18,"clamp_range":[-1,1],'
        '"image_size":128,"preset":"small","trained":false},'
        '"weight_sha256":"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}'
    )
    assert of({}) == hashlib.sha256(canonical.encode()).hexdigest()
    assert of({}) == "8df705136b6b7e39ea3338b62ffabc7d6571dfe543076af5f994f83cabdb73b3"


@pytest.mark.parametrize(
    "values",
    [
        {"preprocess": {"filter": "lanczos", "views": 1, "flip": 0, "seed": 0}},
        {"clips": {"fps": 8}},
        {"carry": ["metadata", "caption", "label"]},
        {"shards": ["a.tar"], "out": "x", "tokenizer": "./t", "device": "cpu", "damaged_shards": "fail"},
        {"run": {"workers": 8, "batch": 4, "max_attempts": 1}},
        {"limits": {"max_pixels": 100, "decode_timeout_seconds": 1}},
    ],
)
def test_what_does_not_change_bits_does_not_change_the_fingerprint(values):
    assert of(values) == of({})


@pytest.mark.parametrize(
    "values",
    [
        {"preprocess": {"size": 64}},
        {"preprocess": {"crop": "exact"}},
        {"preprocess": {"crop": "random"}},
        {"preprocess": {"crop": "random", "seed": 1}},
        {"preprocess": {"crop": "random", "random_scale": [0.6, 1.0]}},
        {"preprocess": {"filter": "bicubic"}},
        {"preprocess": {"engine": "pillow"}},
        {"preprocess": {"flip": 0.5}},
        {"preprocess": {"flip": 0.5, "views": 2}},
        {"preprocess": {"truncated": "keep"}},
        {"clips": {"fps": 4}},
        {"clips": {"fps": "source"}},
        {"clips": {"clip_frames": 2}},
        {"clips": {"stride": 2}},
        {"clips": {"short_clips": "drop"}},
        {"carry": ["caption"]},
        {"dtype": "bfloat16"},
    ],
)
def test_what_changes_bits_changes_the_fingerprint(values):
    assert of(values) != of({})


def test_other_weights_or_another_tokenizer_change_the_fingerprint():
    spec = resolved({})
    assert fingerprint(fingerprint_fields(spec, TOKENIZER, WEIGHTS[::-1])) != of({})
    assert fingerprint(fingerprint_fields(spec, TOKENIZER | {"bits_per_token": 36}, WEIGHTS)) != of({})


@given(st.permutations(sorted(TOKENIZER)))
def test_the_order_of_keys_does_not_matter(order: list[str]):
    config = {name: TOKENIZER[name] for name in order}
    assert fingerprint(fingerprint_fields(resolved({}), config, WEIGHTS)) == of({})


def test_a_refusal_names_the_fields_that_differ_with_both_values():
    ours = fingerprint_fields(resolved({"preprocess": {"filter": "bicubic"}}), TOKENIZER, WEIGHTS)
    theirs = fingerprint_fields(resolved({"clips": {"fps": 4}}), TOKENIZER | {"image_size": 64}, "f" * 64)
    assert differing_fields(ours, theirs) == [
        "clips.fps: 4.0 there, 8.0 asked for",
        "preprocess.filter: lanczos there, bicubic asked for",
        "tokenizer.image_size: 64 there, 128 asked for",
        "weight_sha256: ffffffffffff… there, 0123456789ab… asked for",
    ]
    assert differing_fields(ours, ours) == []
