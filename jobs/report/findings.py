"""What in a dataset deserves a look, each in a sentence that names it, with the figure that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.commit_table import CommitTable
from jobs.display import describe_bytes
from jobs.report.drift import Usage
from jobs.report.failures import Failures
from jobs.report.speed import Speed
from jobs.report.words import count, percent, seconds, text, times
from schemas.failures import POISON
from schemas.job import Job

Level = Literal["bad", "warn", "note"]

MAX_CLASSES_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that deserves a look."""

    level: Level
    title: str
    detail: str
    section: str
    """Anchor of the section that shows more; empty for none."""

    def line(self) -> str:
        """For a terminal."""
        return f"{self.title}: {self.detail}"


def find(job: Job, commits: CommitTable, speed: Speed, failures: Failures, usage: Usage, state: str) -> list[Finding]:
    """Everything that deserves a look, the worst first."""
    found = [
        *_shard_findings(commits, failures, state),
        *_failure_findings(job, failures),
        *_usage_findings(usage),
        *_speed_findings(speed),
        *_file_findings(failures, usage),
        *_arithmetic_findings(commits),
    ]
    if not job.tokenizer.config.get("trained"):
        name = job.tokenizer.config.get("preset", job.tokenizer.name)
        detail = f"{text(name)} has random weights: its tokens are stored exactly, but what they decode to is noise."
        found.append(Finding("note", "The tokenizer was never trained", detail, "pictures"))
    return sorted(found, key=lambda each: ("bad", "warn", "note").index(each.level))


def _shard_findings(commits: CommitTable, failures: Failures, state: str) -> list[Finding]:
    found = []
    if failures.num_given_up:
        first = next(shard for shard in failures.tried if shard.given_up)
        reason = f": {text(first.messages[-1][2], 160)}" if first.messages else ""
        title = f"{count(failures.num_given_up, 'shard')} given up"
        detail = f"The first is shard {first.shard} after {count(first.attempts, 'attempt')}{reason}"
        found.append(Finding("bad", title, detail, "attempts"))
    if failures.num_partial:
        title = f"{count(failures.num_partial, 'shard')} with a damaged archive"
        shown = ", ".join(map(str, failures.partial[:5])) + (" and more" if failures.num_partial > 5 else "")
        detail = f"Only what lies before the damage was tokenized: shard{'s' * (failures.num_partial > 1)} {shown}."
        found.append(Finding("bad", title, detail, "failures"))
    left = len(commits.plan) - len(set(commits.column("shard").tolist())) - len(commits.given_up)
    if state not in ("complete", "incomplete") and left:
        what = "A driver is at work." if state == "running" else "Nobody is at work; `bsq resume` goes on."
        found.append(Finding("note", "Not finished", f"{count(left, 'shard')} still to be tokenized. {what}", ""))
    if failures.num_retried:
        commonest, number = failures.attempt_errors.most_common(1)[0]
        detail = f"Most often because of {commonest} ({count(number, 'attempt')}). They are all there now."
        found.append(
            Finding("note", f"{count(failures.num_retried, 'shard')} took several attempts", detail, "attempts")
        )
    return found


def _failure_findings(job: Job, failures: Failures) -> list[Finding]:
    found = []
    limit = job.spec.run.max_failed_fraction
    too_many = failures.failed > limit * failures.samples
    named = 0
    for each in failures.classes:
        if each.severity != "failed" or not failures.samples or named == MAX_CLASSES_NAMED:
            continue
        share = min(1.0, each.samples / failures.samples)
        # The commonest class is named, too, where only all together are too many.
        if share <= limit and each.error not in POISON and not (too_many and not named):
            continue
        named += 1
        about = "" if failures.exact else "about "
        where = f", most of them in shard {each.fullest_shard}" if each.fullest_samples > each.samples / 2 else ""
        detail = f"{about}{count(each.samples, 'sample')} ({text(each.stage, 20)}), {percent(share)} of all{where}."
        if each.examples:
            detail += f" The first: {text(each.examples[0].message, 160)}"
        found.append(Finding("bad", f"Samples fail with {text(each.error, 60)}", detail, "failures"))
    for shard in failures.lossy[:MAX_CLASSES_NAMED]:
        others = (failures.failed - shard.failed) / max(1, failures.samples - shard.samples)
        detail = f"{count(shard.failed)} of its {count(shard.samples, 'sample')} failed; elsewhere {percent(others)}."
        found.append(
            Finding("warn", f"Shard {shard.shard} loses {percent(shard.share)} of its samples", detail, "failures")
        )
    return found


