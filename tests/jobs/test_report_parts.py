"""What the report is computed from: rates add up, drift is found where it is and nowhere else, words are plain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.commit_table import column_sum, read_commit_table
from jobs.report import failures as failures_module
from jobs.report import words, write_report
from jobs.report.drift import binary_entropy, code_pieces, compare_shards
from jobs.report.failures import collect_failures
from jobs.report.speed import measure_rate, storage_of
from jobs.retry import retry_job
from jobs.start import start_job
from pipeline.dataset_files import read_manifest
from pipeline.storage import open_storage
from schemas.failures import Failure
from schemas.jobspec import parse_spec
from schemas.ledger import StageSeconds
from tests.tiny_corpus import jpeg, write_tar
from tokenizer.codes import bits_to_indices

# --- rate over time

shards_of_a_job = st.lists(
    st.tuples(st.integers(0, 100_000), st.integers(1, 5_000), st.integers(1, 10_000)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(shards_of_a_job)
def test_the_rate_adds_up_to_the_samples_whatever_overlaps_and_whatever_pauses(shards):
    ends, walls, samples = (np.asarray(column, np.float64) for column in zip(*shards, strict=True))
    rate = measure_rate(1e9 + ends - walls, 1e9 + ends, samples, np.ones(len(shards), np.bool_))
    assert rate is not None
    assert (rate.per_second * np.diff(rate.edges)).sum() == pytest.approx(samples.sum(), rel=1e-6)
    assert (rate.per_second >= 0).all() and (np.diff(rate.edges) > 0).all()
    length = rate.working_seconds + sum(pause for _, pause in rate.pauses)
    assert length == pytest.approx(rate.ended - rate.began)


def test_two_sittings_have_a_pause_between_them():
    starts = np.asarray([0.0, 100.0, 50_000.0])
    rate = measure_rate(starts, starts + 100, np.asarray([500.0, 500.0, 1000.0]), np.ones(3, np.bool_))
    assert rate is not None
    assert rate.pauses == [(200.0, 49_800.0)]
    assert rate.working_seconds == 300
    assert rate.per_second[:10] == pytest.approx(5.0)
    assert rate.per_second[-10:] == pytest.approx(10.0)


def test_without_dates_there_is_no_rate():
    nothing = np.asarray([np.nan])
    assert measure_rate(nothing, nothing, np.ones(1), np.ones(1, np.bool_)) is None


@pytest.mark.parametrize(
    ("url", "storage"),
    [
        ("s3://bucket/deep/a.tar", "s3://bucket"),
        ("https://***@host:8080/a.tar?sig=***", "https://***@host:8080"),
        ("simplecache::gs://bucket/a.tar", "gs://bucket"),
        ("/data/photos/a.tar", "/data/photos"),
        ("file:///data/photos/a.tar", "/data/photos"),
        ("a.tar", "."),
    ],
)
def test_shards_are_counted_to_what_serves_them(url, storage):
    assert storage_of(url) == storage


# --- drift

PIECES = [(0, 4), (4, 8)]
TOKENS = 64


def rows_of(generator, num_shards, rows_per_shard, ones_of_shard):
    """Rows of tokens whose bits are one with the chances that `ones_of_shard` gives; each row leans its own way."""
    shards, ones, codes = [], [], []
    for shard in range(num_shards):
        for _ in range(rows_per_shard):
            chance = np.clip(ones_of_shard(shard) + generator.normal(0, 0.08, 8), 0.02, 0.98)
            bits = generator.random((TOKENS, 8)) < chance
            shards.append(shard)
            ones.append(bits.mean(0))
            counts = [np.bincount(bits_to_indices(bits[:, first:last]), minlength=16) for first, last in PIECES]
            codes.append(np.concatenate(counts))
    return np.asarray(shards), np.stack(ones), np.stack(codes).astype(np.uint32)


@pytest.mark.parametrize("seed", range(12))
def test_shards_that_are_alike_do_not_drift(seed):
    generator = np.random.default_rng(seed)
    rows = rows_of(generator, 5 + 5 * (seed % 4), 4 + 4 * (seed % 3), lambda shard: np.full(8, 0.5))
    assert [each.shard for each in compare_shards(*rows, PIECES, seed) if each.drifts] == []


@pytest.mark.parametrize("seed", range(6))
def test_a_corpus_in_order_of_topic_does_not_drift(seed):
    generator = np.random.default_rng(seed)
    topics = 0.5 + generator.normal(0, 0.1, (30, 8))
    rows = rows_of(generator, 30, 16, lambda shard: topics[shard])
    compared = compare_shards(*rows, PIECES, seed)
    assert [each.shard for each in compared if each.drifts] == []
    assert np.median([each.score for each in compared]) > 2  # above chance all the same


@pytest.mark.parametrize("num_shards", [4, 6, 24])
@pytest.mark.parametrize("seed", range(4))
def test_one_shard_that_drifts_is_named_with_its_channel(num_shards, seed):
    generator = np.random.default_rng(seed)
    dark = np.full(8, 0.5)
    dark[5] = 0.95
    dark[:4] = 0.7
    rows = rows_of(generator, num_shards, 16, lambda shard: dark if shard == 2 else np.full(8, 0.5))
    (drifting,) = [each for each in compare_shards(*rows, PIECES, seed) if each.drifts]
    assert (drifting.shard, drifting.channel) == (2, 5)
    assert drifting.ones_here > 0.85 and abs(drifting.ones_elsewhere - 0.5) < 0.1
    assert drifting.score > 3


def test_bits_that_only_go_together_in_one_shard_are_drift_of_codes():
    generator = np.random.default_rng(7)
    shards, ones, codes = rows_of(generator, 12, 16, lambda shard: np.full(8, 0.5))
    for row in np.flatnonzero(shards == 4):
        # Each bit is one half of the time, but all four of a group are the same.
        counts = np.zeros(32, np.uint32)
        counts[[0, 15, 16, 31]] = TOKENS // 2
        codes[row] = counts
    drifting = [each for each in compare_shards(shards, ones, codes, PIECES, 0) if each.drifts]
    assert [each.shard for each in drifting] == [4]
    assert drifting[0].code_divergence > 0.3


def test_too_few_shards_are_not_compared():
    rows = rows_of(np.random.default_rng(0), 3, 16, lambda shard: np.full(8, 0.1 + 0.4 * shard))
    assert compare_shards(*rows, PIECES, 0) == []


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [
        (18, 9, [(0, 9), (9, 18)]),
        (16, 16, [(0, 8), (8, 16)]),
        (36, 18, [(0, 9), (9, 18), (18, 27), (27, 36)]),
        (4, 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (1, 1, [(0, 1)]),
        (20, 20, [(0, 6), (6, 13), (13, 20)]),
    ],
)
def test_codes_are_groups_or_their_parts(bits, group_size, expected):
    assert code_pieces(bits, group_size) == expected


def test_the_entropy_of_a_coin_is_a_bit():
    assert binary_entropy(np.asarray([0.0, 0.5, 1.0, 0.11])) == pytest.approx([0, 1, 0, 0.49992], abs=1e-4)


# --- failures


def test_classes_are_estimated_when_there_are_too_many_tables(write_dataset, monkeypatch):
    monkeypatch.setattr(failures_module, "MAX_TABLES", 12)
    monkeypatch.setattr(failures_module, "FULLEST_TABLES", 4)
    dataset = write_dataset(num_shards=30)
    found = collect_failures(dataset.storage, read_commit_table(dataset.storage), seed=1)
    assert (found.tables_read, found.tables, found.exact) == (12, 30, False)
    # Every shard has one of each, so the estimate is what there is.
    assert {each.error: each.samples for each in found.classes} == pytest.approx({"NoMedia": 30, "CaptionNotText": 30})


def test_several_bad_clips_are_one_sample_and_an_archive_is_one(write_dataset):
    def clips(failures):
        broken = [
            Failure(key="walk", position=2, clip=clip, stage="decode", error="MediaCorrupt", message="m")
            for clip in range(5)
        ]
        archive = Failure(key=None, stage="read", error="TarTruncated", message="ends early")
        return [*failures, *broken, archive]

    dataset = write_dataset(num_shards=2, edit_failures=clips)
    found = collect_failures(dataset.storage, read_commit_table(dataset.storage), seed=0)
    assert {each.error: each.samples for each in found.classes} == {
        "MediaCorrupt": 2,
        "NoMedia": 2,
        "TarTruncated": 2,
        "CaptionNotText": 2,
    }
    assert [each.severity for each in found.classes][-1] == "warning"


# --- words


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0%"), (1, "100%"), (0.5, "50%"), (0.0123, "1.2%"), (0.999999, "99.99%"), (1e-9, "0.001%"), (0.0035, "0.35%")],
)
def test_shares_are_never_rounded_to_none_or_all(share, expected):
    assert words.percent(share) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (7, "7"),
        (9_999, "9,999"),
        (12_345, "12 k"),
        (1_234_567, "1.2 M"),
        (34_816_000_000, "35 G"),
        (4.2, "4.2"),
    ],
)
def test_large_numbers_are_short(number, expected):
    assert words.short(number) == expected


def test_texts_are_printable_short_and_without_credentials():
    shown = words.text("https://me:s3cr3t@host/a.tar?sig=abc \x1b[31m \u202egnp " + "x" * 5000)
    assert "s3cr3t" not in shown and "abc" not in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    assert len(shown) <= words.MAX_TEXT_CHARS + 3


# --- generations


def test_totals_are_those_of_the_manifest_whatever_was_won_back_later(tmp_path, small_shards):
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(small_shards[1].read_bytes()[:-9000])
    big = write_tar(tmp_path / "big.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2, 400, 300)), ("c.jpg", b"nothing")])
    late = tmp_path / "late.tar"
    values = {"tokenizer": "stub", "preprocess": {"size": 64}, "limits": {"max_pixels": 20_000}}
    spec = {"shards": [str(path) for path in (damaged, big, late)], "out": str(tmp_path / "out")} | values
    start_job(parse_spec(spec, source="test"), runner="in-process")
    late.write_bytes(small_shards[0].read_bytes())
    damaged.write_bytes(small_shards[1].read_bytes())
    storage = open_storage(str(tmp_path / "out"))
    seen = []
    for kind in ("retry", "retry-samples", "retry-damaged"):
        asked = parse_spec({"limits": {"max_pixels": 1 << 20}} if kind == "retry-samples" else {}, source="test")
        retry_job(str(tmp_path / "out"), kind, asked=asked, runner="in-process")
        manifest = read_manifest(storage)
        assert manifest is not None
        commits = read_commit_table(storage)
        failures = collect_failures(storage, commits, seed=0)
        summary = manifest.summary
        assert (failures.samples, failures.failed, failures.warnings) == (
            summary.samples,
            summary.failed,
            summary.warnings,
        )
        assert (failures.num_partial, failures.num_given_up) == (summary.partial_shards, summary.failed_shards)
        assert column_sum(commits.table, "rows") == summary.rows
        assert sum(each.samples for each in failures.classes if each.severity == "failed") >= summary.failed
        seen.append((summary.generation, failures.failed, failures.num_partial))
    assert seen == [(1, 3, 1), (2, 1, 1), (3, 1, 0)]
    write_report(str(tmp_path / "out"), str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "Made with the stub of tests and benchmarks, whose tokens cannot be decoded." in page
    assert "<dt>Generations</dt><dd><bdi>4</bdi></dd>" in page


# --- what is slow


def test_a_slow_shard_and_a_slow_worker_are_named_with_what_is_slow_about_them(write_dataset, tmp_path):
    def timed(commit):
        factor = 2.5 if commit.shard % 4 == 3 else 1.0
        seconds = StageSeconds(read=0.02, decode=0.2 * factor, encode=0.3 * factor, write=0.01, wall=0.6)
        if commit.shard == 6:
            seconds = seconds.model_copy(update={"decode": 9.0})
        return commit.model_copy(update={"seconds": seconds, "worker": f"node{commit.shard % 4}/gpu0"})

    report = write_report(write_dataset(num_shards=20, edit_commit=timed).url, str(tmp_path / "r.html"))
    details = {finding.title: finding.detail for finding in report.findings}
    assert details["Shard 6 is slow"].endswith("its decode takes 45 times as long as usual.")
    assert "2.5 times as long as the median worker, over 5 shards" in details["Worker node3/gpu0 is slow"]
    assert [title for title in details if title.endswith("is slow")] == ["Shard 6 is slow", "Worker node3/gpu0 is slow"]


def test_times_that_are_not_known_are_left_out(write_dataset, tmp_path):
    report = write_report(write_dataset(num_shards=5).url, str(tmp_path / "r.html"))
    assert not [finding for finding in report.findings if "slow" in finding.title]
    assert "No times are recorded yet: 5 token files had been published" in (tmp_path / "r.html").read_text()
