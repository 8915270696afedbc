"""Jobs on a cluster through Ray's job API: hand one in, list them, read along, stop.

What travels with a job: its spec, this code, and the versions of the packages that it needs, all but torch and Ray,
whose builds belong to the cluster.  There it is `bsq tokenize` with the same job file as here."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pipeline.credentials import printable_url
from schemas.errors import BsqError, SpecError, nearest_name
from schemas.jobspec import JobSpec

# Set before Ray is imported: it reads it at import.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

PACKAGES = ("schemas", "tokenizer", "pipeline", "jobs")
JOB_FILE = "job.yaml"
STORAGE_FILE = "storage-options.txt"
KNOCK_SECONDS = 10.0
START_SECONDS = 60.0
"""What a head may take from answering to being able to run a job."""
STOP_SECONDS = 45
"""What a job gets to finish what it has read, before Ray kills it.  The driver's own limit is shorter."""
_TOKEN_FILE = "~/.ray/auth_token"
"""Where Ray keeps the token of a cluster that wants one."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)[^;]*(?:;.*extra == ['\"](\w+)['\"])?")
_NOT_SHIPPED = ("torch", "ray")
_EXTRAS = ("s3", "gcs", "zstd")
"""Extras whose packages travel where they are installed here."""


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """A job that was handed in with `bsq submit`."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray says it."""
    out: str
    began: datetime | None
    seconds: float
    exit_code: int | None
    """Of `bsq tokenize`, where Ray knows it."""
    message: str
    """What Ray says about it, in one line."""

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def outcome(self) -> int:
        """The exit code that fits how it ended."""
        if self.state == "SUCCEEDED":
            return 0
        return 130 if self.state == "STOPPED" else self.exit_code or 1


class Cluster:
    """The jobs of the Ray cluster whose dashboard is at `address`."""

    def __init__(self, address: str) -> None:
        """Raises SpecError in one line when nothing that knows jobs answers there."""
        self._address = address if "://" in address else f"http://{address}"
        missing = [name for name in ("aiohttp", "requests") if importlib.util.find_spec(name) is None]
        if missing:
            raise SpecError(f"jobs on a cluster need {missing[0]}: pip install 'bsqtok[cluster]'")
        parts = urlsplit(self._address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SpecError(f"{address}: not the address of a Ray dashboard. Give one such as http://head:8265.")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), KNOCK_SECONDS).close()
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{self._address}: no Ray dashboard answers there ({_first_line(error)}). Check --address; the head "
                f"node needs ray[default]."
            ) from error
        _use_token()
        from ray.job_submission import JobSubmissionClient

        # They tell of every package that they upload.
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray").setLevel(logging.WARNING)
        with self._asking():
            self._client = JobSubmissionClient(self._address)

    def submit(self, spec: JobSpec, *, ship_packages: bool, storage_options: Sequence[str] = ()) -> str:
        """Hand in a job and return its id.  `storage_options` are KEY=VALUE pairs.

        They travel in a file, not in the command, which everybody who sees the dashboard can read.  Raises SpecError
        where packages shall travel but are not known, BsqError when the cluster does not take the job."""
        job_id = f"bsq-{secrets.token_hex(4)}"
        command = f"python -m jobs.entry tokenize --config {JOB_FILE} --ray-address auto"
        with tempfile.TemporaryDirectory(prefix="bsq-submit-") as name:
            folder = Path(name)
            stage_job(spec, folder)
            if storage_options:
                (folder / STORAGE_FILE).write_text("".join(f"{pair}\n" for pair in storage_options), encoding="utf-8")
                command += f" --storage-option @{STORAGE_FILE}"
            environment: dict[str, Any] = {
                "working_dir": str(folder),
                "py_modules": [str(_folder_of(package)) for package in PACKAGES],
                "excludes": ["__pycache__/"],
                # The first is read by Ray itself, when the job is stopped.
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"},
            }
            if ship_packages:
                environment["pip"] = {"packages": pinned_requirements(), "pip_check": False}
            with self._asking():
                return self._submit_patiently(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env=environment,
                    metadata={"bsqtok_out": printable_url(spec.out), "bsqtok_version": _version()},
                )

    def list(self) -> list[ClusterJob]:
        """Jobs of bsqtok that the cluster remembers, oldest first."""
        with self._asking():
            found = self._client.list_jobs()
        jobs = [_describe(details) for details in found if (details.metadata or {}).get("bsqtok_out")]
        return sorted(jobs, key=lambda job: job.began or datetime.max.replace(tzinfo=UTC))

    def find(self, job_id: str) -> ClusterJob:
        """The job with this id.  Raises SpecError that names the nearest one."""
        jobs = self.list()
        for job in jobs:
            if job.id == job_id:
                return job
        known = nearest_name(job_id, [job.id for job in jobs]) or f" It knows {len(jobs)}; `bsq jobs` lists them."
        raise SpecError(f"{job_id}: the cluster at {self._address} knows no such job.{known}")

    def logs(self, job_id: str) -> str:
        """What the job has written so far."""
        self.find(job_id)
        with self._asking():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job writes, in pieces, until it ends.  The job does not mind when nobody listens any more."""
        self.find(job_id)
        loop = asyncio.new_event_loop()
        tail: Any = self._client.tail_job_logs(job_id)
        try:
            while True:
                with self._asking():
                    piece = loop.run_until_complete(anext(tail, None))
                if piece is None:
                    return
                yield piece
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(tail.aclose())
            loop.close()

    def stop(self, job_id: str) -> ClusterJob:
        """Ask a job to finish what it has read and end; return it when it has ended, or cannot be waited for."""
        job = self.find(job_id)
        if not job.has_ended:
            with self._asking():
                self._client.stop_job(job_id)
            deadline = time.monotonic() + STOP_SECONDS + KNOCK_SECONDS
            while not (job := self.find(job_id)).has_ended and time.monotonic() < deadline:
                time.sleep(0.5)
        return job

    def wait(self, job_id: str) -> ClusterJob:
        """The job as it ended; its last line comes a moment before Ray knows."""
        deadline = time.monotonic() + KNOCK_SECONDS
        while not (job := self.find(job_id)).has_ended and time.monotonic() < deadline:
            time.sleep(0.2)
        return job

    def _submit_patiently(self, **arguments: Any) -> str:
        """Submit, also to a head that has just been started and has nobody yet who could run a job."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return str(self._client.submit_job(**arguments))
            except RuntimeError as error:
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise SpecError(
                f"{self._address}: the Ray cluster wants to know who asks ({_first_line(error)}). Set RAY_AUTH_TOKEN, "
                f"or put its token into {_TOKEN_FILE}."
            ) from error
        except (RuntimeError, ValueError, OSError, aiohttp.ClientError, requests.RequestException) as error:
            raise BsqError(
                f"the Ray cluster at {self._address} did not answer as it should ({_first_line(error)}). "
                f"A job that runs goes on; try again."
            ) from error


