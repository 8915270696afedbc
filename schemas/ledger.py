"""Records of the ledger and the names of its segments."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from schemas.errors import BsqError

SEGMENT_DIGITS = 9
_KIND = re.compile(rb'\{"kind":"(\w+)"')
_SEGMENT = re.compile(r"^(\d{9})(?:-(\d{9}))?\.jsonl$")


class _Record(BaseModel):
    # A reader of a later minor version's ledger must not choke on a field that it does not know.
    model_config = ConfigDict(extra="ignore", frozen=True)

    def to_line(self) -> str:
        """One line of JSON without its line feed."""
        return self.model_dump_json()


class FileRecord(_Record):
    """A published file."""

    file: str
    """Name relative to the dataset."""
    bytes: int
    sha256: str


class SourceRecord(_Record):
    """The object that was read."""

    bytes: int
    etag: str = ""
    num_retries: int = 0
    """Requests that had to be repeated."""


class StageSeconds(_Record):
    """Seconds that a shard spent in each stage, summed over threads; `wall` from its first byte to its file."""

    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    wall: float = 0.0


class Commit(_Record):
    """A shard is tokenized.  Holds all that the manifest needs, so that no footer is opened to write it."""

    kind: Literal["commit"] = "commit"
    shard: int
    part: int = 0
    attempt: int
    file: str
    bytes: int
    sha256: str
    rows: int
    tokens: int
    samples: int
    failed: int
    warnings: int
    poison: int = 0
    """Those of `failed` that ended or hung their decoder."""
    partial: bool
    min_frames: int
    max_frames: int
    min_key: str | None
    max_key: str | None
    row_groups: list[int]
    tokens_offset: list[int]
    failures: FileRecord | None = None
    source: SourceRecord
    arithmetic: str
    seconds: StageSeconds = StageSeconds()
    worker: str
    at: str


class Attempt(_Record):
    """An attempt at a shard that failed."""

    kind: Literal["attempt"] = "attempt"
    shard: int
    attempt: int
    stage: str
    error: str
    message: str
    keys_in_flight: list[str] = []
    counts: bool = True
    """False for what is not the shard's fault: a lost node, a preemption."""
    worker: str
    at: str


class GivenUp(_Record):
    """A shard is given up in this generation."""

    kind: Literal["failed"] = "failed"
    shard: int
    attempts: int
    error: str
    message: str
    at: str


class Arithmetic(_Record):
    """What computed the bits: named by a short id in commit records."""

    kind: Literal["arithmetic"] = "arithmetic"
    id: str
    value: dict[str, Any]


class Summary(_Record):
    """First line of a merged segment: how many records of each kind follow."""

    kind: Literal["summary"] = "summary"
    counts: dict[str, int]


Record = Annotated[Commit | Attempt | GivenUp | Arithmetic | Summary, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[Commit | Attempt | GivenUp | Arithmetic | Summary] = TypeAdapter(Record)


def parse_lines(data: bytes, *, name: str) -> Iterable[Commit | Attempt | GivenUp | Arithmetic | Summary]:
    """Parse the records of a segment.  Raises BsqError naming segment and line when one is damaged."""
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        try:
            yield _ADAPTER.validate_json(line)
        except ValidationError as error:
            raise BsqError(
                f"{name}, line {number}: not a ledger record. The segment was changed after it was written; "
                f"restore it from a copy, or tokenize into another folder."
            ) from error


def merge_segments(parts: Iterable[bytes]) -> bytes:
    """Join segments, in order, into one that begins with a summary of what it holds.

    Records of a part that has a summary itself are passed on unread."""
    counts: Counter[str] = Counter()
    bodies = []
    for part in parts:
        first, _, rest = part.partition(b"\n")
        if first.startswith(b'{"kind":"summary"'):
            counts.update(Summary.model_validate_json(first).counts)
            bodies.append(rest)
        else:
            lines = [line for line in part.splitlines() if line.strip()]
            counts.update(map(_kind, lines))
            bodies.append(b"".join(line + b"\n" for line in lines))
    summary = Summary(counts=dict(sorted(counts.items())))
    return b"".join([summary.to_line().encode(), b"\n", *bodies])


def _kind(line: bytes) -> str:
    match = _KIND.match(line)
    kind: str = match[1].decode() if match else json.loads(line)["kind"]
    return kind


def segment_name(first: int, last: int | None = None) -> str:
    """File name of segment `first`, or of the merged segment that holds `first` to `last`."""
    if last is None or last == first:
        return f"{first:0{SEGMENT_DIGITS}d}.jsonl"
    return f"{first:0{SEGMENT_DIGITS}d}-{last:0{SEGMENT_DIGITS}d}.jsonl"


def segment_range(name: str) -> tuple[int, int] | None:
    """First and last segment number that the file `name` holds; None when it is no segment."""
    match = _SEGMENT.match(name)
    if match is None:
        return None
    first = int(match[1])
    return first, int(match[2]) if match[2] else first
