"""How a job ended: an exit code, and what a person should know, the remedy last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.display import counted
from pipeline.dataset_files import LedgerState
from schemas.lease import Progress
from schemas.manifest import ManifestSummary

SHOWN_SHARDS = 5


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended."""

    exit_code: int
    progress: Progress
    lines: list[str]
    """What a person should know, the remedy last."""


def describe_outcome(
    progress: Progress,
    ledger: LedgerState,
    summary: ManifestSummary,
    before: ManifestSummary | None,
    *,
    max_failed_fraction: float,
    retry_command: Callable[[str], str],
) -> JobOutcome:
    """Sum up a finished generation: exit code 3 when shards of the dataset failed or are partial, or too large a share
    of its samples failed.

    `ledger` is that of the generation, `summary` its manifest's and `before` that of the generation before; the
    command that tries again is `retry_command` of its switch, or of nothing for whole shards."""
    lines = [
        f"shard {shard} failed ({record.error}): {record.message}"
        for shard, record in sorted(ledger.given_up.items())[:SHOWN_SHARDS]
    ]
    if len(ledger.given_up) > SHOWN_SHARDS:
        lines.append(f"... and {len(ledger.given_up) - SHOWN_SHARDS} more shards failed.")
    if before is not None:
        shards, rows = counted(summary.files - summary.parts, "shard"), counted(summary.rows, "row")
        more = summary.rows - before.rows
        lines.append(
            f"Generation {summary.generation}: the dataset now has {shards} and {rows}, {more:,} more than before."
        )
        if summary.failed_shards:
            lines.append(f"Still missing: {counted(summary.failed_shards, 'shard')} that failed.")
    if summary.partial_shards:
        lines.append(f"Of {counted(summary.partial_shards, 'damaged shard')} only what could be read is committed.")
    fraction = summary.failed / summary.samples if summary.samples else 0.0
    too_many = fraction > max_failed_fraction
    if summary.failed:
        lines.append(
            f"{summary.failed:,} of {summary.samples:,} samples failed ({fraction:.2%}"
            + (f", more than the {max_failed_fraction:.2%} allowed" if too_many else "")
            + "); `bsq inspect` shows the commonest kinds; the tables in failures/ have all."
        )
    remedies = [
        (summary.failed_shards, "the failed shards", ""),
        (summary.failed, "the failed samples", "--samples"),
        (summary.partial_shards, "the rest of damaged shards", "--damaged"),
    ]
    lines += [
        f"Once the cause is gone, try {what} again with: {retry_command(switch)}"
        for count, what, switch in remedies
        if count
    ]
    bad = bool(ledger.given_up) or not summary.complete or summary.partial_shards > 0 or too_many
    return JobOutcome(3 if bad else 0, progress, lines)
