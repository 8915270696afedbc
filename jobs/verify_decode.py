"""Tokenizes rows of a dataset again, from their sources, and compares bits: does the data still give these tokens?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.arithmetic import describe_arithmetic
from jobs.commit_table import CommitTable, read_commit_table
from jobs.existing_job import existing_job
from jobs.originals import Frames, read_originals
from jobs.reconstruct import TokenDecoder, psnr
from jobs.sample_rows import choose_rows, read_rows
from pipeline.byte_stream import RetryPolicy
from pipeline.find_rows import FoundRow
from pipeline.storage import Storage, open_storage
from pipeline.stub import STUB_NAME
from schemas.errors import BsqError, InputError, SourceChanged
from schemas.job import Job

if TYPE_CHECKING:
    from pipeline.encode import Encoder

ROWS_AT_ONCE = 256
"""Rows whose tokens are in memory together."""
MOST_FLIPS = 0.05
"""Share of bits that another arithmetic may flip; more than this, and pixels, preprocessing or weights were others."""
RETRY = RetryPolicy(attempts=4)
"""Of a source: it is only looked at, and there are others."""


@dataclass(slots=True)
class Agreement:
    """Rows that one arithmetic made, against what their sources give now."""

    rows: int = 0
    equal: int = 0
    """Rows of which every bit is the same."""
    bits: int = 0
    flipped: int = 0
    decibels: list[float] = field(default_factory=list)
    """PSNR of each row's reconstruction; without those that equal their original, and empty for the stub."""

    @property
    def flip_rate(self) -> float:
        return self.flipped / self.bits if self.bits else 0.0


@dataclass(slots=True)
class Retokenization:
    """What came of tokenizing rows again."""

    arithmetic: dict[str, Any]
    """What computed the bits here."""
    made_with: dict[str, dict[str, Any]]
    """What computed those of the dataset, by id."""
    agreements: dict[str, Agreement] = field(default_factory=dict)
    """By the id of the arithmetic that made the rows."""
    chosen: int = 0
    seed: int = 0
    unreachable: Counter[str] = field(default_factory=Counter)
    """Rows whose source does not give their frames any more, by the class of the error."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first message of each class."""
    problems: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """Rows that were tokenized again."""
        return sum(each.rows for each in self.agreements.values())

    @property
    def ok(self) -> bool:
        """Whether the sources still give the tokens, as far as arithmetic allows."""
        return not self.problems

    def describe(self) -> str:
        """A few lines for people."""
        here = describe_arithmetic(self.arithmetic)
        lines = [f"Tokenized {self.compared:,} of {self.chosen:,} random rows again (seed {self.seed}), on {here}:"]
        for identifier, each in self.agreements.items():
            made = describe_arithmetic(self.made_with.get(identifier, {}))
            flips = f"{each.flipped:,} of {each.bits:,} bits flipped ({_share(each.flip_rate)})"
            lines.append(f"  made by {identifier} ({made}): {each.equal:,} of {each.rows:,} rows equal, {flips}")
            if each.decibels:
                mean, least = fmean(each.decibels), min(each.decibels)
                lines.append(f"    reconstructions: PSNR {mean:.2f} dB on average, the least {least:.2f} dB")
        for kind, rows in self.unreachable.most_common():
            first = ", the first because of " if rows > 1 else " because of "
            lines.append(f"  {_rows(rows)} not compared{first}{kind}: {self.examples[kind]}")
        lines += [f"- {problem}" for problem in self.problems]
        if self.chosen and not self.compared:
            lines.append("Nothing could be compared.")
        elif self.ok and self.compared:
            equal = all(each.flipped == 0 for each in self.agreements.values())
            same = "Every bit is the same." if equal else "The flips are few enough for another arithmetic."
            lines.append(same)
        return "\n".join(lines)


def retokenize(
    out: str,
    count: int,
    *,
    seed: int = 0,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Retokenization:
    """Read the sources of `count` random rows again, tokenize them as the job did, and compare every bit.

    Each row of the dataset is as likely as any; `seed` chooses which.  A row whose source is gone is counted with the
    reason.  Bits are the same where the arithmetic is (fp32 on a CPU); another device or version flips those of
    latents near zero.  `on_progress` is called with the rows done and the rows chosen.  Raises SpecError when there is
    no dataset or no such device, CheckpointError when its tokenizer is damaged."""
    from pipeline.encode import arithmetic_id

    storage = open_storage(out, storage_options)
    job = existing_job(storage)
    commits = read_commit_table(storage)
    recomputation = _Recomputation(storage, job, device, storage_options)
    chosen = choose_rows(commits, count, seed)
    here = recomputation.encoder.arithmetic()
    result = Retokenization(here, commits.arithmetic, chosen=len(chosen), seed=seed)
    done = 0
    for first in range(0, len(chosen), ROWS_AT_ONCE):
        part = chosen[first : first + ROWS_AT_ONCE]
        rows, makers = _read(storage, commits, part, result)
        for number, packed, original in recomputation.tokenize(rows, result):
            agreement = result.agreements.setdefault(makers[number], Agreement())
            _compare(agreement, rows[number], packed, job)
            decoded = recomputation.decode(rows[number])
            if decoded is not None and (decibels := psnr(original, decoded)) < math.inf:
                agreement.decibels.append(decibels)
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(chosen))
    exact = here.get("dtype") == "float32" and str(here.get("device", "")).startswith("cpu")
    for identifier, agreement in sorted(result.agreements.items()):
        if agreement.flipped and exact and identifier == arithmetic_id(here):
            result.problems.append(
                f"{_rows(agreement.rows - agreement.equal)} made by the same arithmetic differ: their sources or the "
                f"weights are not those that the tokens were made from"
            )
        elif agreement.flip_rate > MOST_FLIPS:
            result.problems.append(
                f"{_share(agreement.flip_rate)} of the bits made by {identifier} differ, more than another arithmetic "
                f"explains: their sources or the weights are not those that the tokens were made from"
            )
    return result


