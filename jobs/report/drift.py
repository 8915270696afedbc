"""Which bits and codes the tokens use, and which shards use others than the rest of the dataset.

From a bounded sample: some rows of one row group of each of some shards.  Two distances of a shard from the rest:

- bits: how far the share of ones of a channel differs, averaged over channels;
- codes: Jensen-Shannon divergence (base 2, from 0 to 1) of how often each code of a group occurs, averaged over groups.

Tokens of one picture are alike, so rows, not tokens, are what chance is measured with: the same distances are taken
after rows were shuffled between the shards, and a distance counts in multiples of what that gives.  Corpora are
rarely shuffled, so nearly every shard lies above 1; a shard drifts when it lies above every shuffled one and stands
far out among the other shards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jobs.commit_table import CommitTable
from pipeline.dataset_files import StoredFile
from pipeline.parquet import PARQUET_ERRORS, open_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.job import Job

Floats = npt.NDArray[np.float64]

MAX_FILES = 96
MAX_ROWS = 64
"""Of one file."""
MAX_FILE_TOKENS = 65_536
"""Of one file: fewer rows are taken of long clips."""
MAX_ROW_TOKENS = 16_384
"""Of one row: the first frames of a very long clip."""
MAX_CODE_BITS = 9
"""Codes of more bits are looked at in pieces: the sample could not fill their table."""
FILES_AT_ONCE = 4
LEAST_SHARDS = 4
LEAST_ROWS = 4
BIT_SHUFFLES = 200
CODE_SHUFFLES = 20
DRIFT_DEVIATIONS = 6.0
DRIFT_FACTOR = 2.0
"""Of the median shard's distance."""
STUCK_ENTROPY = 0.05
"""Bits of entropy under which a channel hardly says anything."""
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class CodeUsage:
    """How the codes of one piece of a token occur."""

    channels: tuple[int, int]
    """First channel and the one after the last."""
    codes: int
    used: int
    entropy_bits: float
    shares: Floats
    """Of each code, the commonest first."""

    @property
    def bits(self) -> int:
        return self.channels[1] - self.channels[0]


@dataclass(frozen=True, slots=True)
class ShardUsage:
    """One shard against the rest."""

    shard: int
    rows: int
    bit_shift: float
    """Mean over channels of the difference of the share of ones, 0 to 1."""
    bit_chance: float
    """What shuffled rows give: the median."""
    code_divergence: float
    code_chance: float
    score: float
    """The larger of the two distances, as a multiple of its chance value."""
    drifts: bool
    channel: int
    """The channel that differs most, its share of ones here and elsewhere."""
    ones_here: float
    ones_elsewhere: float
    entropy_bits: float
    """Sum over channels, here."""
    code_bits: float
    """Entropy of the codes, summed over pieces, here."""
    ones: Floats
    """Share of ones of each channel."""


@dataclass(slots=True)
class Usage:
    """Code usage of the dataset and of the shards that were looked at."""

    ones: Floats
    """Share of ones of each channel, over all rows looked at."""
    pieces: list[CodeUsage]
    shards: list[ShardUsage]
    """In shard order."""
    files: int
    """Token files looked at."""
    all_files: int
    rows: int
    tokens: int
    bytes_read: int
    unreadable: list[str] = field(default_factory=list)
    usual_score: float = 1.0
    """Of the median shard."""

    @property
    def comparable(self) -> bool:
        """Whether there are enough shards to compare one with the rest."""
        return bool(self.shards)

    @property
    def drifting(self) -> list[ShardUsage]:
        """Shards that drift, the worst first."""
        return sorted((each for each in self.shards if each.drifts), key=lambda each: -each.score)

    @property
    def entropies(self) -> Floats:
        """Entropy of each channel in bits, 0 to 1."""
        return binary_entropy(self.ones)

    @property
    def stuck(self) -> list[int]:
        """Channels that are nearly always the same."""
        return np.flatnonzero(self.entropies < STUCK_ENTROPY).tolist() if self.rows else []


@dataclass(slots=True)
class _Sample:
    """Rows of one file."""

    shard: int
    ones_RL: Floats
    """Share of ones of each channel in each row."""
    codes_RK: npt.NDArray[np.uint32]
    """How often each code of each piece occurs in each row."""
    tokens: int
    bytes_read: int


