"""What a committed shard lacks, so that a retry makes that and nothing else.

Its failed samples are recognised by position and key.  Samples that have their rows are passed over, and their keys are
compared on the way: a shard that was made anew holds other samples, and rows of both must not mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.credentials import printable_url
from pipeline.messages import EarlierParts
from pipeline.parquet import PARQUET_ERRORS, read_parquet
from pipeline.sample import Sample
from pipeline.storage import Storage
from schemas.errors import BsqError, SampleCutOff, ShardDiffers, printable
from schemas.failures import POISON, Failure, bounded_name, parse_failures


@dataclass(slots=True)
class MissingSamples:
    """The samples of a shard that have no row, or not all of them."""

    url: str
    """Of the shard, without credentials."""
    num_samples: int
    """Samples of the shard that its rows and failures speak of."""
    with_rest: bool
    """Whether what comes after them is missing too: the rest of an archive that was damaged."""
    failures: list[Failure]
    """What the shard's failure table says until now."""
    failed: dict[int, Failure] = field(default_factory=dict)
    """A failure of each failed sample, by position."""
    keys: dict[int, str] = field(default_factory=dict)
    """The key of each sample that has rows, by position."""
    clips: set[tuple[int, int]] = field(default_factory=set)
    """Position and number of the clips that failed samples have all the same."""

    @property
    def was_damaged(self) -> bool:
        """Whether the archive was damaged when the shard was committed."""
        return any(item.key is None for item in self.failures)

    def is_past_end(self, position: int) -> bool:
        """Whether the sample lies in the rest of a damaged archive, and that is not asked for."""
        return self.was_damaged and not self.with_rest and position >= self.num_samples

    def wants(self, sample: Sample) -> bool:
        """Whether rows of the sample are missing.  Raises ShardDiffers when it is not the sample that it was."""
        position = sample.position
        if position >= self.num_samples:
            if not self.was_damaged:
                raise self._differs(f"it has more samples than the {self.num_samples:,} that it had")
            return True
        failure = self.failed.get(position)
        if failure is not None and failure.error == SampleCutOff.__name__:
            # Where the archive broke off, the key was a guess from what was left of a header.
            return True
        before = failure.key if failure is not None else self.keys.get(position)
        key = bounded_name(sample.key) if failure is not None else printable(sample.key)
        if before is not None and before != key:
            raise self._differs(f"sample {position:,} has the key {key!r} and had {before!r}")
        return failure is not None

    def has_clip(self, position: int, clip: int) -> bool:
        """Whether all views of a clip are committed: a video keeps the clips before the one at which it failed."""
        return (position, clip) in self.clips

    def check_end(self, num_samples: int) -> None:
        """Raise ShardDiffers when the shard has ended before all the samples that it had."""
        if num_samples < self.num_samples:
            raise self._differs(f"it ends after {num_samples:,} samples and had {self.num_samples:,}")

    @property
    def poison_keys(self) -> frozenset[str]:
        """Keys of samples that ended or hung their decoder."""
        return frozenset(item.key for item in self.failed.values() if item.error in POISON and item.key is not None)

    def kept_failures(self) -> list[Failure]:
        """What stays true of samples that are not made again: their warnings."""
        return [item for item in self.failures if item.key is not None and item.position not in self.failed]

    def archive_failures(self) -> list[Failure]:
        """What the failure table says of the archive itself."""
        return [item for item in self.failures if item.key is None]

    def _differs(self, what: str) -> ShardDiffers:
        return ShardDiffers(
            f"{self.url}: this is not the shard that was tokenized: {what}. Put that one back and retry, or add this "
            f"one under a URL of its own with `bsq tokenize --append`."
        )


def find_missing(storage: Storage, url: str, earlier: EarlierParts) -> MissingSamples:
    """Read from the files of a shard what it lacks.  Raises BsqError when one of them cannot be read."""
    failures = parse_failures(_read(storage, earlier.failures)) if earlier.failures is not None else []
    missing = MissingSamples(printable_url(url), earlier.samples, earlier.with_rest, failures)
    for failure in failures:
        if failure.key is not None and failure.severity == "failed" and failure.position is not None:
            missing.failed[failure.position] = failure
    for name in earlier.files:
        table = _read(storage, name, ["position", "clip", "key"])
        positions, clips, keys = (table[column].to_pylist() for column in ("position", "clip", "key"))
        missing.keys.update(zip(positions, keys, strict=True))
        missing.clips.update(pair for pair in zip(positions, clips, strict=True) if pair[0] in missing.failed)
    return missing


def _read(storage: Storage, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return read_parquet(storage.read_bytes(name), columns)
    except (*PARQUET_ERRORS, FileNotFoundError) as error:
        raise BsqError(f"{storage.printable(name)}: it is gone or damaged. Run `bsq verify {storage.url}`.") from error