def _usage_findings(usage: Usage) -> list[Finding]:
    found = []
    for each in usage.drifting[:MAX_CLASSES_NAMED]:
        detail = (
            f"Its tokens lie {times(each.score)} as far from the rest as chance would put them, the median shard "
            f"{times(usage.usual_score)}. Most in channel {each.channel}: {percent(each.ones_here)} ones here, "
            f"{percent(each.ones_elsewhere)} elsewhere."
        )
        found.append(Finding("warn", f"Shard {each.shard} drifts", detail, "tokens"))
    if len(usage.drifting) > MAX_CLASSES_NAMED:
        more = len(usage.drifting) - MAX_CLASSES_NAMED
        found.append(Finding("warn", f"{count(more, 'more shard')} drift", "The table below names them.", "tokens"))
    if usage.stuck:
        channels = ", ".join(map(str, usage.stuck[:8])) + (" and more" if len(usage.stuck) > 8 else "")
        detail = f"Channel{'s' * (len(usage.stuck) > 1)} {channels}: nearly the same bit in every token looked at."
        found.append(Finding("warn", f"{count(len(usage.stuck), 'channel')} hardly used", detail, "tokens"))
    return found


def _speed_findings(speed: Speed) -> list[Finding]:
    found = []
    for storage in [each for each in speed.storages if each.slow][:MAX_CLASSES_NAMED]:
        assert storage.elsewhere is not None
        detail = (
            f"It delivers {describe_bytes(storage.bytes_per_second)}/s, others {describe_bytes(storage.elsewhere)}/s. "
            f"Reading takes {percent(storage.read_share)} of the time of its {count(storage.shards, 'shard')}."
        )
        found.append(Finding("warn", f"Storage {text(storage.name, 120)} is slow", detail, "speed"))
    for shard in speed.slow_shards[:MAX_CLASSES_NAMED]:
        detail = (
            f"{seconds(shard.per_frame)} for a frame, {times(shard.factor)} the median; its {shard.stage} takes "
            f"{times(shard.stage_factor)} as long as usual."
        )
        found.append(Finding("warn", f"Shard {shard.shard} is slow", detail, "speed"))
    for worker in [each for each in speed.workers if each.slow][:MAX_CLASSES_NAMED] if len(speed.workers) > 1 else []:
        detail = (
            f"Decoding and encoding a frame takes it {times(worker.factor)} as long as the median worker, over "
            f"{count(worker.shards, 'shard')}."
        )
        found.append(Finding("warn", f"Worker {text(worker.name, 80)} is slow", detail, "speed"))
    return found


def _file_findings(failures: Failures, usage: Usage) -> list[Finding]:
    names = [*usage.unreadable, *failures.unreadable]
    if not names:
        return []
    detail = f"The first is {text(names[0])}. `bsq verify` says what is wrong with it."
    return [Finding("bad", f"{count(len(names), 'file')} gone or damaged", detail, "")]


def _arithmetic_findings(commits: CommitTable) -> list[Finding]:
    used = commits.table["arithmetic"].value_counts().to_pylist()
    if len(used) < 2:
        return []
    detail = ", ".join(f"{text(each['values'], 40)}: {count(each['counts'], 'file')}" for each in used[:5])
    return [Finding("note", f"{count(len(used))} kinds of arithmetic made the tokens", f"{detail}.", "made")]