def measure_usage(storage: Storage, job: Job, commits: CommitTable, seed: int) -> Usage:
    """Read a sample of token rows and compare shards.  A file that cannot be read is named in `unreadable`."""
    pieces = code_pieces(job.tokenizer.bits, job.tokenizer.group_size)
    files = np.flatnonzero(commits.column("rows") > 0).tolist()
    chosen = sorted(random.Random(seed).sample(files, min(MAX_FILES, len(files))))

    def read(number: int) -> _Sample | str:
        return _read_sample(storage, job, commits, number, pieces, random.Random(f"{seed}/{number}"))

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        answers = list(pool.map(read, chosen))
    samples = [answer for answer in answers if isinstance(answer, _Sample)]
    bits = job.tokenizer.bits
    num_codes = sum(1 << (last - first) for first, last in pieces)
    ones_RL = np.concatenate([np.zeros((0, bits)), *(sample.ones_RL for sample in samples)])
    codes_RK = np.concatenate([np.zeros((0, num_codes), np.uint32), *(sample.codes_RK for sample in samples)])
    # A shard may have several files: rows won back later stand in a file of their own.
    shards = np.concatenate(
        [np.zeros(0, np.int64), *(np.full(len(sample.ones_RL), sample.shard) for sample in samples)]
    ).astype(np.int64)
    usage = Usage(
        ones=ones_RL.mean(0) if len(ones_RL) else np.zeros(bits),
        pieces=_code_usage(codes_RK.sum(0, dtype=np.int64), pieces),
        shards=[],
        files=len(samples),
        all_files=len(files),
        rows=len(ones_RL),
        tokens=sum(sample.tokens for sample in samples),
        bytes_read=sum(sample.bytes_read for sample in samples),
        unreadable=[answer for answer in answers if isinstance(answer, str)],
    )
    usage.shards = compare_shards(shards, ones_RL, codes_RK, pieces, seed)
    if usage.shards:
        usage.usual_score = float(np.median([each.score for each in usage.shards]))
    return usage


def code_pieces(bits: int, group_size: int) -> list[tuple[int, int]]:
    """(first channel, last + 1) of what is looked at as one code: a group, or its equal parts where it is large."""
    parts = -(-group_size // MAX_CODE_BITS)
    cuts = [
        group * group_size + part * group_size // parts for group in range(bits // group_size) for part in range(parts)
    ]
    return list(zip(cuts, [*cuts[1:], bits], strict=True))


def binary_entropy(ones: Floats) -> Floats:
    """Entropy in bits of channels with these shares of ones."""
    shares = np.clip(ones, 1e-12, 1 - 1e-12)
    entropy: Floats = -(shares * np.log2(shares) + (1 - shares) * np.log2(1 - shares))
    return np.where((ones <= 0) | (ones >= 1), 0.0, entropy)


def compare_shards(
    shards: npt.NDArray[np.int64],
    ones_RL: Floats,
    codes_RK: npt.NDArray[np.uint32],
    pieces: Sequence[tuple[int, int]],
    seed: int,
) -> list[ShardUsage]:
    """Compare each shard's rows with those of all others; `shards` names that of each row, ascending.

    Returns nothing with fewer than LEAST_SHARDS shards of LEAST_ROWS rows."""
    numbers, counts = np.unique(shards, return_counts=True)
    enough = np.isin(shards, numbers[counts >= LEAST_ROWS])
    shards, ones_RL, codes_RK = shards[enough], ones_RL[enough], codes_RK[enough]
    numbers, firsts, counts = np.unique(shards, return_index=True, return_counts=True)
    if len(numbers) < LEAST_SHARDS:
        return []
    generator = np.random.default_rng(seed)

    here_SL = np.add.reduceat(ones_RL, firsts)
    elsewhere_SL = (ones_RL.sum(0) - here_SL) / (len(shards) - counts)[:, None]
    here_SL = here_SL / counts[:, None]
    shift = np.abs(here_SL - elsewhere_SL).mean(1)
    shuffled = np.stack(
        [_bit_shift(ones_RL[generator.permutation(len(shards))], firsts, counts) for _ in range(BIT_SHUFFLES)]
    )
    bit_chance = np.maximum(np.median(shuffled, 0), 1e-6)
    bit_score, bit_limit = shift / bit_chance, float((shuffled / bit_chance).max())

    divergence = _divergence(codes_RK, firsts, pieces)
    shuffled = np.stack(
        [_divergence(codes_RK[generator.permutation(len(shards))], firsts, pieces) for _ in range(CODE_SHUFFLES)]
    )
    code_chance = np.maximum(np.median(shuffled, 0), 1e-6)
    code_score, code_limit = divergence / code_chance, float((shuffled / code_chance).max())

    drifts = _stands_out(bit_score, bit_limit) | _stands_out(code_score, code_limit)
    code_bits = [
        sum(each.entropy_bits for each in _code_usage(codes, pieces))
        for codes in np.add.reduceat(codes_RK, firsts, dtype=np.int64)
    ]
    channels = np.abs(here_SL - elsewhere_SL).argmax(1)
    return [
        ShardUsage(
            shard=int(number),
            rows=int(counts[place]),
            bit_shift=float(shift[place]),
            bit_chance=float(bit_chance[place]),
            code_divergence=float(divergence[place]),
            code_chance=float(code_chance[place]),
            score=float(max(bit_score[place], code_score[place])),
            drifts=bool(drifts[place]),
            channel=int(channels[place]),
            ones_here=float(here_SL[place, channels[place]]),
            ones_elsewhere=float(elsewhere_SL[place, channels[place]]),
            entropy_bits=float(binary_entropy(here_SL[place]).sum()),
            code_bits=float(code_bits[place]),
            ones=here_SL[place],
        )
        for place, number in enumerate(numbers)
    ]


def _stands_out(scores: Floats, limit: float) -> npt.NDArray[np.bool_]:
    """Which scores are above chance (`limit`) and far from those of the other shards."""
    middle = float(np.median(scores))
    spread = 1.4826 * float(np.median(np.abs(scores - middle)))
    return (scores > limit) & (scores > DRIFT_FACTOR * middle) & (scores - middle > DRIFT_DEVIATIONS * spread)


def _bit_shift(ones_RL: Floats, firsts: npt.NDArray[np.intp], counts: npt.NDArray[np.intp]) -> Floats:
    sums = np.add.reduceat(ones_RL, firsts)
    elsewhere = (ones_RL.sum(0) - sums) / (len(ones_RL) - counts)[:, None]
    shift: Floats = np.abs(sums / counts[:, None] - elsewhere).mean(1)
    return shift


def _divergence(
    codes_RK: npt.NDArray[np.uint32], firsts: npt.NDArray[np.intp], pieces: Sequence[tuple[int, int]]
) -> Floats:
    """Jensen-Shannon divergence of each shard's codes from those of the others, averaged over pieces."""
    sums = np.add.reduceat(codes_RK, firsts, dtype=np.int64)
    rest = sums.sum(0) - sums
    total = np.zeros(len(firsts))
    start = 0
    for first, last in pieces:
        stop = start + (1 << (last - first))
        here = sums[:, start:stop] / sums[:, start:stop].sum(1, keepdims=True)
        there = rest[:, start:stop] / rest[:, start:stop].sum(1, keepdims=True)
        total += _entropy((here + there) / 2) - (_entropy(here) + _entropy(there)) / 2
        start = stop
    return total / len(pieces)


def _entropy(shares: Floats) -> Floats:
    entropy: Floats = -np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=-1)
    return entropy


