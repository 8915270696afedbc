"""`bsq report`: one self-contained page about a dataset, finished or not.

Everything comes from plans, ledgers and the manifest, and from a bounded, seeded sample: MAX_FILES row groups of
tokens, MAX_TABLES failure tables, a dozen rows that are decoded and read again from their sources.  No file is listed
or opened for each shard, so a dataset of a million shards costs a pass over its ledger and a few hundred reads.

The page runs no script and loads nothing: its own policy forbids both.  Every string that came from data or storage
is made printable, stripped of credentials, shortened and escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

import jinja2
from markupsafe import Markup

from jobs.begin import created_by
from jobs.commit_table import CommitTable, column_sum, read_commit_table
from jobs.display import describe_bytes
from jobs.existing_job import existing_job
from jobs.lease import is_dead, read_lease
from jobs.report import charts, words
from jobs.report.drift import Usage, measure_usage
from jobs.report.failures import Failures, collect_failures
from jobs.report.findings import Finding, find
from jobs.report.pictures import Pictures, make_pictures
from jobs.report.speed import Speed, measure_speed
from pipeline.credentials import printable_url
from pipeline.storage import Storage, open_storage
from schemas.errors import SpecError
from schemas.job import Job

LEAST_RATE_BINS = 4
"""Fewer are no curve."""


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written."""

    url: str
    findings: list[Finding]
    bytes: int

    def describe(self) -> str:
        """A few lines for people."""
        lines = [f"Wrote {self.url} ({describe_bytes(self.bytes)})."]
        if not self.findings:
            return f"{lines[0]} Nothing stands out."
        lines += [f"- {finding.line()}" for finding in self.findings]
        return "\n".join(lines)


def write_report(out: str, target: str, *, seed: int = 0, storage_options: Mapping[str, Any] | None = None) -> Report:
    """Write the page about the dataset at `out` to `target`, a path or URL, replacing what is there.

    The same seed looks at the same rows.  Raises SpecError when there is no dataset or `target` is a folder, BsqError
    when job.json, a plan or the ledger is damaged; token files and failure tables that cannot be read are findings."""
    if target.endswith("/") or not PurePosixPath(target).name:
        raise SpecError(f"{printable_url(target)}: this is a folder. Name the file to write, such as report.html.")
    storage = open_storage(out, storage_options)
    job = existing_job(storage)
    commits = read_commit_table(storage)
    state = _state(storage, commits)
    speed = measure_speed(commits, job.tokenizer.grid[0] * job.tokenizer.grid[1])
    failures = collect_failures(storage, commits, seed)
    usage = measure_usage(storage, job, commits, seed)
    pictures = make_pictures(storage, job, commits, [each.shard for each in usage.drifting], seed, storage_options)
    findings = find(job, commits, speed, failures, usage, state)
    page = _render(storage, job, commits, state, speed, failures, usage, pictures, findings, seed)
    data = page.encode("utf-8", "backslashreplace")
    folder, _, name = target.rpartition("/") if "/" in target else (".", "", target)
    place = open_storage(folder or "/", storage_options if "://" in target else None)
    place.publish(name, data)
    return Report(printable_url(target), findings, len(data))


def _state(storage: Storage, commits: CommitTable) -> str:
    """running, interrupted, complete, or incomplete (finished, but shards failed), as `bsq status` has it."""
    held = read_lease(storage)
    if held is not None:
        lease, age_seconds = held
        if age_seconds < lease.ttl_seconds and not is_dead(lease):
            return "running"
    if not commits.finished:
        return "interrupted"
    return "incomplete" if commits.given_up else "complete"


