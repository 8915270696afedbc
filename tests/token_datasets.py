"""Token datasets of any shape, written with the schemas alone and with random tokens: what loaders are tested with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset_files import (
    ledger_folder,
    manifest_summary_name,
    manifest_table_name,
    plan_name,
    serialise_plan,
)
from pipeline.storage import open_storage
from schemas import tokenfile
from schemas.fingerprint import fingerprint, fingerprint_fields
from schemas.job import Job, TokenizerRecord
from schemas.jobspec import parse_spec
from schemas.ledger import Commit, SourceRecord, segment_name
from schemas.manifest import ManifestSummary, manifest_table, serialise_manifest
from schemas.tokenfile import TokenFooter, serialise_token_file, token_schema
from tokenizer.codes import packed_size

CARRIED = ("caption", "label", "metadata")


@dataclasses.dataclass
class TokenRow:
    """What was written into one row."""

    key: str
    clip: int
    view: int
    frames: int
    tokens: bytes
    caption: str | None
    label: int | None


@dataclasses.dataclass(kw_only=True)
class TokenDatasetWriter:
    """`clips_of_file[f]` clips in each file, `frames(f, c)` frames, random tokens from `seed`."""

    url: str
    clips_of_file: list[int]
    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bits: int = 18
    group_size: int = 9
    grid: tuple[int, int] = (2, 3)
    views: int = 1
    frames: Callable[[int, int], int] = lambda file, clip: 1
    caption: Callable[[int, int], str | None] = lambda file, clip: f"picture {clip} of {file}"
    label: Callable[[int, int], int | None] = lambda file, clip: (7 * file + clip) % 10
    row_group_rows: int = 1024
    seed: int = 0
    failed_shards: int = 0
    finished: bool = True
    weight_sha256: str = "ab" * 32
    size: int = 32

    def write(self) -> TokenDatasetWriter:
        self.storage = open_storage(self.url, self.storage_options)
        self.rows: list[TokenRow] = []
        self.commits: list[Commit] = []
        urls = [f"s3://corpus/{number:06d}.tar" for number in range(len(self.clips_of_file))]
        plan = serialise_plan(urls)
        self.job = self._job(plan, urls)
        self.storage.publish(plan_name(0), plan)
        self.storage.publish("job.json", self.job.model_dump_json().encode())
        for shard in range(len(self.clips_of_file)):
            self.commits.append(self._write_file(shard))
        lines = "".join(commit.to_line() + "\n" for commit in self.commits)
        self.storage.publish(f"{ledger_folder(0)}/{segment_name(0)}", lines.encode())
        if self.finished:
            self.finish(manifest_table((commit, urls[commit.shard], 0) for commit in self.commits))
        return self

    def finish(self, table: pa.Table) -> None:
        """Publish the manifest."""
        data = serialise_manifest(table)
        total = {name: pc.sum(table[name]).as_py() or 0 for name in ("rows", "tokens", "samples", "failed", "bytes")}
        summary = ManifestSummary(
            fingerprint=self.job.fingerprint,
            generation=0,
            files=len(table),
            **total,
            warnings=0,
            failed_shards=self.failed_shards,
            first_failed_shards=[],
            partial_shards=0,
            bits=self.bits,
            group_size=self.group_size,
            grid=self.grid,
            views=self.views,
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            complete=not self.failed_shards,
            created_by="bsqtok 0.1.0",
        )
        self.storage.publish(manifest_table_name(0), data)
        self.storage.publish(manifest_summary_name(0), summary.model_dump_json().encode())

    def indices(self, row: TokenRow) -> npt.NDArray[np.int64]:
        """The tokens of a row as it was written, by a rule that knows nothing of the project: int64 [T, h, w]."""
        number = int.from_bytes(row.tokens, "little")
        mask = (1 << self.bits) - 1
        values = [number >> (self.bits * place) & mask for place in range(row.frames * self.grid[0] * self.grid[1])]
        return np.array(values, np.int64 if self.bits < 63 else object).reshape(row.frames, *self.grid)

    def _job(self, plan: bytes, urls: list[str]) -> Job:
        values: dict[str, Any] = {"dtype": "float32", "carry": list(CARRIED), "shards": urls}
        values["preprocess"] = {
            "size": self.size,
            "crop": "random" if self.views > 1 else "center",
            "views": self.views,
            "seed": self.seed,
        }
        values["clips"] = {"clip_frames": 16, "stride": 16}
        spec = parse_spec(values, source="test")
        fields = fingerprint_fields(spec, {"bits": self.bits}, self.weight_sha256)
        return Job(
            fingerprint=fingerprint(fields),
            fingerprint_fields=fields,
            spec=spec,
            tokenizer=TokenizerRecord(
                name="random",
                config={},
                weight_sha256=self.weight_sha256,
                folder=f"tokenizer/{self.weight_sha256[:8]}",
                bits=self.bits,
                group_size=self.group_size,
                patch_size=8,
                grid=self.grid,
            ),
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            created_by="bsqtok 0.1.0",
        )

    def _write_file(self, shard: int) -> Commit:
        rows = self._rows_of(shard)
        self.rows += rows
        table = self._table(rows)
        footer = TokenFooter(
            fingerprint=self.job.fingerprint,
            shard=shard,
            bits=self.bits,
            group_size=self.group_size,
            grid=self.grid,
            views=self.views,
            samples=self.clips_of_file[shard],
            failed=0,
            source_bytes=10_240,
        )
        with patch.object(tokenfile, "ROW_GROUP_ROWS", self.row_group_rows):
            encoded = serialise_token_file(table, footer)
        sha256 = hashlib.sha256(encoded.data).hexdigest()
        name = f"tokens/{shard // 1000:04d}/{shard:07d}-{sha256[:8]}.parquet"
        self.storage.publish(name, encoded.data)
        frames, keys = [row.frames for row in rows], [row.key for row in rows]
        return Commit(
            shard=shard,
            attempt=1,
            file=name,
            bytes=len(encoded.data),
            sha256=sha256,
            rows=len(rows),
            tokens=sum(frames) * self.grid[0] * self.grid[1],
            samples=self.clips_of_file[shard],
            failed=0,
            warnings=0,
            partial=False,
            min_frames=min(frames, default=0),
            max_frames=max(frames, default=0),
            min_key=min(keys, default=None),
            max_key=max(keys, default=None),
            row_groups=encoded.row_groups,
            tokens_offset=encoded.tokens_offset,
            source=SourceRecord(bytes=10_240),
            arithmetic="a1b2c3d4",
            worker="host/cpu0",
            at="2026-01-01T00:00:00Z",
        )

    def _rows_of(self, shard: int) -> list[TokenRow]:
        generator = np.random.default_rng([self.seed, shard])
        rows = []
        for clip in range(self.clips_of_file[shard]):
            frames = self.frames(shard, clip)
            num_bits = frames * self.grid[0] * self.grid[1] * self.bits
            for view in range(self.views):
                octets = generator.integers(0, 256, packed_size(num_bits, 1), dtype=np.uint8)
                if num_bits % 8:
                    octets[-1] &= (1 << num_bits % 8) - 1
                rows.append(
                    TokenRow(
                        key=f"{shard:04d}/{clip:06d}",
                        clip=0,
                        view=view,
                        frames=frames,
                        tokens=octets.tobytes(),
                        caption=self.caption(shard, clip),
                        label=self.label(shard, clip),
                    )
                )
        return rows

    def _table(self, rows: list[TokenRow]) -> pa.Table:
        count = len(rows)
        positions = [number // self.views for number in range(count)]
        is_clip = [row.frames > 1 for row in rows]
        columns = {
            "key": [row.key for row in rows],
            "clip": [row.clip for row in rows],
            "view": [row.view for row in rows],
            "frames": [row.frames for row in rows],
            "tokens": [row.tokens for row in rows],
            "width": [640] * count,
            "height": [480] * count,
            "crop": [[80, 0, 480, 480]] * count,
            "flipped": [False] * count,
            "start": [0.5 if clip else None for clip in is_clip],
            "frame_times": [[n / 8 for n in range(row.frames)] if row.frames > 1 else None for row in rows],
            "position": positions,
            "source_offset": [512 + 2048 * position for position in positions],
            "caption": [row.caption for row in rows],
            "label": [row.label for row in rows],
            "metadata": [None] * count,
        }
        return pa.table(columns, schema=token_schema(CARRIED))
