"""A plan says what a job then does: counts, failures by class, and what is the limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.plan import JobPlan, plan_job, spread
from pipeline.dataset_files import read_manifest
from pipeline.storage import open_storage
from schemas.errors import SpecError
from schemas.jobspec import parse_spec
from tests.jobs.slow_server import slow_server
from tests.tiny_corpus import RunBsq, jpeg, mp4, photo_members, write_tar

STUB = ["--tokenizer", "stub", "--set", "preprocess.size=64", "--set", "device=cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of twelve samples each: pictures, two of them cut off, and a video of three clips."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        members = photo_members(100 * number, 9) + [(f"bad-{n}.jpg", jpeg(n)[:-300]) for n in range(2)]
        write_tar(folder / f"{number:02d}.tar", [*members, ("film.mp4", mp4(number, 40))])
    return folder


@pytest.mark.long
def test_a_plan_counts_what_the_job_then_makes(corpus: Path, tmp_path: Path, bsq: RunBsq) -> None:
    planned = bsq("plan", corpus / "*.tar", *STUB, "--seconds", 2, "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    made = bsq("tokenize", corpus / "*.tar", "--out", tmp_path / "out", "--tokenizer", "stub", "--size", 64, "--no-ray")
    assert made.returncode == 3, "too many samples fail"
    manifest = read_manifest(open_storage(str(tmp_path / "out")))
    assert manifest is not None
    summary = manifest.summary
    assert (plan["shards"], plan["samples"], plan["rows"], plan["tokens"]) == (
        summary.files,
        summary.samples,
        summary.rows,
        summary.tokens,
    )
    assert plan["clips"] == summary.rows
    assert plan["output_bytes"] == pytest.approx(summary.bytes, rel=0.05)
    assert plan["failures"] == {"MediaTruncated": 24}
    assert plan["source_bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert plan["seconds"] > 0 and plan["device_hours"] == pytest.approx(plan["seconds"] / 3600)


@pytest.mark.long
def test_slow_storage_is_named_as_the_limit(corpus: Path) -> None:
    values = {"tokenizer": "stub", "preprocess": {"size": 64}, "device": "cpu", "out": "unwritten"}
    with slow_server(corpus, bytes_per_second=100_000) as url:
        shards = [f"{url}/{number:02d}.tar" for number in (0, 4, 8)] + [f"{url}/none.tar"]
        plan = plan_job(parse_spec(values | {"shards": shards}, source="test"), seconds=2)
    assert plan.limit == "storage"
    assert plan.storage_rate < plan.worker_rate
    assert plan.unreadable_shards == 1
    assert "ShardNotFound" not in plan.failures and "no such" in plan.reasons[0]
    assert plan.samples == 3 * 12
    text = plan.describe()
    assert "limit     storage" in text and "about 1 cannot be read" in text
    assert f"{plan.failures['MediaTruncated']} MediaTruncated" in text


@pytest.mark.long
def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path, bsq: RunBsq) -> None:
    refused = bsq("plan", tmp_path / "none-{0..3}.tar", *STUB)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "none of 4 shards could be read" in line and "none-0.tar" in line
    write_tar(tmp_path / "bad.tar", [("a.jpg", b"\xff\xd8\xff not a picture")])
    refused = bsq("plan", tmp_path / "bad.tar", *STUB, "--seconds", 1)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "nothing could be tokenized" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.tar"], "nothing is written"


@given(count=st.integers(0, 5000), most=st.integers(1, 300))
def test_what_is_measured_is_spread_over_all_shards(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen)) and all(0 <= number < count for number in chosen)
    gaps = [after - before for before, after in zip([-1, *chosen], [*chosen, count], strict=True)]
    assert not chosen or max(gaps) <= count // min(count, most) + 2


def test_more_workers_take_less_time_until_shards_run_out() -> None:
    base = {
        "shards": 10, "source_bytes": 1, "samples": 1, "clips": 1, "rows": 1, "tokens": 1, "output_bytes": 1,
        "failures": {}, "unreadable_shards": 0, "seconds": 7200.0, "limit": "the device", "storage_rate": 1.0,
        "worker_rate": 1.0, "device_wait": 0.0, "decode_wait": 0.0, "start_seconds": 0.0, "measured_shards": 1,
        "measured_samples": 300, "measured_on": "the CPU",
    }  # fmt: skip
    plan = JobPlan(workers=4, **base)  # type: ignore[arg-type]
    assert plan.device_hours == 8
    assert "likely under 1.00%" in plan.describe() and "2 hours with 4 workers" in plan.describe()


def test_a_plan_refuses_what_the_job_would_refuse(corpus: Path) -> None:
    values = {"tokenizer": "stub", "preprocess": {"size": 64}, "device": "cpu", "out": "unwritten"}
    with pytest.raises(SpecError, match="nothing matches"):
        plan_job(parse_spec(values | {"shards": [f"{corpus}/*.zip"]}, source="test"))
