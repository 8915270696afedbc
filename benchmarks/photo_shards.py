"""Shards of photographs for the benchmarks: 640x480 JPEG (quality 90, 4:2:0) cut from the demo's photographs, each
with a caption and a json, as an ordinary corpus has them."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from jobs.demo_corpus import find_photos

SIZE = (640, 480)
NUM_DISTINCT = 240


def photographs() -> list[bytes]:
    """JPEG files of regions of real photographs; the same on every machine with the same Pillow."""
    generator = random.Random(0)
    sources = []
    for path in find_photos().values():
        with Image.open(path) as image:
            if image.mode == "RGB":
                sources.append(image.copy())
    files = []
    for number in range(NUM_DISTINCT):
        image = sources[number % len(sources)]
        scale = generator.uniform(0.6, 1.0)
        width = min(image.width, image.height * SIZE[0] / SIZE[1]) * scale
        height = width * SIZE[1] / SIZE[0]
        left = generator.uniform(0, image.width - width)
        top = generator.uniform(0, image.height - height)
        region = image.resize(SIZE, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        sink = io.BytesIO()
        region.save(sink, "JPEG", quality=90, subsampling="4:2:0")
        files.append(sink.getvalue())
    return files


def write_shards(folder: Path, num_images: int, images_per_shard: int) -> list[str]:
    """Write shards of `images_per_shard` photographs each and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = photographs()
    paths = []
    for first in range(0, num_images, images_per_shard):
        path = folder / f"photos-{first // images_per_shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + images_per_shard, num_images)):
                for extension, payload in _members(number, files[number % len(files)]):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
        paths.append(str(path))
    return paths


def _members(number: int, photo: bytes) -> Iterator[tuple[str, bytes]]:
    yield "jpg", photo
    yield "txt", f"photograph {number}".encode()
    yield "json", json.dumps({"number": number}).encode()
