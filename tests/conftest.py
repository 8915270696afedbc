"""Fixtures for every test: shared data, a small corpus, and the command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.running_jobs import StartJob, start_jobs
from tests.tiny_corpus import BSQ, REPOSITORY, RunBsq, bsq_environment, mp4, photo_members, write_tar

# The same examples in every run; `pytest --hypothesis-profile default` looks for others.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="kills at random moments in the kill matrix")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The large shared data; a test that asks for it is skipped where it is absent."""
    path = Path(os.environ.get("BSQTOK_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"needs the shared data at {path} (set BSQTOK_SHARED)")
    return path


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six shards of eight pictures each; the third also has two clips among them, of 5 and 11 frames."""
    folder = tmp_path_factory.mktemp("small-shards")
    shards = []
    for number in range(6):
        members = photo_members(100 * number, 8)
        if number == 2:
            members[8:8] = [("clip-a.mp4", mp4(1, 5)), ("clip-a.txt", b"five frames")]
            members += [("clip-b.mp4", mp4(2, 11))]
        shards.append(write_tar(folder / f"small-{number:02d}.tar", members))
    return shards


@pytest.fixture
def bsq() -> RunBsq:
    """Run one command in a process of its own and return its exit code and output."""

    def run(
        *arguments: object, timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BSQ, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=bsq_environment(env),
            check=False,
            cwd=cwd,
        )

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartJob]:
    """Begin commands that run beside the test, stand still at steps, and can be killed."""
    yield from start_jobs(tmp_path)


@dataclass(frozen=True)
class ObjectStore:
    """An S3 server in this process, with one bucket."""

    url: str
    storage_options: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """What a command is told to reach it."""
        pairs = [f"{name}={value}" for name, value in self.storage_options.items()]
        return [word for pair in pairs for word in ("--storage-option", pair)]


@pytest.fixture
def object_store() -> Iterator[ObjectStore]:
    """An empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        key, secret = "someone", "s3cr3t-of-nobody"
        credentials = {"aws_access_key_id": key, "aws_secret_access_key": secret}
        endpoint = f"http://{host}:{port}"
        # All servers of this process share what was stored.
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **credentials).create_bucket(Bucket="bucket")
        yield ObjectStore("s3://bucket", {"key": key, "secret": secret, "endpoint_url": endpoint})
    finally:
        server.stop()
