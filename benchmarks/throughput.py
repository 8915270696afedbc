"""How much of what decoding and the model can do does a whole job reach?

Prints, from one run on one machine: decode-only, model-only and end-to-end samples/s, and the ratio to the limit those
two set.  Rounds are interleaved, so that other load on the machine strikes numerator and denominator alike.

    python -m benchmarks.throughput                    the default tokenizer at 128 px
    python -m benchmarks.throughput --stub             an encoder that costs nothing, at 256 px
    python -m benchmarks.throughput --device cuda --runners local --batch 256 --images 40000

Decode-only is a bare loop of the pipeline's own decode function over the same files, in memory, on as many threads as
cores.
End-to-end is a real job from tar to Parquet, ledger included, timed from the moment when its workers are up (start-up
is printed apart) to its last commit."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.photo_shards import write_shards
from jobs.begin import resolve, write_beginning
from jobs.driver import Driver
from jobs.finish import write_manifest
from jobs.generation import first_generation
from jobs.lease import take_lease
from jobs.runner import Runner, WorkerHandle
from jobs.start import Execution, make_runner
from pipeline.dataset_files import read_ledger
from pipeline.decode import Decoder
from pipeline.encode import PendingBatch, open_encoder
from pipeline.sample import Member
from pipeline.storage import open_storage
from schemas.job import Job
from schemas.jobspec import JobSpec, parse_spec

NUM_CPUS = len(os.sched_getaffinity(0))


class _Warm:
    """A runner whose workers are all up before the clock starts."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_workers = runner.num_workers
        self._handles = [runner.start_worker(number) for number in range(runner.num_workers)]
        while any(handle.heartbeat() is None for handle in self._handles):
            runner.wait(0.05)
            for handle in self._handles:
                assert not handle.take_messages(), "a worker did not start"
                assert handle.death() is None, handle.death()

    def start_worker(self, number: int) -> WorkerHandle:
        return self._handles[number]

    def wait(self, timeout_seconds: float) -> None:
        self._runner.wait(timeout_seconds)

    def close(self) -> None:
        self._runner.close()


class BareLoop:
    """The bare decode loop in a process of its own, as a worker has one, so that neither inherits a warm heap."""

    def __init__(self, spec: JobSpec, shards: list[str]) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _load, (spec, shards))

    def rate(self) -> tuple[float, float]:
        """Images per second, and CPU milliseconds per image."""
        return self._pool.submit(_decode_all).result()

    def close(self) -> None:
        self._pool.shutdown()


_loaded: dict[str, Any] = {}


def _load(spec: JobSpec, shards: list[str]) -> None:
    """Keep the very files that a job will decode, each in memory of its own."""
    images = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    images.append(file.read())
    _loaded["images"] = images
    _loaded["decoder"] = Decoder(spec.preprocess, spec.clips, spec.limits)


def _decode_all() -> tuple[float, float]:
    decoder, images = _loaded["decoder"], _loaded["images"]

    def work(first: int) -> None:
        for number in range(first, len(images), NUM_CPUS):
            payload = images[number]
            member = Member(name="photo.jpg", kind="file", size=len(payload), offset=0, payload=payload)
            for view in decoder.views(f"{number:08d}", member):
                assert view.frames_TCHW.shape[0] == 1

    return _timed(work, len(images))


