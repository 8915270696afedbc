"""Hostile, damaged and mistaken input: the job ends by itself, says what is wrong in a line, and loses nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import socket
import stat
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset_files import read_ledger, read_plan
from pipeline.group import split_name
from pipeline.storage import open_storage
from schemas.errors import printable
from schemas.ledger import Commit, GivenUp
from tests.tiny_corpus import BSQ, bsq_environment, mp4, temporaries

MB = 1 << 20
MOST_EXTRA_MB = 900
"""What the worst sample of the nasty set may take (`max_extra_mb`): a clip with frames of 36 megapixels."""
MAX_SECONDS = 240.0
ANNOUNCED_PORTS = {"tcp": 18909, "udp": 18910}
"""Where playlists and session descriptions of the nasty set would connect."""

# ---- a job watched from outside


@dataclass(frozen=True, slots=True)
class Watched:
    """How a command ran, and the most that it and each of its children took."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    peak_virtual: int
    """Bytes of address space of the largest process."""
    peak_resident: int
    programs: frozenset[str]
    """Every program that was seen running."""


def watch(
    arguments: list[str], *, cwd: Path, address_space: int | None = None, env: dict[str, str] | None = None
) -> Watched:
    """Run `bsq` in a process of its own under `ulimit -v` and look at its processes all the time."""

    began = time.monotonic()
    virtual = resident = 0
    programs: set[str] = set()
    with (cwd / "stdout").open("w+b") as stdout, (cwd / "stderr").open("w+b") as stderr:
        process = subprocess.Popen([*BSQ, *arguments], cwd=cwd, env=bsq_environment(env), stdout=stdout, stderr=stderr)
        if address_space is not None:
            # Its children inherit the limit.
            resource.prlimit(process.pid, resource.RLIMIT_AS, (address_space, address_space))
        try:
            while process.poll() is None:
                assert time.monotonic() - began < MAX_SECONDS, "the job does not end"
                for pid in family(process.pid):
                    with contextlib.suppress(OSError):
                        status = Path(f"/proc/{pid}/status").read_text()
                        virtual = max(virtual, kilobytes(status, "VmPeak") << 10)
                        resident = max(resident, kilobytes(status, "VmHWM") << 10)
                        programs.add(Path(f"/proc/{pid}/exe").readlink().name)
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    for name in ("stdout", "stderr"):
        (cwd / name).unlink()
    return Watched(process.returncode, *texts, time.monotonic() - began, virtual, resident, frozenset(programs))


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def kilobytes(status: str, name: str) -> int:
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(name)), 0)


# ---- the nasty set, whole


@dataclass(frozen=True, slots=True)
class Run:
    """The nasty set, tokenized once under every watch."""

    watched: Watched
    baseline: Watched
    expected: dict[str, Any]
    folder: Path
    out: Path
    connections: int
    datagrams: int
    files_before: frozenset[str]
    files_after: frozenset[str]
    rows: dict[str, list[dict[str, Any]]]
    """Rows of the token file, by name of the shard."""
    failures: dict[str, list[dict[str, Any]]]
    commits: dict[str, Commit]
    given_up: dict[str, GivenUp]