def stage_job(spec: JobSpec, folder: Path) -> None:
    """Write the job file into `folder`, with lists of shards beside it and every local path made absolute.

    Raises SpecError when a list cannot be read."""
    shards = []
    for number, pattern in enumerate(spec.shards):
        if pattern.startswith("@") and "://" not in pattern:
            name = f"shards-{number}.txt"
            _copy_list(Path(pattern[1:]).expanduser(), folder / name)
            shards.append(f"@{name}")
        else:
            shards.append(pattern if pattern.startswith("@") else _absolute(pattern))
    is_path = Path(spec.tokenizer).expanduser().exists()
    values = spec.model_dump(mode="json", exclude_defaults=True) | {"shards": shards, "out": _absolute(spec.out)}
    if is_path:
        values["tokenizer"] = _absolute(spec.tokenizer)
    (folder / JOB_FILE).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(PackageNotFoundError):
        # So that the code there knows its version.
        metadata = folder / f"bsqtok-{version('bsqtok')}.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: bsqtok\nVersion: {version('bsqtok')}\n", encoding="utf-8")


def pinned_requirements() -> list[str]:
    """The packages that bsqtok needs, at the versions that are installed here: `numpy==2.4.6`.

    Without torch and Ray.  Raises SpecError where bsqtok itself is not installed."""
    try:
        requirements = distribution("bsqtok").requires or []
    except PackageNotFoundError as error:
        raise SpecError(
            "bsqtok is not installed here, so what it needs is not known. Install it with pip, or add --no-pip and "
            "prepare the cluster's nodes."
        ) from error
    pins = []
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        assert match is not None
        if match[1] in _NOT_SHIPPED or (match[2] and match[2] not in _EXTRAS):
            continue
        with contextlib.suppress(PackageNotFoundError):
            pins.append(f"{match[1]}=={version(match[1])}")
    return sorted(set(pins))


def local_paths(spec: JobSpec) -> list[str]:
    """Paths of the spec that every node must be able to reach under the same name."""
    return [_absolute(url) for url in (*spec.shards, spec.out) if not url.startswith("@") and _is_local(url)]


def _copy_list(source: Path, target: Path) -> None:
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{source}: the list cannot be read. Name a text file of URLs.") from error
    stripped = (line.strip() for line in lines)
    kept = [line if line.startswith("@") else _absolute(line) for line in stripped if line and not line.startswith("#")]
    target.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _use_token() -> None:
    """Have Ray send its token where there is one, as its own commands do.  Before Ray is imported."""
    has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if has_token or Path(_TOKEN_FILE).expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_local(url: str) -> bool:
    return "://" not in url and "::" not in url


def _absolute(url: str) -> str:
    # Not Path.resolve: what a link means may differ there.
    return os.path.abspath(Path(url).expanduser()) if _is_local(url) else url  # noqa: PTH100


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _version() -> str:
    try:
        return version("bsqtok")
    except PackageNotFoundError:
        return "not installed"


def _describe(details: Any) -> ClusterJob:
    began = datetime.fromtimestamp(details.start_time / 1000, UTC) if details.start_time else None
    ended = details.end_time / 1000 if details.end_time else time.time()
    return ClusterJob(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),
        out=details.metadata["bsqtok_out"],
        began=began,
        seconds=ended - began.timestamp() if began else 0.0,
        exit_code=details.driver_exit_code,
        message=_first_line(details.message or ""),
    )


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
