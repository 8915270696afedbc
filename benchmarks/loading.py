"""How fast do tokens come out of a dataset, in how much memory, and how long does one of a million files take to open?

Rows of 18 bits x 1,024 tokens in batches of 256, one process on one core, page cache warm.  Beside every round runs a
bare loop over a uint32 memmap, which decodes nothing and keeps no order: compare the ratios, for other load strikes
both alike.  Rates are by processor time.  Other loaders: `benchmarks.loading_peers`.

    python -m benchmarks.loading
    python -m benchmarks.loading --only memory
    python -m benchmarks.loading --only manifest --files 1000000"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.token_rows import FINGERPRINT, TokenRows
from pipeline import TokenDataset, TokenLoader
from pipeline.storage import open_storage
from schemas.manifest import MANIFEST_SCHEMA, ManifestSummary, serialise_manifest

BATCH = 256

_PEAK = """
import json, sys, time
import pipeline.dataset, pipeline.loader

def peak():
    # Not ru_maxrss: that of a child begins with what its parent had.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
"""

_OPEN = """
imported = peak()
begun, busy = time.perf_counter(), time.process_time()
dataset = pipeline.dataset.TokenDataset(sys.argv[1])
opened, opened_busy = time.perf_counter() - begun, time.process_time() - busy
peak_opened = peak()
plan = dataset.plan_epoch(0, 0, shuffle=True, window_rows=32_768)
planned, planned_busy = time.perf_counter() - begun - opened, time.process_time() - busy - opened_busy
print(json.dumps({"samples": len(dataset), "windows": plan.num_windows, "opened": opened, "opened_busy": opened_busy,
                  "planned": planned, "planned_busy": planned_busy, "imports_mb": imported, "opened_mb": peak_opened,
                  "peak_mb": peak()}))