def files_under(folder: Path) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def nasty(shared: Path, small_shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    source = shared / "data" / "nasty"
    expected = json.loads((source / "expected.json").read_text(encoding="utf-8"))
    # The working directory lies deep, so that names with ".." stay in sight of the test.
    top = tmp_path_factory.mktemp("nasty")
    folder = top / "a" / "b" / "work"
    folder.mkdir(parents=True)
    (folder / "bsqtok-canary.mp4").write_bytes(mp4(3, 12))
    (folder / "bsqtok-canary.ts").write_bytes(mp4(4, 12))
    # A stand-in for Ghostscript, which Pillow would start for EPS, and for ffmpeg.
    (top / "bin").mkdir()
    for program in ("gs", "ffmpeg", "ffprobe"):
        (top / "bin" / program).write_text(f"#!/bin/sh\ntouch '{top}/{program}-was-started'\n")
        (top / "bin" / program).chmod(0o755)
    environment = {"PATH": f"{top / 'bin'}:{os.environ['PATH']}"}
    common = ["--tokenizer", "stub", "--no-ray"]

    baseline = watch(
        ["tokenize", *map(str, small_shards[:3]), "--out", str(top / "clean"), *common], cwd=folder, env=environment
    )
    before = files_under(top)
    with (
        socket.create_server(("127.0.0.1", ANNOUNCED_PORTS["tcp"])) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", ANNOUNCED_PORTS["udp"]))
        shards = [str(source / name) for name in sorted(expected["shards"])]
        watched = watch(
            ["tokenize", *shards, "--out", "out", *common],
            cwd=folder,
            address_space=baseline.peak_virtual + MOST_EXTRA_MB * MB,
            env=environment,
        )
        tcp.setblocking(False)
        udp.setblocking(False)
        connections = count_arrivals(lambda: tcp.accept()[0].close())
        datagrams = count_arrivals(lambda: udp.recv(65536))

    out = folder / "out"
    storage = open_storage(str(out))
    plan = read_plan(storage, 0)
    names = {row["shard"]: row["url"].rpartition("/")[2] for row in plan.to_pylist()}
    ledger = read_ledger(storage, 0)
    commits = {names[shard]: commit for (shard, _), commit in ledger.commits.items()}

    def read(file: str) -> list[dict[str, Any]]:
        table = pq.read_table(out / file)
        table.validate(full=True)
        return table.to_pylist()

    return Run(
        watched=watched,
        baseline=baseline,
        expected=expected,
        folder=folder,
        out=out,
        connections=connections,
        datagrams=datagrams,
        files_before=before,
        files_after=files_under(top),
        rows={name: read(commit.file) for name, commit in commits.items()},
        failures={name: read(commit.failures.file) if commit.failures else [] for name, commit in commits.items()},
        commits=commits,
        given_up={names[shard]: record for shard, record in ledger.given_up.items()},
    )


def count_arrivals(receive: Any) -> int:
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            receive()
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case."""

    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    @property
    def word(self) -> str:
        if self.rows:
            return "ok and fail" if self.failed else "ok"
        return "fail" if self.failed else "absent"


def outcome(nasty: Run, case: dict[str, Any]) -> Outcome:
    shard = case["shard"]
    keys = {case["key"], *case.get("key_allowed", ())}
    if "key_bytes_hex" in case:
        keys = {printable(bytes.fromhex(case["key_bytes_hex"]))}
    rows = [row for row in nasty.rows.get(shard, ()) if row["key"] in keys]
    failed = [row for row in nasty.failures.get(shard, ()) if row["key"] in keys and row["severity"] == "failed"]
    if "occurrence" in case:
        places = sorted({row["position"] for row in rows + failed})
        place = places[case["occurrence"] - 1]
        rows, failed = ([row for row in part if row["position"] == place] for part in (rows, failed))
    return Outcome(rows, failed)


def problems(nasty: Run, case: dict[str, Any]) -> list[str]:
    """What is wrong with what became of a case."""
    found, is_now = [], outcome(nasty, case)
    # The picture of an interleaved key is tokenized, and its caption, which comes later, is listed.
    split = "caption_if_joined" in case
    if is_now.word == "absent":
        reported = case["shard"] in nasty.given_up or nasty.commits[case["shard"]].partial
        # What lies behind the damage of an archive cannot be listed; the archive itself is.
        behind_damage = case.get("may_be_absent") or "read" in case.get("fail", {}).get("stage", ())
        return [] if reported and behind_damage and case["expect"] != "ok" else ["vanished"]
    if case["expect"] == "ok" and not is_now.rows:
        found.append(f"failed: {is_now.failed}")
    if case["expect"] == "ok" and is_now.failed and not split:
        found.append(f"failed besides: {is_now.failed}")
    if case["expect"] == "fail" and is_now.rows:
        found.append("tokenized")
    for row in is_now.failed:
        if not split and row["stage"] not in case["fail"]["stage"]:
            found.append(f"stage {row['stage']}, expected {case['fail']['stage']}")
        if len(row["message"]) < 20 or not row["message"].endswith(".") or "\n" in row["message"]:
            found.append(f"not a message for people: {row['message']!r}")
    ok = case.get("ok", {})
    sizes = ok.get("sizes_allowed") or [ok.get("display_size") or ok.get("size")]
    sizes_now = [[row["width"], row["height"]] for row in is_now.rows]
    return found + [f"size {size}, expected {sizes}" for size in sizes_now if sizes != [None] and size not in sizes]


@pytest.mark.shared
def test_every_nasty_case_is_tokenized_or_in_a_failure_table_as_expected(
    nasty: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    table: Counter[tuple[str, str, str]] = Counter()
    wrong = {}
    for case in nasty.expected["cases"]:
        theme = nasty.expected["shards"][case["shard"]]["theme"]
        table[theme, case["expect"], outcome(nasty, case).word] += 1
        if found := problems(nasty, case):
            wrong[case["shard"], case["key"]] = found
    for name, shard in nasty.expected["shards"].items():
        table["archives", shard["expect"], archive_outcome(nasty, name)] += 1
    bulk = nasty.expected["shards"]["many-members.tar"]["bulk"]
    failed = {row["key"]: row for row in nasty.failures["many-members.tar"]}
    for number in range(bulk["count"]):
        row = failed.get(bulk["pattern"] % number)
        table["bulk", bulk["expect"], "fail" if row else "absent"] += 1
        assert row is not None and row["stage"] in bulk["fail"]["stage"]
    with capsys.disabled():
        print()
        for (theme, expect, word), count in sorted(table.items()):
            print(f"  {theme:9} expected {expect:7} was {word:12} {count:5}")
        watched, baseline = nasty.watched, nasty.baseline
        print(
            f"  {watched.seconds:.0f} s; peak resident {watched.peak_resident / MB:,.0f} MB "
            f"(clean corpus {baseline.peak_resident / MB:,.0f}), address space {watched.peak_virtual / MB:,.0f} MB "
            f"of {baseline.peak_virtual / MB + MOST_EXTRA_MB:,.0f} allowed"
        )
    assert wrong == {}
    assert len(nasty.expected["cases"]) == 286


def archive_outcome(nasty: Run, name: str) -> str:
    if name in nasty.given_up:
        return "fail"
    return "fail" if any(row["key"] is None for row in nasty.failures[name]) else "ok"


@pytest.mark.shared
def test_every_damaged_archive_is_reported_and_no_good_one_is(nasty: Run) -> None:
    for name, shard in nasty.expected["shards"].items():
        is_now = archive_outcome(nasty, name)
        assert shard["expect"] in (is_now, "either"), name
        if name in nasty.commits:
            assert nasty.commits[name].partial == (is_now == "fail"), name
        stages = [row["stage"] for row in nasty.failures.get(name, ()) if row["key"] is None]
        assert stages in ([], ["read"]), name
    assert set(nasty.commits) | set(nasty.given_up) == set(nasty.expected["shards"])
    assert {record.error for record in nasty.given_up.values()} == {"NotATar"}


@pytest.mark.shared
def test_tokenized_and_failed_samples_add_up_and_none_is_counted_twice(nasty: Run) -> None:
    for name, commit in nasty.commits.items():
        tokenized = {row["position"]: row["key"] for row in nasty.rows[name]}
        failed = {
            row["position"]: row["key"]
            for row in nasty.failures[name]
            if row["severity"] == "failed" and row["key"] is not None
        }
        assert tokenized.keys() | failed.keys() == set(range(commit.samples)), name
        assert commit.failed == len(failed), name
        assert commit.rows == len(nasty.rows[name]), name
        # A video that breaks off has its good clips in one table and the first bad one in the other.
        for position in tokenized.keys() & failed.keys():
            rows = [row for row in nasty.failures[name] if row["position"] == position and row["severity"] == "failed"]
            assert all(row["clip"] is not None and row["clip"] > 0 for row in rows), (name, rows)
        places = [(row["position"], row["clip"], row["view"]) for row in nasty.rows[name]]
        assert places == sorted(set(places)), name


@pytest.mark.shared
def test_an_independent_reader_counts_the_same_samples_in_good_archives(shared: Path, nasty: Run) -> None:
    for name, shard in nasty.expected["shards"].items():
        if shard["expect"] != "ok":
            continue
        path = shared / "data" / "nasty" / name
        data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        runs: list[str] = []
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            for entry in archive:
                parts = split_name(printable(entry.name)) if not entry.isdir() else None
                if parts is not None and (not runs or runs[-1] != parts[0]):
                    runs.append(parts[0])
        assert nasty.commits[name].samples == len(runs), name


@pytest.mark.shared
def test_the_job_ends_by_itself_and_shows_nobody_a_traceback(nasty: Run) -> None:
    assert nasty.baseline.exit_code == 0, nasty.baseline.stderr
    assert nasty.watched.exit_code == 3, nasty.watched.stderr
    for text in (nasty.watched.stdout, nasty.watched.stderr):
        assert "Traceback" not in text and "Error(" not in text
    assert "worker" not in nasty.watched.stderr, "no worker was lost on the way"
    assert "Traceback" not in (nasty.out / "logs" / "workers.log").read_text()
    assert not (nasty.out / "lease.json").exists()
    assert temporaries(nasty.out) == []


@pytest.mark.shared
def test_memory_stays_bounded_whatever_headers_claim(nasty: Run) -> None:
    assert nasty.watched.peak_virtual <= nasty.baseline.peak_virtual + MOST_EXTRA_MB * MB
    assert nasty.watched.peak_resident <= nasty.baseline.peak_resident + MOST_EXTRA_MB * MB


@pytest.mark.shared
def test_nothing_appears_outside_the_output_and_nothing_is_started_or_contacted(nasty: Run) -> None:
    outside = {name for name in nasty.files_after - nasty.files_before if not name.startswith("a/b/work/out")}
    assert outside == set()
    assert not Path("/abs/evil.jpg").exists()
    kept = {path.name for path in nasty.out.rglob("*") if path.is_file()}
    assert not any("evil" in name or name.endswith((".jpg", ".mp4", ".txt")) for name in kept)
    assert all(stat.S_ISREG(path.lstat().st_mode) or path.is_dir() for path in nasty.out.rglob("*"))
    assert all(name.startswith("python") for name in nasty.watched.programs), nasty.watched.programs
    assert (nasty.connections, nasty.datagrams) == (0, 0)


@pytest.mark.shared
def test_what_was_written_reads_back_as_valid_text_and_json(nasty: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    texts = num_json = 0
    for name, rows in nasty.rows.items():
        for row in rows:
            assert row["key"].encode("utf-8")
            assert row["caption"] is None or row["caption"].encode("utf-8") is not None
            texts += row["caption"] is not None
            if row["metadata"] is not None:
                json.loads(row["metadata"], parse_constant=refuse)
                num_json += 1
            assert row["label"] is None or -(2**63) <= row["label"] < 2**63
        for row in nasty.failures[name]:
            assert row["message"].encode("utf-8") and (row["key"] or "").encode("utf-8") is not None
    assert texts > 100 and num_json > 0