def model_rate(job: Job, folder: str, batch: int, num_images: int, device: str) -> tuple[float, float]:
    """Images per second, and CPU milliseconds per image, of the encoder alone."""
    encoder = open_encoder(
        job.tokenizer, folder, dtype=job.spec.dtype, device=device, num_cpus=NUM_CPUS, storage_options={}
    )
    size = job.spec.preprocess.size
    frames = torch.randint(0, 256, (batch, 1, 3, size, size), dtype=torch.uint8, pin_memory=encoder.pin)
    encoder.submit(frames, batch).wait()
    # The same number on every lane: one that ends early would leave its core idle.
    num_batches = max(1, num_images // batch // encoder.num_lanes) * encoder.num_lanes

    def work(lane: int) -> None:
        submitted: deque[PendingBatch] = deque()
        for _ in range(lane, num_batches, encoder.num_lanes):
            submitted.append(encoder.submit(frames, batch))
            if len(submitted) == encoder.depth:
                submitted.popleft().wait()
        for pending in submitted:
            pending.wait()

    return _timed(work, num_batches * batch, encoder.num_lanes)


def job_rate(spec: JobSpec, kind: Any) -> tuple[float, float, float]:
    """Images per second, CPU milliseconds per image (driver and workers), and start-up seconds of a whole job."""
    began = time.monotonic()
    beginning = resolve(spec, gpus=spec.device == "cuda", storage_options={})
    storage = open_storage(spec.out)
    lease = take_lease(storage)
    write_beginning(storage, beginning)
    ledger = read_ledger(storage, 0)
    generation = first_generation(beginning.job, beginning.urls)
    driver = Driver(storage, generation, ledger, lease, spec, None)
    runner = _Warm(make_runner(storage, beginning.job, Execution(spec, kind, None, {}), driver.num_left))
    try:
        start_up = time.monotonic() - began
        cpu_before = _cpu_seconds()
        began = time.monotonic()
        driver.run(runner)
        write_manifest(storage, beginning.job, 0)
        seconds = time.monotonic() - began
        cpu = _cpu_seconds() - cpu_before
    finally:
        runner.close()
    lease.release()
    rows = read_ledger(storage, 0).totals.rows
    assert read_ledger(storage, 0).totals.failed == 0
    return rows / seconds, 1000 * cpu / rows, start_up


def _timed(work: Callable[[int], None], num_images: int, num_threads: int = NUM_CPUS) -> tuple[float, float]:
    torch.set_num_threads(1)
    cpu_before, began = time.process_time(), time.monotonic()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    seconds = time.monotonic() - began
    return num_images / seconds, 1000 * (time.process_time() - cpu_before) / num_images


def _cpu_seconds() -> float:
    """CPU seconds used so far by every live process that descends from this one, itself included."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents, times = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / ticks
    total = 0.0
    for pid in times:
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        total += times[pid] if ancestor == os.getpid() else 0.0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", action="store_true", help="an encoder that costs nothing, at 256 px")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--images", type=int, default=4000, help="images of one end-to-end run")
    parser.add_argument("--images-per-shard", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runners", nargs="+", default=["local", "ray"], choices=["local", "ray", "in-process"])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bsqtok-benchmark-"))
    try:
        run(arguments, folder)
    finally:
        shutil.rmtree(folder)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    shards = write_shards(folder / "shards", arguments.images, arguments.images_per_shard)
    size = sum(Path(shard).stat().st_size for shard in shards) / arguments.images / 1000
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"{device}, {NUM_CPUS} cores, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{arguments.images:,} photographs of 640x480 px, {size:.0f} kB of tar each, in {len(shards)} shards")
    values = {
        "shards": shards,
        "tokenizer": "stub" if arguments.stub else "default",
        "device": arguments.device,
        "run": {"batch": arguments.batch, "workers": arguments.workers},
    }
    if arguments.stub:
        values["preprocess"] = {"size": 256}
    resolved = resolve(parse_spec({**values, "out": str(folder)}, source="benchmark"), gpus=False, storage_options={})
    bare_loop = BareLoop(resolved.job.spec, shards)
    bare_loop.rate()
    table: dict[str, list[tuple[float, ...]]] = {}
    ratios: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        for kind in arguments.runners:
            out = folder / f"out-{number}-{kind}"
            spec = parse_spec({**values, "out": str(out)}, source="benchmark")
            job = resolve(spec, gpus=spec.device == "cuda", storage_options={}).job
            before = bare_loop.rate()
            end_to_end = job_rate(spec, kind)
            after = bare_loop.rate()
            decode = statistics.mean((before[0], after[0]))
            table.setdefault("decode only", []).extend([before, after])
            table.setdefault(f"end to end, {kind}", []).append(end_to_end)
            if arguments.stub:
                limit = decode
            else:
                num_encoded = arguments.images if arguments.device == "cuda" else arguments.images // 4
                model = model_rate(job, str(out / job.tokenizer.folder), arguments.batch, num_encoded, arguments.device)
                table.setdefault("model only", []).append(model)
                # Where decoding and model share the cores their times add up; beside a GPU the slower one decides.
                limit = 1 / (1 / model[0] + 1 / decode) if arguments.device == "cpu" else min(model[0], decode)
            ratios.setdefault(kind, []).append(end_to_end[0] / limit)
            print(
                f"round {number + 1}, {kind}: {end_to_end[0]:,.1f} of {limit:,.1f} images/s: {ratios[kind][-1]:.3f}",
                flush=True,
            )
            shutil.rmtree(out)
    bare_loop.close()
    print(f"\n{'':24}{'images/s':>10}{'CPU ms/image':>14}{'start-up s':>12}   (medians)")
    for name, rows in table.items():
        columns = [statistics.median(column) for column in zip(*rows, strict=True)]
        start_up = f"{columns[2]:12.1f}" if len(columns) > 2 else ""
        print(f"{name:24}{columns[0]:10,.1f}{columns[1]:14.2f}{start_up}")
    shared_cores = "1 / (1/model + 1/decode)" if arguments.device == "cpu" else "the smaller of model and decode"
    rule = "decoding and resizing alone" if arguments.stub else shared_cores
    for kind, of_kind in ratios.items():
        rounds = ", ".join(f"{ratio:.3f}" for ratio in of_kind)
        print(f"ratio to {rule}, {kind}: {statistics.median(of_kind):.3f} (rounds: {rounds})")


if __name__ == "__main__":
    sys.exit(main())
