"""A job spec refuses what it does not know in one line that says what would be right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import SpecError
from schemas.jobspec import ClipSpec, JobSpec, LimitsSpec, PreprocessSpec, RunSpec, parse_spec, read_spec

SECTIONS = {"preprocess": PreprocessSpec, "clips": ClipSpec, "limits": LimitsSpec, "run": RunSpec}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shard": ["a.tar"]}, "unknown key 'shard'. Did you mean 'shards'?"),
        ({"preprocess": {"fliter": "lanczos"}}, "unknown key 'preprocess.fliter'. Did you mean 'filter'?"),
        ({"run": {"worker": 2}}, "unknown key 'run.worker'. Did you mean 'workers'?"),
        ({"zzzzzzzz": 1}, "unknown key 'zzzzzzzz'."),
        (
            {"preprocess": {"filter": "box"}},
            "preprocess.filter must be 'lanczos', 'bicubic' or 'bilinear' (found 'box')",
        ),
        ({"preprocess": {"size": "big"}}, "preprocess.size must be a whole number, or 'tokenizer' (found 'big')"),
        (
            {"clips": {"clip_frames": 0}},
            "clips.clip_frames must be greater than or equal to 1, or 'tokenizer' (found 0)",
        ),
        # YAML reads `yes` and `on` as true.
        ({"run": {"workers": True}}, "run.workers must be a whole number (found True)"),
        ({"preprocess": {"views": False}}, "preprocess.views must be a whole number (found False)"),
        ({"preprocess": {"size": True}}, "preprocess.size must be a whole number (found True)"),
        ({"clips": {"fps": True}}, "clips.fps must be a number (found True)"),
        (
            {"preprocess": {"random_scale": [0.5, True]}},
            "preprocess.random_scale must be a number (found [0.5, True])",
        ),
        ({"shards": "a.tar"}, "shards must be a list (found 'a.tar')"),
        ({"run": None}, "run must be a mapping of settings (found None)"),
        ({"carry": ["caption", "caption"]}, "carry names a column twice: caption, caption"),
        (
            {"preprocess": {"views": 3}},
            "views is 3, but with crop 'center' and no flip all views are the same",
        ),
        (
            {"preprocess": {"random_scale": [0.9, 0.2]}},
            "random_scale is [0.9, 0.2]; it must satisfy 0 < low <= high <= 1",
        ),
        (
            {"limits": {"max_video_seconds": float("inf")}},
            "limits.max_video_seconds must be a finite number (found inf)",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(values, source="job.yaml")
    assert str(caught.value) == f"job.yaml: {message}"


@given(st.sampled_from([None, *SECTIONS]), st.data())
def test_every_misspelt_key_is_answered_with_the_right_one(section: str | None, data: st.DataObject):
    names = sorted((SECTIONS[section] if section else JobSpec).model_fields)
    name = data.draw(st.sampled_from([name for name in names if len(name) > 3]))
    place = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:place] + name[place + 1 :]
    values = {section: {misspelt: 1}} if section else {misspelt: 1}
    with pytest.raises(SpecError, match="unknown key") as caught:
        parse_spec(values, source="job.yaml")
    offered = str(caught.value).rpartition("Did you mean '")[2].removesuffix("'?")
    assert offered in names


def test_all_defaults_make_a_spec_and_it_survives_json():
    spec = parse_spec({}, source="job.yaml")
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.preprocess.filter == "lanczos"
    assert spec.clips.fps == 8


def test_a_job_file_is_read_and_joined(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("shards: [a.tar, b.tar]\npreprocess:\n  crop: random\n  views: 2\n", encoding="utf-8")
    spec = parse_spec(read_spec(path) | {"out": "tokens"}, source=str(path))
    assert spec.shards == ("a.tar", "b.tar")
    assert (spec.preprocess.views, spec.out) == (2, "tokens")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"shards: [a.tar\nout: x", "not valid YAML in line 2"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"- a.tar", "is a mapping"),
        (b"", "is a mapping"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path, content, words):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=words):
        read_spec(path)


def test_a_missing_job_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read"):
        read_spec(tmp_path / "nowhere.yaml")
