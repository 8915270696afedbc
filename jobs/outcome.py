"""How a job ended: an exit code, and what a person should know, the remedy last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        lines += _describe_change(summary, before, set(ledger.given_up))
    if summary.partial_shards:
        lines.append(f"{summary.partial_shards} damaged shards were committed as far as they could be read.")
    fraction = summary.failed / summary.samples if summary.samples else 0.0
    too_many = fraction > max_failed_fraction
    if summary.failed:
        lines.append(
            f"{summary.failed:,} of {summary.samples:,} samples failed ({fraction:.2%}"
            + (f", more than the {max_failed_fraction:.2%} allowed" if too_many else "")
            + "); `bsq inspect` shows the failure tables."
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


def _describe_change(summary: ManifestSummary, before: ManifestSummary, given_up: set[int]) -> list[str]:
    """What a later generation did to the dataset."""
    shards = summary.files - summary.parts
    lines = [
        f"Generation {summary.generation} of the dataset: {shards:,} shards, {summary.rows:,} rows "
        f"({summary.rows - before.rows:,} of them new), {summary.samples:,} samples."
    ]
    still = summary.failed_shards - len(given_up.intersection(summary.first_failed_shards))
    if still > 0 and not given_up:
        lines.append(f"{still:,} shards that failed in earlier generations are still missing.")
    return lines