def _code_usage(counts_K: npt.NDArray[np.int64], pieces: Sequence[tuple[int, int]]) -> list[CodeUsage]:
    found = []
    start = 0
    for first, last in pieces:
        stop = start + (1 << (last - first))
        counts = counts_K[start:stop]
        shares = np.sort(counts)[::-1] / max(int(counts.sum()), 1)
        found.append(
            CodeUsage((first, last), stop - start, int((counts > 0).sum()), float(_entropy(shares)) + 0.0, shares)
        )
        start = stop
    return found


def _read_sample(
    storage: Storage,
    job: Job,
    commits: CommitTable,
    number: int,
    pieces: Sequence[tuple[int, int]],
    chance: random.Random,
) -> _Sample | str:
    """Rows of one row group of a file; its name where it cannot be read."""
    from tokenizer.codes import packed_size, unpack_bits

    name = commits.table["file"][number].as_py()
    tokenizer = job.tokenizer
    per_frame = tokenizer.grid[0] * tokenizer.grid[1]
    ones: list[Floats] = []
    codes: list[npt.NDArray[np.uint32]] = []
    num_tokens = 0
    try:
        with StoredFile(storage, name) as stored:
            file = open_parquet(stored)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            (group,) = chance.choices(range(len(sizes)), sizes)
            table = file.read_row_group(group, columns=["frames", "tokens"], use_threads=False)
            bytes_read = table["tokens"].nbytes
        for row in chance.sample(range(len(table)), min(MAX_ROWS, len(table))):
            if ones and num_tokens >= MAX_FILE_TOKENS:
                break
            count = min(table["frames"][row].as_py() * per_frame, MAX_ROW_TOKENS)
            packed = np.frombuffer(table["tokens"][row].as_py(), np.uint8)[: packed_size(count, tokenizer.bits)]
            bits_NL = unpack_bits(packed[np.newaxis], count, tokenizer.bits)[0]
            ones.append(bits_NL.mean(0))
            codes.append(_count_codes(bits_NL, pieces))
            num_tokens += count
    except (BsqError, *PARQUET_ERRORS, ValueError, IndexError):
        return str(name)
    shard = commits.table["shard"][number].as_py()
    return _Sample(shard, np.stack(ones), np.stack(codes), num_tokens, bytes_read)


def _count_codes(bits_NL: npt.NDArray[np.bool_], pieces: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint32]:
    from tokenizer.codes import bits_to_indices

    counts = [
        np.bincount(bits_to_indices(bits_NL[:, first:last]), minlength=1 << (last - first)) for first, last in pieces
    ]
    return np.concatenate(counts).astype(np.uint32)
