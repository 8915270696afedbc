"""A running job as Ray's Prometheus endpoint shows it: slow storage and a failing class stand out."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.jobs.ray_cluster import TOKEN, RayCluster, ray_cluster
from tests.jobs.slow_server import slow_server
from tests.tiny_corpus import BSQ, bsq_environment, jpeg, photo_members, write_tar

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="needs ray[default]: pip install 'bsqtok[cluster]'"
    ),
]
NUM_SHARDS = 3
TOKENS_OF_AN_IMAGE = 64


def values_of(cluster: RayCluster, metric_name: str, out: Path) -> dict[str, float]:
    """The values of one metric of this dataset, by its other labels: `error=X,scope=Y`."""
    found: dict[str, float] = {}
    for metric, value in cluster.metrics().items():
        match = re.fullmatch(rf"ray_{metric_name}\{{(.*)\}}", metric)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if match else {}
        if labels.get("dataset") == str(out):
            ours = {
                key: labels[key] for key in ("scope", "error", "stage", "state", "queue", "worker") if key in labels
            }
            found[",".join(f"{key}={label}" for key, label in ours.items())] = value
    return found


@pytest.mark.longest
def test_slow_storage_and_a_failing_class_are_visible(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    for number in range(NUM_SHARDS):
        members = photo_members(10 * number, 10)
        # Two pictures of each shard end early.
        broken = [(f"broken-{n}.jpg", jpeg(n)[:-400]) for n in range(2)]
        write_tar(corpus / f"{number}.tar", members + broken)
    markers = tmp_path / "markers"
    markers.mkdir()
    with ray_cluster() as cluster, slow_server(corpus, bytes_per_second=10_000) as url:
        job = subprocess.Popen(
            [
                *(*BSQ, "tokenize", f"{url}/{{0..{NUM_SHARDS}}}.tar", "--out", str(out), "--tokenizer", "stub"),
                *("--size", "64", "--device", "cpu", "--ray-address", cluster.address, "--cpus-per-worker", "1"),
            ],
            # The numbers of a process go with it, so the driver waits at its end.
            env=bsq_environment({**TOKEN, "BSQTOK_HOLD_AT": f"before_manifest:{markers}"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            deadline = time.monotonic() + 240
            while values_of(cluster, "bsq_samples_total", out) != {"": 12.0 * NUM_SHARDS}:
                assert job.poll() is None, job.communicate()[0]
                assert time.monotonic() < deadline, [name for name in cluster.metrics() if "bsq" in name]
                time.sleep(1)
            failures = values_of(cluster, "bsq_failures_total", out)
            seconds = values_of(cluster, "bsq_stage_seconds_total", out)
            tokens = values_of(cluster, "bsq_tokens_total", out)
            idle = values_of(cluster, "bsq_device_idle_fraction", out)
            queues = values_of(cluster, "bsq_queue_bytes", out)
            shards = values_of(cluster, "bsq_shards", out)
            decoded = values_of(cluster, "bsq_samples_decoded_total", out)
            for marker in markers.iterdir():
                marker.unlink()
            output, _ = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 3, output
    assert failures == {
        "scope=sample,error=MediaTruncated": 2.0 * NUM_SHARDS,
        "scope=attempt,error=ShardNotFound": 1.0,
        "scope=shard,error=ShardNotFound": 1.0,
    }
    assert seconds["stage=read"] > 10 * (seconds["stage=decode"] + seconds.get("stage=encode", 0.0)), (
        "storage is the limit"
    )
    assert tokens == {"": 10.0 * NUM_SHARDS * TOKENS_OF_AN_IMAGE}
    assert idle["worker=cpu0"] > 0.9, "the device waits for what does not come"
    assert set(queues) == {"queue=undecoded,worker=cpu0", "queue=batches,worker=cpu0"}
    assert shards["state=planned"] == NUM_SHARDS + 1
    assert decoded["worker=cpu0"] >= 12.0