"""

_READ = """
loader = pipeline.loader.TokenLoader(pipeline.dataset.TokenDataset(sys.argv[1]), 256, window=int(sys.argv[2]))
imported = peak()
rows = sum(len(batch["index"]) for batch in loader)
print(json.dumps({"rows": rows, "mb": peak() - imported}))
"""


def write_simulated_manifest(out: Path, num_files: int, rows_per_file: int = 10_000) -> None:
    """A finished dataset of `num_files` token files, of which only the manifest exists."""
    groups = [1024] * (rows_per_file // 1024) + [rows_per_file % 1024]
    digests = [hashlib.sha256(number.to_bytes(8)).hexdigest() for number in range(num_files)]
    count = np.arange(num_files)
    columns: dict[str, Any] = {
        "shard": count,
        "part": np.zeros(num_files, np.int32),
        "url": [f"s3://corpus/shards/part-{number:07d}.tar" for number in range(num_files)],
        "generation": np.zeros(num_files, np.int32),
        "file": [
            f"tokens/{number // 1000:04d}/{number:07d}-{digests[number][:8]}.parquet" for number in range(num_files)
        ],
        "bytes": 23_000_000 + count % 1000,
        "sha256": digests,
        "first_row": count * rows_per_file,
        "rows": np.full(num_files, rows_per_file),
        "tokens": np.full(num_files, rows_per_file * 1024),
        "samples": np.full(num_files, rows_per_file),
        "failed": np.zeros(num_files, np.int64),
        "warnings": np.zeros(num_files, np.int64),
        "partial": np.zeros(num_files, np.bool_),
        "min_frames": np.ones(num_files, np.int32),
        "max_frames": np.ones(num_files, np.int32),
        "min_key": [f"{number:07d}/a" for number in range(num_files)],
        "max_key": [f"{number:07d}/z" for number in range(num_files)],
        "row_groups": pa.ListArray.from_arrays(
            np.arange(num_files + 1, dtype=np.int32) * len(groups), np.tile(groups, num_files)
        ),
        "tokens_offset": pa.ListArray.from_arrays(
            np.arange(num_files + 1, dtype=np.int32) * len(groups),
            np.tile(np.arange(len(groups)) * 2_400_000 + 4, num_files),
        ),
        "failures_file": pa.nulls(num_files, pa.string()),
        "failures_bytes": pa.nulls(num_files, pa.int64()),
        "failures_sha256": pa.nulls(num_files, pa.string()),
        "source_bytes": np.full(num_files, 1 << 30),
        "source_etag": digests,
        "attempt": np.ones(num_files, np.int32),
        "arithmetic": ["a1b2c3d4"] * num_files,
        "worker": ["node0/gpu0"] * num_files,
        "at": ["2026-01-01T00:00:00+00:00"] * num_files,
    }
    data = serialise_manifest(pa.table(columns).cast(MANIFEST_SCHEMA))
    rows = TokenRows(num_rows=0)
    summary = ManifestSummary(
        fingerprint=FINGERPRINT,
        generation=0,
        files=num_files,
        rows=num_files * rows_per_file,
        tokens=num_files * rows_per_file * 1024,
        samples=num_files * rows_per_file,
        failed=0,
        warnings=0,
        failed_shards=0,
        first_failed_shards=[],
        partial_shards=0,
        bytes=int(columns["bytes"].sum()),
        bits=rows.bits,
        group_size=9,
        grid=rows.grid,
        views=1,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        complete=True,
        created_by="benchmarks/loading.py",
    )
    storage = open_storage(str(out))
    storage.publish("job.json", rows.job().model_dump_json().encode())
    storage.publish("manifest/0000.parquet", data)
    storage.publish("manifest/0000.json", summary.model_dump_json().encode())


def open_in_a_fresh_process(folder: Path) -> dict[str, float]:
    """Seconds to open a dataset and to plan its first epoch, and the peak resident memory."""
    return _run(_OPEN, folder)


def _run(code: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", _PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path.cwd())
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure_memory(folder: Path, num_rows: int) -> None:
    """Memory that an epoch takes beside imports, in fresh processes: by the window, whatever the rows."""
    print("\nAn epoch, in fresh processes:")
    for count in (num_rows // 2, num_rows):
        rows = TokenRows(num_rows=count)
        out = folder / f"rows-{count}"
        rows.write_dataset(out)
        for window in (num_rows // 16, num_rows // 8):
            found = _run(_READ, out, window)
            size = window * rows.num_tokens * rows.bits / 8e6
            print(
                f"  {count:>8,} rows, windows of {window:,} ({size:.0f} MB): peak {found['mb']:,.0f} MB beside imports"
            )


def measure_manifest(folder: Path, num_files: int) -> None:
    """Open a simulated manifest."""
    write_simulated_manifest(folder, num_files)
    size = (folder / "manifest/0000.parquet").stat().st_size
    print(f"\nA manifest of {num_files:,} files ({size / 1e6:,.0f} MB), opened in a fresh process:")
    for _ in range(3):
        found = open_in_a_fresh_process(folder)
        print(
            f"  opened in {found['opened']:.2f} s ({found['opened_busy']:.2f} s of processor), peak "
            f"{found['opened_mb']:,.0f} MB ({found['imports_mb']:,.0f} MB of it imports); its first epoch of "
            f"{found['samples']:,.0f} samples planned in {found['planned']:.2f} s "
            f"({found['planned_busy']:.2f}), peak {found['peak_mb']:,.0f} MB"
        )


def measure_rates(folder: Path, num_rows: int, rounds: int) -> None:
    """Rows per second of processor time of every way to read, beside a bare memmap."""
    rows = TokenRows(num_rows=num_rows)
    rows.write_dataset(folder / "tokens")
    memmap = folder / "indices.bin"
    with memmap.open("wb") as file:
        for _, indices in rows.files():
            file.write(indices.astype(np.uint32).tobytes())
    stored = sum(path.stat().st_size for path in (folder / "tokens/tokens").rglob("*.parquet"))
    print(f"{num_rows:,} rows: {stored / 1e6:.1f} MB, {stored / memmap.stat().st_size:.1%} of uint32")
    flat = np.memmap(memmap, np.uint32, "r").reshape(num_rows, rows.num_tokens)
    order = np.random.default_rng(0).permutation(num_rows)

    def bare() -> int:
        for first in range(0, num_rows, BATCH):
            torch.from_numpy(flat[order[first : first + BATCH]].astype(np.int64))
        return num_rows

    def stream(view: Any, columns: list[str], prefetch: int) -> Callable[[], int]:
        loader = TokenLoader(TokenDataset(folder / "tokens", columns, view), BATCH, prefetch=prefetch)

        def run() -> int:
            return sum(len(batch["sample"]) for batch in loader)

        return run

    dataset = TokenDataset(folder / "tokens")

    def batches() -> int:
        for first in range(0, num_rows // 2, BATCH):
            dataset.__getitems__(order[first : first + BATCH].tolist())
        return num_rows // 2

    def one_by_one() -> int:
        for sample in order[:4000].tolist():
            dataset[sample]
        return 4000

    ways: dict[str, Callable[[], int]] = {
        "bare memmap, int64": bare,
        "stream, index": stream("index", [], 0),
        "stream, index, thread": stream("index", [], 4),
        "stream, index and key, thread": stream("index", ["key"], 4),
        "stream, groups (9, 9)": stream(("groups", (9, 9)), [], 0),
        "stream, bits": stream("bits", [], 0),
        "stream, packed": stream("packed", [], 0),
        "random access, __getitems__": batches,
        "random access, ds[i]": one_by_one,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            begun = time.process_time()
            count = run()
            rates[name].append(count / (time.process_time() - begun))
    reference = rates["bare memmap, int64"]
    print(f"\n{'thousand rows/s, median':<34}{'':>8}{'of bare memmap':>16}")
    for name, values in rates.items():
        ratio = statistics.median(value / base for value, base in zip(values, reference, strict=True))
        print(f"{name:<34}{statistics.median(values) / 1e3:>8,.0f}{ratio:>16.2f}")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["rates", "memory", "manifest"])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless told")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only in (None, "rates"):
            measure_rates(Path(folder) / "rates", options.rows, options.rounds)
        if options.only in (None, "memory"):
            measure_memory(Path(folder) / "memory", options.rows)
        if options.only in (None, "manifest"):
            measure_manifest(Path(folder) / "manifest", options.files)


if __name__ == "__main__":
    main()
