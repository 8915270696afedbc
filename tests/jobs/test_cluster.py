"""Jobs handed in to a real Ray head with a dashboard, whose environment has no bsqtok in it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from jobs.commands.options import storage_options
from jobs.submit import pinned_requirements, stage_job
from pipeline.dataset_files import read_job, read_manifest
from pipeline.storage import open_storage
from schemas.errors import SpecError
from schemas.jobspec import parse_spec
from tests.jobs.ray_cluster import TOKEN, RayCluster, ray_cluster
from tests.jobs.slow_server import slow_server
from tests.tiny_corpus import RunBsq, dataset_files

needs_dashboard = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="needs ray[default]: pip install 'bsqtok[cluster]'"
)
JOB = {"tokenizer": "stub", "preprocess": {"size": 64}, "device": "cpu", "run": {"cpus_per_worker": 1}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    def write(**values: object) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(JOB | values), encoding="utf-8")
        return path

    return write


def wait_until(condition: Callable[[], bool], what: str, patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.2)


@pytest.mark.longest
@needs_dashboard
def test_a_job_file_gives_the_same_dataset_there_as_here(
    cluster: RayCluster, small_shards: list[Path], tmp_path: Path, bsq: RunBsq, write_job: Callable[..., Path]
) -> None:
    missing = subprocess.run([cluster.python, "-c", "import jobs"], cwd=cluster.folder, capture_output=True)
    assert missing.returncode == 1, "the code must come with the job"
    (tmp_path / "list.txt").write_text("# relative to where the job is handed in\nshards/small-01.tar\n")
    (tmp_path / "shards").symlink_to(small_shards[0].parent)
    shards = ["shards/small-00.tar", "@list.txt", str(small_shards[2])]
    job = write_job(shards=shards, out="there")
    submitted = bsq("submit", job, "--address", cluster.dashboard, "--follow", cwd=tmp_path, timeout=300)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job_id, _, log = submitted.stdout.partition("\n")
    assert "3 of 3 committed" in log, "the summary of the job is in what it wrote"
    assert bsq("tokenize", "--config", job, "--out", "here", "--in-process", cwd=tmp_path).returncode == 0
    assert dataset_files(tmp_path / "there") == dataset_files(tmp_path / "here")
    there, here = (open_storage(str(tmp_path / name)) for name in ("there", "here"))
    manifests = read_manifest(there), read_manifest(here)
    assert manifests[0] and manifests[1]
    assert manifests[0].table["url"] == manifests[1].table["url"]
    jobs = read_job(there), read_job(here)
    assert jobs[0] and jobs[1]
    assert (jobs[0].fingerprint, jobs[0].created_by) == (jobs[1].fingerprint, jobs[1].created_by)

    listed = bsq("jobs", "--address", cluster.dashboard, "--json")
    (entry,) = [entry for entry in json.loads(listed.stdout) if entry["id"] == job_id]
    assert (entry["state"], entry["out"], entry["exit_code"]) == ("SUCCEEDED", "there", 0)
    assert job_id in bsq("jobs", "--address", cluster.dashboard).stdout
    logs = bsq("logs", job_id, "--address", cluster.dashboard)
    assert (logs.returncode, logs.stdout) == (0, log)


@pytest.mark.longest
@needs_dashboard
def test_a_job_that_is_stopped_keeps_what_it_has_and_goes_on_where_it_is_handed_in_again(
    cluster: RayCluster, small_shards: list[Path], tmp_path: Path, bsq: RunBsq, write_job: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(small_shards[0].parent, tmp_path / "corpus")
    with slow_server(tmp_path / "corpus", bytes_per_second=20_000) as url:
        job = write_job(shards=[f"{url}/small-{{00..05}}.tar"], out=str(out))
        submitted = bsq("submit", job, "--address", cluster.dashboard, "--no-pip")
        assert submitted.returncode == 0, submitted.stderr
        job_id = submitted.stdout.strip()

        def has_committed() -> bool:
            log = bsq("logs", job_id, "--address", cluster.dashboard).stdout
            assert "Traceback" not in log, log
            state = bsq("status", out, "--json")
            if state.returncode:
                return False
            progress = json.loads(state.stdout)
            assert progress["state"] == "running", progress
            # The lease holds the progress of a quarter of a minute ago; the files are those of now.
            return any(name.startswith("tokens/") for name in dataset_files(out))

        wait_until(has_committed, "a shard is published")
        stopped = bsq("stop", job_id, "--address", cluster.dashboard)
        assert (stopped.returncode, stopped.stdout) == (0, f"{job_id}: STOPPED\n"), stopped.stderr
        assert not (out / "lease.json").exists(), "the driver ended by itself"
        assert json.loads(bsq("status", out, "--json").stdout)["state"] == "interrupted"
        followed = bsq("logs", job_id, "--address", cluster.dashboard, "--follow")
        assert followed.returncode == 130
        assert "bsq resume" in followed.stdout
    with slow_server(tmp_path / "corpus", bytes_per_second=1e9, port=int(url.rpartition(":")[2])):
        again = bsq("submit", job, "--address", cluster.dashboard, "--no-pip", "--follow")
        assert again.returncode == 0, again.stdout + again.stderr
        here = bsq("tokenize", "--config", job, "--out", tmp_path / "here", "--in-process")
        assert here.returncode == 0, here.stderr
    assert dataset_files(out) == dataset_files(tmp_path / "here")


@pytest.mark.longest
@needs_dashboard
def test_what_does_not_exist_is_told_in_one_line(
    cluster: RayCluster, small_shards: list[Path], tmp_path: Path, bsq: RunBsq, write_job: Callable[..., Path]
) -> None:
    job = write_job(shards=[str(small_shards[0])], out=str(tmp_path / "out"), run={"workers": 1, "cpus_per_worker": 99})
    refused = bsq("submit", job, "--address", cluster.dashboard, "--no-pip", "--follow")
    assert refused.returncode == 2
    assert "1 workers of 0 GPU and 99 CPU each were asked for, but there is room for 0" in refused.stdout
    assert not (tmp_path / "out").exists()
    job_id = refused.stdout.splitlines()[0]
    for command in ("logs", "stop"):
        unknown = bsq(command, f"{job_id}x", "--address", cluster.dashboard)
        assert unknown.returncode == 2
        (line,) = unknown.stderr.strip().splitlines()
        assert f"Did you mean {job_id!r}?" in line
    stranger = bsq("jobs", "--address", cluster.dashboard, env={"RAY_AUTH_TOKEN": "6" * 64})
    assert stranger.returncode == 2, stranger.stderr
    (line,) = stranger.stderr.strip().splitlines()
    assert "RAY_AUTH_TOKEN" in line


def test_a_dashboard_that_is_not_there_is_told_in_one_line(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq, write_job: Callable[..., Path]
) -> None:
    job = write_job(shards=[str(small_shards[0])], out=str(tmp_path / "out"))
    for arguments in (("submit", job), ("jobs",), ("logs", "bsq-1"), ("stop", "bsq-1")):
        refused = bsq(*arguments, "--address", "http://127.0.0.1:9")
        assert refused.returncode == 2, refused.stderr
        (line,) = refused.stderr.strip().splitlines()
        assert "127.0.0.1:9" in line and "--address" in line


def test_a_mistake_in_the_job_file_is_found_before_anything_travels(
    bsq: RunBsq, write_job: Callable[..., Path]
) -> None:
    job = write_job(shards=["a.tar"], out="out", tokeniser="stub")
    refused = bsq("submit", job, "--address", "http://127.0.0.1:9")
    assert refused.returncode == 2 and "Did you mean 'tokenizer'?" in refused.stderr


def test_local_paths_mean_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "list.txt").write_text("b.tar\n\n# no\ns3://bucket/c.tar\n")
    values = {"shards": ["a-{0..3}.tar", "@list.txt", "s3://b/d.tar", "@s3://b/l.txt"], "out": "o", **JOB}
    folder = tmp_path / "staged"
    folder.mkdir()
    stage_job(parse_spec(values | {"tokenizer": "weights"}, source="test"), folder)
    staged = parse_spec(yaml.safe_load((folder / "job.yaml").read_text()), source="test")
    assert staged.shards == (f"{tmp_path}/a-{{0..3}}.tar", "@shards-1.txt", "s3://b/d.tar", "@s3://b/l.txt")
    assert (folder / "shards-1.txt").read_text() == f"{tmp_path}/b.tar\ns3://bucket/c.tar\n"
    assert (staged.out, staged.tokenizer) == (f"{tmp_path}/o", f"{tmp_path}/weights")
    assert staged.preprocess == parse_spec(values, source="test").preprocess
    stage_job(parse_spec(values, source="test"), folder)
    assert yaml.safe_load((folder / "job.yaml").read_text())["tokenizer"] == "stub"
    with pytest.raises(SpecError, match=r"none\.txt: the list cannot be read"):
        stage_job(parse_spec(values | {"shards": ["@none.txt"]}, source="test"), folder)


def test_the_packages_that_travel_are_pinned_and_hold_neither_torch_nor_ray() -> None:
    pins = dict(pin.split("==") for pin in pinned_requirements())
    assert {"numpy", "av", "pyarrow", "typer", "s3fs"} <= set(pins)
    assert {"torch", "ray", "pytest", "ruff"}.isdisjoint(pins)


def test_storage_options_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "options"
    path.write_text("# of the bucket\nkey=someone\n secret=a=b\n\nclient_kwargs.endpoint_url=http://x\n")
    expected = {"key": "someone", "secret": "a=b", "client_kwargs": {"endpoint_url": "http://x"}, "anon": True}
    assert storage_options([f"@{path}", "anon=true"]) == expected
    with pytest.raises(SpecError, match="cannot be read"):
        storage_options([f"@{tmp_path / 'none'}"])
