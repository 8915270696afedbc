"""A small dataset written with the schemas alone, so that its readers are tested without its writers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.dataset_files import (
    ledger_folder,
    manifest_summary_name,
    manifest_table_name,
    plan_name,
    serialise_plan,
)
from pipeline.storage import open_storage
from schemas.failures import Failure, serialise_failures
from schemas.fingerprint import fingerprint, fingerprint_fields
from schemas.job import Job, TokenizerRecord
from schemas.jobspec import parse_spec
from schemas.ledger import Arithmetic, Commit, FileRecord, GivenUp, SourceRecord, segment_name
from schemas.manifest import ManifestSummary, manifest_table, serialise_manifest
from schemas.tokenfile import TokenFooter, serialise_token_file, token_schema
from tokenizer.checkpoint import CheckpointFiles, read_checkpoint

TINY = "untrained:vit-tiny-32-l18"
GRID = (4, 4)
BITS = 18


def keep(value: Any) -> Any:
    return value


@dataclasses.dataclass(kw_only=True)
class TinyDataset:
    """Shards of five samples: four with random tokens, one without media; shard `given_up` was given up.

    Each `edit_` is a chance to write something wrong in a way that all hashes and sizes agree with."""

    url: str
    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: CheckpointFiles
    num_shards: int = 3
    views: int = 1
    frames: Callable[[int], int] = lambda position: 1
    """Frames of the sample at a position; more than 1 makes it a clip."""
    given_up: tuple[int, ...] = ()
    finished: bool = True
    edit_table: Callable[[pa.Table], pa.Table] = keep
    edit_footer: Callable[[TokenFooter], TokenFooter] = keep
    edit_failures: Callable[[list[Failure]], list[Failure]] = keep
    edit_commit: Callable[[Commit], Commit] = keep
    edit_summary: Callable[[ManifestSummary], ManifestSummary] = keep

    def write(self) -> TinyDataset:
        self.storage = open_storage(self.url, self.storage_options)
        self.urls = [f"s3://corpus/part-{shard:06d}.tar" for shard in range(self.num_shards)]
        plan = serialise_plan(self.urls)
        self.job = self._job(plan)
        folder = self.job.tokenizer.folder
        self.storage.publish(f"{folder}/config.json", self.checkpoint.config_json)
        self.storage.publish(f"{folder}/model.safetensors", self.checkpoint.model_safetensors)
        self.storage.publish(plan_name(0), plan)
        self.storage.publish("job.json", self.job.model_dump_json().encode())
        self.commits = [self._commit(shard) for shard in range(self.num_shards) if shard not in self.given_up]
        lines = [Arithmetic(id="a1b2c3d4", value={"device": "cpu"}).to_line()]
        lines += [self.edit_commit(commit).to_line() for commit in self.commits]
        for number, line in enumerate(lines):
            self.append(number, line)
        for number, shard in enumerate(self.given_up, start=len(lines)):
            record = GivenUp(shard=shard, attempts=3, error="ShardUnreadable", message="no answer", at="2026-01-01")
            self.append(number, record.to_line())
        if self.finished:
            self._finish()
        return self

    def append(self, number: int, line: str) -> None:
        self.storage.publish(f"{ledger_folder(0)}/{segment_name(number)}", line.encode() + b"\n")

    def path(self, name: str) -> Path:
        return Path(self.url) / name

    def _job(self, plan: bytes) -> Job:
        values: dict[str, Any] = {"dtype": "float32", "carry": ["caption"], "shards": self.urls}
        values["preprocess"] = {"size": 32, "crop": "random" if self.views > 1 else "center", "views": self.views}
        values["clips"] = {"clip_frames": 8, "stride": 8}
        spec = parse_spec(values, source="test")
        config = self.checkpoint.config()
        weights = self.checkpoint.weight_sha256()
        fields = fingerprint_fields(spec, config.to_json_dict(), weights)
        return Job(
            fingerprint=fingerprint(fields),
            fingerprint_fields=fields,
            spec=spec,
            tokenizer=TokenizerRecord(
                name=TINY,
                config=config.to_json_dict(),
                weight_sha256=weights,
                folder=f"tokenizer/{weights[:8]}",
                bits=BITS,
                group_size=config.group_size,
                patch_size=config.patch_size,
                grid=GRID,
            ),
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            created_by="bsqtok 0.1.0",
        )

    def _table(self, shard: int) -> pa.Table:
        generator = np.random.default_rng(shard)
        rows = []
        for position in range(4):
            frames = self.frames(position)
            num_bits = frames * GRID[0] * GRID[1] * BITS
            for view in range(self.views):
                bits = generator.integers(0, 2, num_bits, dtype=np.uint8)
                rows.append(
                    {
                        "key": f"{shard:03d}/{position:05d}",
                        "clip": 0,
                        "view": view,
                        "frames": frames,
                        "tokens": np.packbits(bits, bitorder="little").tobytes(),
                        "width": 640,
                        "height": 480,
                        "crop": [80, 0, 480, 480],
                        "flipped": False,
                        "start": 0.0 if frames > 1 else None,
                        "frame_times": [number / 8 for number in range(frames)] if frames > 1 else None,
                        "position": position,
                        "source_offset": 512 + 2048 * position,
                        "caption": f"picture {position}",
                    }
                )
        return pa.Table.from_pylist(rows, schema=token_schema(["caption"]))

    def _commit(self, shard: int) -> Commit:
        table = self.edit_table(self._table(shard))
        failures = [
            Failure(
                key=f"{shard:03d}/00001",
                position=1,
                stage="sidecar",
                error="CaptionNotText",
                message="not text",
                severity="warning",
            ),
            Failure(
                key=f"{shard:03d}/00004",
                position=4,
                stage="group",
                error="NoMedia",
                message="only a .txt member",
                source_offset=8704,
            ),
        ]
        failures = self.edit_failures(failures)
        data = serialise_failures(failures, {"bsqtok.fingerprint": self.job.fingerprint, "bsqtok.shard": str(shard)})
        sha256 = hashlib.sha256(data).hexdigest()
        failure_file = f"failures/{shard // 1000:04d}/{shard:07d}-{sha256[:8]}.parquet"
        self.storage.publish(failure_file, data)
        record = FileRecord(file=failure_file, bytes=len(data), sha256=sha256)
        footer = self.edit_footer(
            TokenFooter(
                fingerprint=self.job.fingerprint,
                shard=shard,
                bits=BITS,
                group_size=self.job.tokenizer.group_size,
                grid=GRID,
                views=self.views,
                samples=5,
                failed=1,
                failures_sha256=sha256,
                source_bytes=10_240,
                source_etag="tag",
            )
        )
        encoded = serialise_token_file(table, footer)
        sha256 = hashlib.sha256(encoded.data).hexdigest()
        name = f"tokens/{shard // 1000:04d}/{shard:07d}-{sha256[:8]}.parquet"
        self.storage.publish(name, encoded.data)
        frames, keys = pc.min_max(table["frames"]).as_py(), pc.min_max(table["key"]).as_py()
        return Commit(
            shard=shard,
            attempt=1,
            file=name,
            bytes=len(encoded.data),
            sha256=sha256,
            rows=len(table),
            tokens=(pc.sum(table["frames"]).as_py() or 0) * GRID[0] * GRID[1],
            samples=5,
            failed=1,
            warnings=1,
            partial=False,
            min_frames=frames["min"] or 0,
            max_frames=frames["max"] or 0,
            min_key=keys["min"],
            max_key=keys["max"],
            row_groups=encoded.row_groups,
            tokens_offset=encoded.tokens_offset,
            failures=record,
            source=SourceRecord(bytes=10_240, etag="tag"),
            arithmetic="a1b2c3d4",
            worker="host/cpu0",
            at="2026-01-01T00:00:00Z",
        )

    def _finish(self) -> None:
        table = manifest_table((commit, self.urls[commit.shard], 0) for commit in self.commits)
        data = serialise_manifest(table)
        summary = ManifestSummary(
            fingerprint=self.job.fingerprint,
            generation=0,
            files=len(table),
            rows=pc.sum(table["rows"]).as_py() or 0,
            tokens=pc.sum(table["tokens"]).as_py() or 0,
            samples=pc.sum(table["samples"]).as_py() or 0,
            failed=pc.sum(table["failed"]).as_py() or 0,
            warnings=pc.sum(table["warnings"]).as_py() or 0,
            failed_shards=len(self.given_up),
            first_failed_shards=list(self.given_up),
            partial_shards=0,
            bytes=pc.sum(table["bytes"]).as_py() or 0,
            bits=BITS,
            group_size=self.job.tokenizer.group_size,
            grid=GRID,
            views=self.views,
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            complete=not self.given_up,
            created_by="bsqtok 0.1.0",
        )
        self.storage.publish(manifest_table_name(0), data)
        self.storage.publish(manifest_summary_name(0), self.edit_summary(summary).model_dump_json().encode())


@pytest.fixture(scope="session")
def tiny_checkpoint() -> CheckpointFiles:
    """The weights of a small untrained tokenizer: 32 px, 4 x 4 tokens of 18 bits, up to 8 frames."""
    return read_checkpoint(TINY)


@pytest.fixture
def write_dataset(tmp_path: Path, tiny_checkpoint: CheckpointFiles) -> Callable[..., TinyDataset]:
    """Write a dataset under `tmp_path / "dataset"`, or under `url`; the options are those of TinyDataset."""

    def write(**options: Any) -> TinyDataset:
        options = {"url": str(tmp_path / "dataset"), "checkpoint": tiny_checkpoint} | options
        return TinyDataset(**options).write()

    return write
