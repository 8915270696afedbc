"""Kills of drivers, workers and decoders, at named steps and at random moments, and what must hold after each."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.publish import token_file_name
from pipeline.steps import BEGIN_STEPS, STEPS
from pipeline.storage import open_storage
from tests.faults.conftest import LENIENT
from tests.running_jobs import STUB, RunningJob, StartJob, is_alive, signal_quietly
from tests.tiny_corpus import dataset_files, temporaries

KILLS_OF_A_JOB = 6
CANDIDATE_SECONDS = 8.0
"""How long a kill waits for somebody to kill: not every job has children that decode."""
RANDOM = "at random"
SLOW = [f"slow:{100 * shard + 3:06d}" for shard in range(6)]
"""One sample of each shard takes its time, so that random moments strike while there is work."""


def state(out: Path) -> tuple[int, int, int, int]:
    """Token files, temporaries, ledger segments and manifests that lie there."""
    tokens = [path for path in (out / "tokens").rglob("*.parquet") if not path.name.startswith(".")]
    segments = [path for path in (out / "ledger").rglob("*.jsonl") if not path.name.startswith(".")]
    return len(tokens), len(temporaries(out)), len(segments), len(list((out / "manifest").glob("0000.json")))


def assert_consistent(out: Path, undisturbed: dict[str, str]) -> None:
    """What must hold at any moment: whatever can be read is whole, and is what an undisturbed job makes."""
    if not (out / "job.json").exists():
        return
    # Others may be at work, so temporaries come and go.
    files = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("tokens", "failures")
        for path in (out / folder).rglob("*.parquet")
    }
    assert files.items() <= undisturbed.items()
    ledger = read_ledger(open_storage(str(out)), 0)
    for (shard, part), commit in ledger.commits.items():
        assert commit.file == token_file_name(shard, part, commit.sha256)
        assert files[commit.file] == commit.sha256
        assert commit.failures is None or files[commit.failures.file] == commit.failures.sha256
    assert ledger.ignored == [], "nothing is committed twice"


def assert_whole(out: Path, undisturbed: dict[str, str]) -> None:
    """Everything that must hold once a job has ended, whatever happened to it."""
    assert dataset_files(out) == undisturbed
    assert temporaries(out) == []
    assert not (out / "lease.json").exists()
    storage = open_storage(str(out))
    ledger = read_ledger(storage, 0)
    manifest = read_manifest(storage)
    assert manifest is not None and manifest.summary.complete
    assert manifest.table["file"].to_pylist() == [ledger.commits[key].file for key in sorted(ledger.commits)]
    assert set(manifest.table["file"].to_pylist()) <= set(undisturbed)
    assert manifest.summary.rows == sum(manifest.table["rows"].to_pylist()) == 6 * 8 + 2
    assert (manifest.summary.samples, manifest.summary.failed) == (6 * 8 + 2 + 3, 3)


@dataclass
class KillMatrix:
    """Runs jobs and kills one after another of their processes, until so many kills have struck."""

    shards: list[Path]
    undisturbed: dict[str, str]
    folder: Path
    start: StartJob
    where: tuple[object, ...] = ("--no-ray", "--workers", 2)
    """Options that say who runs the workers."""
    victims: tuple[str, ...] = ("driver", "worker", "decoder", "everybody")
    """The last of them is the largest: what else goes with it when a machine does."""
    generator: random.Random = field(default_factory=lambda: random.Random(20))
    struck: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kills by victim and moment."""
    num_jobs: int = 0
    num_resumes: int = 0

    @property
    def num_struck(self) -> int:
        return self.struck.total()

    def run(self, num_kills: int) -> None:
        """Go on until so many kills have struck and the last job is whole."""
        while self.num_struck < num_kills:
            self._run_job(min(KILLS_OF_A_JOB, num_kills - self.num_struck))

    def table(self) -> str:
        """How many kills struck whom and when, in Markdown."""
        moments = [*STEPS, RANDOM]
        rows = [
            [moment, *(str(self.struck[victim, moment] or "") for victim in self.victims)]
            for moment in moments
            if any(self.struck[victim, moment] for victim in self.victims)
        ]
        rows.append(["all", *(str(sum(self.struck[victim, moment] for moment in moments)) for victim in self.victims)])
        lines = ["| moment | " + " | ".join(self.victims) + " |", "|---" * (len(self.victims) + 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        ends = f"{self.num_struck} kills in {self.num_jobs} jobs, which were resumed {self.num_resumes} times"
        return "\n".join([ends, "", *lines])

    def _run_job(self, num_kills: int) -> None:
        """Kill one job so many times, then let it end."""
        out = self.folder / f"out-{self.num_jobs}"
        self.num_jobs += 1
        contained = ["--set", "run.decode_processes=1"] if self.num_jobs % 3 == 0 else []
        settings = [*self.where, "--set", "run.max_attempts=99", *contained]
        begin = ["tokenize", *self.shards, "--out", out, *STUB, *LENIENT, *settings]
        num_left = num_kills
        while True:
            begun = (out / "job.json").exists()
            command = ["resume", out, *self.where] if begun else begin
            self.num_resumes += begun
            steps = [step for step in STEPS if not begun or step not in BEGIN_STEPS]
            # Half of the kills wait for a step; without any the job is let end.
            step = self.generator.choice(steps) if num_left and self.generator.random() < 0.5 else ""
            job = self.begin_job(command, step, SLOW if num_left else ())
            while num_left and job.process.poll() is None:
                if self._kill_once(job, step):
                    num_left -= 1
                    assert_consistent(out, self.undisturbed)
            if job.end() == 0:
                assert_whole(out, self.undisturbed)
                return
            assert job.process.returncode < 0, job.said

    def _kill_once(self, job: RunningJob, step: str) -> bool:
        """Kill somebody; False when nobody was there to be killed."""
        if step:
            held = self._wait_for_step(job)
            if held is None:
                return False
            moment = next(job.markers.glob(f"*.{held}"), Path(RANDOM)).stem
            # At a step it is the process that stands there, or everybody at once.
            victim = "driver" if held == job.pid else "worker"
            if self.generator.random() < 0.25:
                victim = self.victims[-1]
        else:
            moment, victim = RANDOM, self.generator.choice(self.victims)
            held = self._choose(job, victim)
            if held is None:
                return False
        if job.process.poll() is not None:
            return False
        if not self.kill(job, victim, held):
            return False
        self.struck[victim, moment] += 1
        if victim == "driver":
            # Workers end by themselves; one that stands at a step does too.
            job.process.wait()
            job.kill()
        return True

    def begin_job(self, command: Sequence[object], step: str, faults: Sequence[str]) -> RunningJob:
        """Start a job whose processes stand still at `step`, if it names one."""
        return self.start(*command, hold_at=step, faults=faults)

    def candidates(self, job: RunningJob, victim: str) -> set[int]:
        """Processes of that kind that are alive."""
        if victim == "worker":
            return job.workers()
        return job.decoders() if victim == "decoder" else {job.pid}

    def kill(self, job: RunningJob, victim: str, held: int) -> bool:
        """Kill the process `held`, or all that `victim` stands for; return whether somebody was there."""
        if victim == "everybody":
            job.kill()
            return True
        if not signal_quietly(held):
            return False
        while is_alive(held):
            time.sleep(0.01)
        job.let_go(held)
        return True

    def _choose(self, job: RunningJob, victim: str) -> int | None:
        """Somebody of that kind, a random while after the first of them has come up."""
        deadline = time.monotonic() + CANDIDATE_SECONDS
        while not self.candidates(job, victim):
            if job.process.poll() is not None or time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        time.sleep(self.generator.uniform(0.0, 3.0))
        candidates = self.candidates(job, victim)
        return self.generator.choice(sorted(candidates)) if candidates else None

    def _wait_for_step(self, job: RunningJob) -> int | None:
        while job.process.poll() is None:
            if standing := job.standing():
                return min(standing)
            time.sleep(0.02)
        return None
