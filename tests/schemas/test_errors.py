"""Every error ends in words and a code: the family is complete and agrees with what the documents list."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import errors
from schemas.errors import BsqError, InputError, SampleError, ShardError, nearest_name, printable

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, BsqError)]

STAGE_OF_CLASS = {
    "open": ["ShardNotFound", "ShardForbidden", "ShardUnreadable"],
    "read": ["TarTruncated", "TarCorrupt", "GzipCorrupt", "NotATar", "SourceChanged"],
    "group": ["ShardDiffers", "KeyDuplicated", "KeySplit", "NoMedia", "AmbiguousMedia", "MemberTooLarge"],
    "decode": ["MediaTruncated", "MediaCorrupt", "MediaUnsupported", "NoFrames", "DecodeTimeout", "WorkerCrash"],
    "limit": ["ImageTooLarge", "ImageTooSmall", "VideoTooLong"],
    "sidecar": ["CaptionNotText", "LabelNotInteger", "MetadataNotJSON"],
    "encode": ["NonFiniteLatents"],
    "write": ["OutputNotWritable", "OutputFull"],
}


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, names in STAGE_OF_CLASS.items() for name in names]
)
def test_each_class_knows_its_stage(stage, name):
    assert getattr(errors, name).stage == stage


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("SpecError", 2),
        ("CheckpointError", 2),
        ("CircuitBreakerOpen", 3),
        ("LeaseHeld", 4),
        ("FingerprintDiffers", 4),
        ("OutputNotOurs", 4),
        ("OutputFull", 4),
        ("LeaseLost", 4),
        ("Interrupted", 130),
        ("BsqError", 1),
    ],
)
def test_each_error_that_ends_a_command_has_the_documented_exit_code(name, exit_code):
    assert getattr(errors, name).exit_code == exit_code


@pytest.mark.parametrize("item", CLASSES, ids=lambda item: item.__name__)
def test_each_class_says_what_it_means(item):
    assert item.__doc__


def test_shards_that_storage_will_never_give_are_not_tried_again():
    final = {item.__name__ for item in CLASSES if issubclass(item, ShardError) and not item.retryable}
    assert final == {"ShardNotFound", "ShardForbidden", "NotATar", "SourceChanged", "ShardDiffers"}


def test_only_warnings_leave_the_sample_tokenized():
    warnings = {item.__name__ for item in CLASSES if issubclass(item, SampleError) and item.severity == "warning"}
    assert warnings == {
        "SidecarWarning",
        "CaptionNotText",
        "LabelNotInteger",
        "MetadataNotJSON",
        "FrameTimesMissing",
        "MediaTruncatedKept",
    }


def test_bad_input_names_its_class():
    assert errors.NotATar("x").error == "NotATar"
    assert issubclass(errors.NotATar, InputError)


def test_the_nearest_name_is_offered_only_when_it_is_near():
    assert nearest_name("bach", ["batch", "workers"]) == " Did you mean 'batch'?"
    assert nearest_name("zzz", ["batch", "workers"]) == ""


@given(st.binary() | st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_printable_text_is_valid_utf8_and_valid_text_stays_as_it_is(value: bytes | str):
    text = printable(value)
    text.encode("utf-8")
    assert printable(text) == text


def test_bytes_that_are_no_utf8_are_escaped():
    assert printable(b"caf\xe9.jpg") == printable("caf\udce9.jpg") == "caf\\xe9.jpg"