def _read(
    storage: Storage, commits: CommitTable, chosen: Sequence[tuple[int, int]], result: Retokenization
) -> tuple[list[FoundRow], list[str]]:
    """The chosen rows, and the id of the arithmetic that made each."""
    rows: list[FoundRow] = []
    makers: list[str] = []
    for number, wanted in groupby(chosen, key=lambda place: place[0]):
        try:
            found = list(read_rows(storage, commits, list(wanted)))
        except BsqError as error:
            result.problems.append(str(error))
            continue
        rows += found
        makers += [commits.table["arithmetic"][number].as_py()] * len(found)
    return rows, makers


def _compare(agreement: Agreement, row: FoundRow, packed: bytes, job: Job) -> None:
    stored = row.values["tokens"]
    grid_rows, grid_columns = job.tokenizer.grid
    agreement.rows += 1
    agreement.bits += row.values["frames"] * grid_rows * grid_columns * job.tokenizer.bits
    agreement.equal += stored == packed
    different = np.bitwise_xor(np.frombuffer(stored, np.uint8), np.frombuffer(packed, np.uint8))
    agreement.flipped += int(np.unpackbits(different).sum())


class _Recomputation:
    """The dataset's tokenizer in the arithmetic of its job, as far as this machine has it."""

    def __init__(
        self, storage: Storage, job: Job, device: str, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        import torch

        from pipeline.encode import batch_shapes, open_encoder

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() and job.spec.device != "cpu" else "cpu"
        spec = job.spec
        assert isinstance(spec.preprocess.size, int) and isinstance(spec.clips.clip_frames, int)
        self._job, self._options = job, storage_options
        self._shapes = dict(batch_shapes(spec.run.batch, spec.clips.clip_frames))
        self.encoder: Encoder = open_encoder(
            job.tokenizer,
            storage.url_of(job.tokenizer.folder),
            dtype=spec.dtype,
            device=device,
            num_cpus=1,
            shapes=list(self._shapes.items()),
            storage_options=dict(storage_options or {}),
        )
        is_stub = job.tokenizer.config.get("preset") == STUB_NAME
        self._decoder = None if is_stub else TokenDecoder(storage, job, storage_options)

    def decode(self, row: FoundRow) -> Frames | None:
        """What the stored tokens of a row decode to; None for the stub."""
        return self._decoder.frames(row) if self._decoder is not None else None

    def tokenize(self, rows: Sequence[FoundRow], result: Retokenization) -> Iterator[tuple[int, bytes, Frames]]:
        """Yield number, packed tokens and pixels of each row whose source can be read; count the others."""
        waiting: dict[int, list[tuple[int, Frames]]] = {frames: [] for frames in self._shapes}
        for number, original in read_originals(rows, self._job, self._options, retry=RETRY):
            num_frames = rows[number].values["frames"]
            if not isinstance(original, InputError) and len(original) != num_frames:
                key, url = rows[number].values["key"], rows[number].source.url
                original = SourceChanged(f"{url}: the clip of {key!r} has {len(original)} frames, not {num_frames}.")
            if isinstance(original, InputError):
                result.unreachable[original.error] += 1
                result.examples.setdefault(original.error, str(original))
                continue
            length = min(frames for frames in self._shapes if frames >= len(original))
            waiting[length].append((number, original))
            if len(waiting[length]) == self._shapes[length]:
                yield from self._encode(length, waiting[length])
                waiting[length] = []
        for length, group in waiting.items():
            if group:
                yield from self._encode(length, group)

    def _encode(self, length: int, group: list[tuple[int, Frames]]) -> Iterator[tuple[int, bytes, Frames]]:
        """Encode in the job's own batch shape: on a GPU another one may flip bits."""
        import torch

        from pipeline.encode import cut_tokens

        size = group[0][1].shape[1]
        frames_BTCHW = torch.zeros((self._shapes[length], length, 3, size, size), dtype=torch.uint8)
        for place, (_, original_THWC) in enumerate(group):
            frames_TCHW = torch.from_numpy(original_THWC).permute(0, 3, 1, 2)
            frames_BTCHW[place, : len(frames_TCHW)] = frames_TCHW
            frames_BTCHW[place, len(frames_TCHW) :] = frames_TCHW[-1]
        encoded = self.encoder.submit(frames_BTCHW, len(group)).wait()
        tokenizer = self._job.tokenizer
        for place, (number, original_THWC) in enumerate(group):
            num_tokens = len(original_THWC) * tokenizer.grid[0] * tokenizer.grid[1]
            yield number, cut_tokens(encoded.packed[place], num_tokens, tokenizer.bits), original_THWC


def _share(rate: float) -> str:
    return "none" if rate == 0 else f"{rate:.2%}" if rate >= 0.0001 else f"{rate * 1e6:.2g} in a million"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
