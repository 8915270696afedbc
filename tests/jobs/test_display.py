from __future__ import annotations

import io

import pytest

from jobs.display import JobDisplay, describe_bytes, describe_progress, describe_seconds, describe_summary
from schemas.lease import Progress

BUSY = Progress(
    shards=40,
    committed=11,
    failed_shards=1,
    samples=1234,
    failed_samples=3,
    warnings=1,
    rows=1300,
    tokens=130_000,
    bytes=2_330_000,
    seconds=72,
    samples_per_second=61.23,
    tokens_per_second=62_700,
    eta_seconds=200,
    workers=2,
    device_wait=0.4,
)


def test_progress_names_shards_speed_failures_and_what_waits():
    assert describe_progress(BUSY) == [
        "12 of 40 shards (30%), 3 min 20 s left",
        "1,234 samples, 61.2 samples/s, 62,700 tokens/s, 2 workers",
        "3 samples failed, 1 shard failed, 1 warning",
        "the encoder waits 40% of its time for decoding: more CPUs would help",
    ]


def test_slow_storage_is_not_taken_for_slow_decoding():
    assert describe_progress(BUSY.model_copy(update={"read_wait": 0.9}))[-1] == (
        "the encoder waits 40% of its time, and decoding for the storage: more CPUs would not help"
    )


def test_nothing_is_said_of_what_did_not_happen():
    assert describe_progress(Progress()) == ["0 of 0 shards", "0 samples"]
    assert describe_summary(Progress(shards=1, committed=1, samples=2, rows=2, tokens=512, bytes=900, seconds=3)) == (
        "shards   1 of 1 committed\nsamples  2\nrows     2\ntokens   512 in 900 bytes\ntime     3.0 s"
    )


def test_the_summary_counts_failures_apart():
    assert describe_summary(BUSY.model_copy(update={"partial_shards": 2})).splitlines()[:2] == [
        "shards   11 of 40 committed, 2 of them partial, 1 failed",
        "samples  1,234, 3 of them failed, 1 warning",
    ]


def test_a_job_shows_its_events_and_how_far_it_is():
    stream = io.StringIO()
    with JobDisplay(stream) as display:
        display.observe(BUSY, "shard 7 failed: ShardNotFound")
    lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert lines == ["shard 7 failed: ShardNotFound", "; ".join(describe_progress(BUSY))]
    with JobDisplay(stream) as display:
        display.observe(Progress())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.34, "0.3 s"),
        (9.97, "10 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (1e6, "11 d 13 h"),
    ],
)
def test_durations_read_naturally(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (1.31e9, "1.31 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_sizes_read_naturally(num_bytes, text):
    assert describe_bytes(num_bytes) == text