def _render(
    storage: Storage,
    job: Job,
    commits: CommitTable,
    state: str,
    speed: Speed,
    failures: Failures,
    usage: Usage,
    pictures: Pictures,
    findings: list[Finding],
    seed: int,
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "text": words.text,
        "count": words.count,
        "short": words.short,
        "percent": words.percent,
        "seconds": words.seconds,
        "times": words.times,
        "moment": words.moment,
        "bytes": describe_bytes,
    }
    rate = speed.rate
    drawn = {
        "rate": charts.rate_chart(rate) if rate and len(rate.per_second) >= LEAST_RATE_BINS else "",
        "shards": charts.shard_chart(speed) if len(speed.shards) else "",
        "channels": charts.channel_chart(usage, usage.drifting) if usage.rows else "",
        "codes": [(piece, charts.code_chart(piece)) for piece in usage.pieces] if usage.rows else [],
        "drift": charts.drift_chart(usage) if usage.comparable else "",
    }
    here = files("jobs.report")
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        css=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        name=PurePosixPath(storage.url.rstrip("/")).name or storage.url,
        url=storage.url,
        state=state,
        tokenizer=_describe_tokenizer(job),
        rate=rate,
        speed=speed,
        failures=failures,
        usage=usage,
        pictures=pictures,
        findings=findings,
        charts=drawn,
        totals=_totals(job, commits, speed),
        bits=job.tokenizer.bits,
        facts=_facts(job, commits),
        written=time.time(),
        created_by=created_by(),
        cost=_describe_cost(commits, failures, usage, pictures, seed),
        infinity=math.inf,
    )


def _totals(job: Job, commits: CommitTable, speed: Speed) -> dict[str, float]:
    tokens, num_bytes = column_sum(commits.table, "tokens"), column_sum(commits.table, "bytes")
    pixels = tokens * job.tokenizer.patch_size**2
    rate = speed.rate
    spread = float((rate.per_second * (rate.edges[1:] - rate.edges[:-1])).sum()) if rate else 0.0
    return {
        "tokens": tokens,
        "rows": column_sum(commits.table, "rows"),
        "bytes": num_bytes,
        "bits_per_pixel": num_bytes * 8 / pixels if pixels else 0.0,
        "shards": len(commits.plan),
        "committed": int((commits.column("part") == 0).sum()),
        "samples_per_second": spread / rate.working_seconds if rate and rate.working_seconds else 0.0,
    }


def _describe_tokenizer(job: Job) -> str:
    tokenizer = job.tokenizer
    rows, columns = tokenizer.grid
    name = tokenizer.config.get("preset", tokenizer.name)
    size = f"{columns * tokenizer.patch_size} × {rows * tokenizer.patch_size} px"
    return f"{name}: {rows} × {columns} tokens of {tokenizer.bits} bits for each frame of {size}"


def _facts(job: Job, commits: CommitTable) -> list[tuple[str, str]]:
    spec, preprocess, clips = job.spec, job.spec.preprocess, job.spec.clips
    arithmetic = commits.table["arithmetic"].value_counts().to_pylist()
    facts = [
        ("Tokenizer", f"{job.tokenizer.name}, weights {job.tokenizer.weight_sha256[:16]}"),
        (
            "Shards",
            ", ".join(spec.shards[:4]) + (f" and {len(spec.shards) - 4:,} more" if len(spec.shards) > 4 else ""),
        ),
        (
            "Frames",
            f"{preprocess.crop} crop to {preprocess.size} px, {preprocess.filter} ({preprocess.engine}), "
            f"{words.count(preprocess.views, 'view')}",
        ),
        (
            "Clips",
            f"{clips.clip_frames} frames at {clips.fps} fps, one every {clips.stride}; short ones: {clips.short_clips}",
        ),
        ("Carried", ", ".join(spec.carry) or "nothing"),
        ("Generations", str(len(commits.generations))),
        ("Fingerprint", job.fingerprint),
        ("Made by", job.created_by),
    ]
    for used in arithmetic:
        value = commits.arithmetic.get(used["values"], {})
        described = ", ".join(f"{name} {each}" for name, each in sorted(value.items())) or "not recorded"
        facts.append(("Arithmetic", f"{used['values']}, {words.count(used['counts'], 'file')}: {described}"))
    return facts


def _describe_cost(commits: CommitTable, failures: Failures, usage: Usage, pictures: Pictures, seed: int) -> str:
    tables = f"{words.count(failures.tables_read)} of {words.count(failures.tables, 'failure table')}"
    read = f"{words.count(usage.files)} of {words.count(usage.all_files, 'token file')}"
    decoded = words.count(len(pictures.pairs), "row")
    return (
        f"{words.count(len(commits.generations), 'plan')}, {words.count(commits.num_segments, 'ledger segment')}, "
        f"{tables}, one row group each of {read} ({describe_bytes(usage.bytes_read)}), and {decoded} to decode; "
        f"rows by chance, seed {seed}."
    )
