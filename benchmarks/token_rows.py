"""Random tokens for the loading benchmarks: the same rows as a dataset of this project and as plain arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage import open_storage
from schemas.job import Job, TokenizerRecord
from schemas.jobspec import JobSpec
from schemas.ledger import Commit, SourceRecord
from schemas.manifest import ManifestSummary, manifest_table, serialise_manifest
from schemas.tokenfile import TokenFooter, serialise_token_file, token_schema
from tokenizer.codes import pack_indices

FINGERPRINT = hashlib.sha256(b"random tokens").hexdigest()


@dataclass(frozen=True)
class TokenRows:
    """`num_rows` images of 32 x 32 tokens of 18 bits, uniform, in files of `rows_per_file`."""

    num_rows: int
    rows_per_file: int = 1500
    bits: int = 18
    grid: tuple[int, int] = (32, 32)
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return self.grid[0] * self.grid[1]

    def files(self) -> Iterator[tuple[list[str], npt.NDArray[np.int64]]]:
        """Keys, and indices int64 [rows, tokens], of one file after the other; the same with every call."""
        for number, first in enumerate(range(0, self.num_rows, self.rows_per_file)):
            size = min(self.rows_per_file, self.num_rows - first)
            generator = np.random.default_rng([self.seed, number])
            indices = generator.integers(0, 1 << self.bits, (size, self.num_tokens))
            yield [f"sample-{first + row:09d}" for row in range(size)], indices

    def checksum(self) -> int:
        """`row_checksum` of all rows: what an epoch of any loader must add up to, whatever its order."""
        return sum(int(row_checksums(indices).sum()) for _, indices in self.files()) % (1 << 63)

    def write_dataset(self, out: Path) -> None:
        """Write the rows as a finished dataset in `out`."""
        commits = []
        for shard, (keys, indices) in enumerate(self.files()):
            encoded = serialise_token_file(self._table(keys, indices), self._footer(shard, len(keys)))
            sha256 = hashlib.sha256(encoded.data).hexdigest()
            name = f"tokens/{shard // 1000:04d}/{shard:07d}-{sha256[:8]}.parquet"
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(encoded.data)
            commits.append(self._commit(shard, name, sha256, len(encoded.data), keys, encoded.row_groups))
            commits[-1] = commits[-1].model_copy(update={"tokens_offset": encoded.tokens_offset})
        storage = open_storage(str(out))
        table = manifest_table((commit, f"shard-{commit.shard:07d}.tar", 0) for commit in commits)
        data = serialise_manifest(table)
        storage.publish("job.json", self.job().model_dump_json().encode())
        storage.publish("manifest/0000.parquet", data)
        storage.publish("manifest/0000.json", self._summary(commits, data).model_dump_json().encode())

    def _table(self, keys: list[str], indices: npt.NDArray[np.int64]) -> pa.Table:
        size = len(keys)
        packed = pack_indices(indices, self.bits)
        columns = {
            "key": keys,
            "clip": [0] * size,
            "view": [0] * size,
            "frames": [1] * size,
            "tokens": [row.tobytes() for row in packed],
            "width": [640] * size,
            "height": [480] * size,
            "crop": [[80, 0, 480, 480]] * size,
            "flipped": [False] * size,
            "start": [None] * size,
            "frame_times": [None] * size,
            "position": list(range(size)),
            "source_offset": [1536 * row for row in range(size)],
        }
        return pa.table(columns, schema=token_schema([]))

    def _footer(self, shard: int, samples: int) -> TokenFooter:
        return TokenFooter(
            fingerprint=FINGERPRINT,
            shard=shard,
            bits=self.bits,
            group_size=9,
            grid=self.grid,
            views=1,
            samples=samples,
            failed=0,
            source_bytes=0,
        )

    def _commit(
        self, shard: int, name: str, sha256: str, num_bytes: int, keys: list[str], row_groups: list[int]
    ) -> Commit:
        return Commit(
            shard=shard,
            attempt=1,
            file=name,
            bytes=num_bytes,
            sha256=sha256,
            rows=len(keys),
            tokens=len(keys) * self.num_tokens,
            samples=len(keys),
            failed=0,
            warnings=0,
            partial=False,
            min_frames=1,
            max_frames=1,
            min_key=keys[0],
            max_key=keys[-1],
            row_groups=row_groups,
            tokens_offset=[],
            source=SourceRecord(bytes=0),
            arithmetic="none",
            worker="benchmark",
            at="2026-01-01T00:00:00+00:00",
        )

    def job(self) -> Job:
        """What the dataset is."""
        return Job(
            fingerprint=FINGERPRINT,
            fingerprint_fields={},
            spec=JobSpec(),
            tokenizer=TokenizerRecord(
                name="random",
                config={},
                weight_sha256=FINGERPRINT,
                folder="tokenizer/none",
                bits=self.bits,
                group_size=9,
                patch_size=8,
                grid=self.grid,
            ),
            plan_sha256=FINGERPRINT,
            created_by="benchmarks/token_rows.py",
        )

    def _summary(self, commits: list[Commit], manifest: bytes) -> ManifestSummary:
        return ManifestSummary(
            fingerprint=FINGERPRINT,
            generation=0,
            files=len(commits),
            rows=self.num_rows,
            tokens=self.num_rows * self.num_tokens,
            samples=self.num_rows,
            failed=0,
            warnings=0,
            failed_shards=0,
            first_failed_shards=[],
            partial_shards=0,
            bytes=sum(commit.bytes for commit in commits),
            bits=self.bits,
            group_size=9,
            grid=self.grid,
            views=1,
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            complete=True,
            created_by="benchmarks/token_rows.py",
        )


def row_checksums(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A number below 2^31 for each row of indices [rows, tokens] that depends on the place of every token."""
    weights = np.arange(1, indices.shape[1] + 1, dtype=np.int64)
    return (indices @ weights * 0x9E3779B1 & 0x7FFFFFFFFFFFFFFF) >> 32
