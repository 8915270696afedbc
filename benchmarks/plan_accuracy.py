"""Is what `bsq plan` says true?  Plans a job, runs it, and prints both beside each other.

Photographs of 640x480 px in shards of unequal size, some of them cut short, on this machine's CPU: once with the small
model, where the model is the limit, and once with the stub encoder at 256 px, where decoding is.

    python -m benchmarks.plan_accuracy [--images 1500] [--stub-images 20000]"""

from __future__ import annotations

import argparse
import io
import os
import platform
import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.photo_shards import photographs
from jobs.plan import plan_job
from jobs.start import start_job
from schemas.jobspec import parse_spec

BROKEN = 50
"""One picture in so many ends early."""
BOUND = 0.25


def write_shards(folder: Path, num_images: int, images_per_shard: int) -> list[str]:
    """Shards of a half to one and a half times `images_per_shard` photographs."""
    folder.mkdir(parents=True)
    files, generator = photographs(), random.Random(1)
    paths, written = [], 0
    while written < num_images:
        path = folder / f"photos-{len(paths):06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(written, written + round(images_per_shard * generator.uniform(0.5, 1.5))):
                payload = files[number % len(files)]
                if generator.random() < 1 / BROKEN:
                    payload = payload[: len(payload) // 2]
                for extension, data in (("jpg", payload), ("txt", b"a photograph")):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                written += 1
        paths.append(str(path))
    return paths


def compare(name: str, values: dict[str, Any], seconds: float) -> bool:
    """Plan and run one job; print what was planned and what came; return whether all is within the bound."""
    plan = plan_job(parse_spec(values, source=name), seconds=seconds)
    outcome = start_job(parse_spec(values, source=name), runner="local")
    made = outcome.progress
    rows = [
        ("samples", plan.samples, made.samples),
        ("rows", plan.rows, made.rows),
        ("tokens", plan.tokens, made.tokens),
        ("failed samples", sum(plan.failures.values()), made.failed_samples),
        ("output, bytes", plan.output_bytes, made.bytes),
        ("time, s", plan.seconds, made.seconds),
    ]
    print(f"\n{name}: limit {plan.limit}; {plan.measured_samples:,} samples measured on {plan.measured_on}\n")
    print("| what | planned | measured | ratio |\n|---|---|---|---|")
    good = True
    for what, planned, measured in rows:
        ratio = planned / measured if measured else 1.0
        good &= what == "failed samples" or abs(ratio - 1) <= BOUND
        print(f"| {what} | {planned:,.0f} | {measured:,.0f} | {ratio:.2f} |")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--stub-images", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=15.0)
    arguments = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory(prefix="bsq-plan-") as name:
        folder = Path(name)
        model = {"tokenizer": "default", "device": "cpu", "out": str(folder / "model-out")}
        stub = {"tokenizer": "stub", "preprocess": {"size": 256}, "device": "cpu", "out": str(folder / "stub-out")}
        model["shards"] = write_shards(folder / "model", arguments.images, 100)  # type: ignore[assignment]
        stub["shards"] = write_shards(folder / "stub", arguments.stub_images, 1000)
        good = compare("the small model", model, arguments.seconds)
        good &= compare("the stub encoder", stub, arguments.seconds)
    print(f"\n{'All' if good else 'NOT all'} within {BOUND:.0%}, failures aside, which are few.")


if __name__ == "__main__":
    main()
