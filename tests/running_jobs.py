"""Jobs that run beside a test, stand still at a step, are killed and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_corpus import BSQ, bsq_environment

PATIENCE_SECONDS = 120.0
STUB = ["--tokenizer", "stub", "--size", "64"]


@dataclass
class RunningJob:
    """A `bsq` command in a process group of its own."""

    process: subprocess.Popen[bytes]
    markers: Path
    """Where processes that stand at a step say so."""
    outputs: tuple[Path, Path]
    """Files that take its stdout and stderr."""

    @property
    def said(self) -> tuple[str, str]:
        """What it has written to stdout and stderr."""
        stdout, stderr = (path.read_text() for path in self.outputs)
        return stdout, stderr

    @property
    def pid(self) -> int:
        """The driver's."""
        return self.process.pid

    def standing(self) -> set[int]:
        """Processes that stand at the step now."""
        return {int(marker.suffix[1:]) for marker in self.markers.iterdir()}

    def wait_until_standing(self, count: int = 1) -> list[int]:
        """Wait until so many processes stand at the step; return their pids, ascending."""
        wait_until(lambda: len(self.standing()) >= count, f"{count} processes stand at the step", self)
        return sorted(self.standing())

    def let_go(self, pid: int | None = None) -> None:
        """Let one process go on, or all that stand now."""
        for marker in self.markers.glob("*" if pid is None else f"*.{pid}"):
            marker.unlink(missing_ok=True)

    def end(self, *, letting_go: bool = True) -> int:
        """Wait for the end, letting everybody go on who comes to the step; return the exit code."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the job does not end"
            if letting_go:
                self.let_go()
            time.sleep(0.02)
        return self.process.returncode

    def kill(self, *pids: int) -> None:
        """SIGKILL the processes, or, where none is named, the driver and all of its group."""
        if pids:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def workers(self) -> set[int]:
        """Workers that are processes of this host, up or not."""
        return {pid for pid in descendants(self.pid) if b"spawn_main" in command_line(pid)}

    def decoders(self) -> set[int]:
        """Children of workers that decode."""
        return {pid for pid in descendants(self.pid) if b"decoder_process" in command_line(pid)}


StartJob = Callable[..., RunningJob]


def start_jobs(folder: Path) -> Iterator[StartJob]:
    """Body of a fixture that begins jobs: whatever they start is gone when the test ends."""
    jobs: list[RunningJob] = []

    def start(*arguments: object, hold_at: str = "", faults: Sequence[str] = ()) -> RunningJob:
        """Run `bsq` with `arguments`, standing still at the step `hold_at`, with decoders that fail as `faults` say."""
        markers = folder / f"markers-{len(jobs)}"
        markers.mkdir()
        settings = {"BSQTOK_HOLD_AT": f"{hold_at}:{markers}", "BSQTOK_DECODE_FAULT": ",".join(faults)}
        outputs = folder / f"stdout-{len(jobs)}", folder / f"stderr-{len(jobs)}"
        with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
            process = subprocess.Popen(
                [*BSQ, *map(str, arguments)],
                env=bsq_environment(settings),
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        jobs.append(RunningJob(process, markers, outputs))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.returncode is None or job.process.returncode < 0:
            # A process that is held outlives a driver that was killed.
            for pid in descendants(job.pid):
                signal_quietly(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        job.process.wait()


def signal_quietly(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; return whether there was somebody to take it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, job: RunningJob | None = None) -> None:
    """Wait for `condition`, which a job that runs on is to bring about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        assert job is None or job.process.poll() is None, (f"the job ended before {what}", job.end(), job.said)
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """Processes that descend from `pid`."""
    found: set[int] = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = {int(child) for child in listing.read_text().split()}
        except OSError:
            continue
        found |= children.union(*(descendants(child) for child in children))
    return found


def command_line(pid: int) -> bytes:
    """What a process was started as; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
