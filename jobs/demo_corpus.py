"""A small corpus of real photographs and clips for a first run.

The photographs are files inside the wheels of scikit-image and scikit-learn.  They are opened as files: neither
package is imported, so nothing of theirs can reach for the network.  The same versions of Pillow and PyAV make the
same bytes."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from schemas.errors import SpecError

NUM_PHOTO_SHARDS = 3
CROPS_PER_PHOTO = 3
LONG_SIDE_PX = 640
"""Of a whole photograph; crops keep the resolution of their source."""
MIN_CROP_PX = 160

CLIP_SIZE = (320, 240)
CLIP_RATE = 24
_X264 = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
"""x264's macroblock tree gives other bytes from run to run, even in one thread; so does another number of threads."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One sample photograph and where it lies."""

    file: str
    """Path inside the package."""
    caption: str

    @property
    def name(self) -> str:
        return Path(self.file).stem


_SKIMAGE = [
    Photo("data/astronaut.png", "an astronaut in an orange suit beside a flag"),
    Photo("data/camera.png", "a man looking through a camera on a tripod"),
    Photo("data/chelsea.png", "the face of a tabby cat"),
    Photo("data/coffee.png", "a cup of coffee with a spoon on a wooden table"),
    Photo("data/coins.png", "old coins laid out in rows"),
    Photo("data/rocket.jpg", "a rocket on its launch pad at dusk"),
    Photo("data/hubble_deep_field.jpg", "distant galaxies on a black sky"),
    Photo("data/motorcycle_left.png", "a motorcycle in a garage"),
    Photo("data/brick.png", "a brick wall"),
    Photo("data/grass.png", "grass seen from above"),
    Photo("data/gravel.png", "gravel on the ground"),
    Photo("data/moon.png", "craters of the moon"),
]
_SKLEARN = [
    Photo("datasets/images/china.jpg", "a pagoda above trees in China"),
    Photo("datasets/images/flower.jpg", "an orange flower"),
]
_PACKAGES = {"skimage": ("scikit-image", _SKIMAGE), "sklearn": ("scikit-learn", _SKLEARN)}


@dataclass(frozen=True, slots=True)
class _Move:
    """A camera move over a photograph: centre and zoom at its beginning and end."""

    photo: str
    seconds: int
    begin: tuple[float, float, float]
    """x and y of the centre as shares of the sides, and the zoom; 1 is the largest window that fits."""
    end: tuple[float, float, float]


_MOVES = [
    _Move("china", 2, (0.3, 0.5, 1.3), (0.7, 0.5, 1.3)),
    _Move("coffee", 2, (0.5, 0.5, 1.0), (0.52, 0.45, 2.5)),
    _Move("astronaut", 3, (0.45, 0.25, 2.5), (0.5, 0.6, 1.2)),
    _Move("rocket", 3, (0.5, 0.8, 2.5), (0.5, 0.3, 1.6)),
]


@dataclass(frozen=True, slots=True)
class DemoCorpus:
    """What was written."""

    shards: list[Path]
    num_images: int
    num_clips: int
    num_bytes: int
    keys: list[str]
    """Keys of all samples, in the order of the shards."""


def build_demo_corpus(folder: Path) -> DemoCorpus:
    """Write the shards `photos-000000.tar`, ... and `clips-000000.tar` into `folder`, which is created.

    Each sample has a caption (.txt), a label (.cls, the number of its photograph) and what it was made from (.json).
    Raises SpecError when the packages with the photographs are missing."""
    photos = find_photos()
    folder.mkdir(parents=True, exist_ok=True)
    images = list(_image_samples(photos))
    clips = list(_clip_samples(photos))
    contents = {"clips-000000.tar": clips}
    per_shard = math.ceil(len(images) / NUM_PHOTO_SHARDS)
    for shard in range(NUM_PHOTO_SHARDS):
        contents[f"photos-{shard:06d}.tar"] = images[shard * per_shard : (shard + 1) * per_shard]
    for name, samples in contents.items():
        _write_shard(folder / name, samples)
    shards = [folder / name for name in contents]
    return DemoCorpus(
        shards=shards,
        num_images=len(images),
        num_clips=len(clips),
        num_bytes=sum(path.stat().st_size for path in shards),
        keys=[sample["__key__"] for samples in contents.values() for sample in samples],
    )


def find_photos() -> dict[Photo, Path]:
    """Where each sample photograph lies.  Raises SpecError naming the packages that are missing."""
    found = {}
    missing = []
    for package, (distribution, photos) in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            missing.append(distribution)
            continue
        root = Path(spec.submodule_search_locations[0])
        # Another release may have dropped a photograph; the demo goes on with the others.
        found.update({photo: root / photo.file for photo in photos if (root / photo.file).is_file()})
    if missing:
        raise SpecError(
            f"The demo's photographs are files of {' and '.join(missing)}, not installed here. "
            f"Install them with: pip install 'bsqtok[demo]'"
        )
    if not found:
        raise SpecError(
            "The installed scikit-image and scikit-learn hold none of the demo's photographs. "
            "Install the versions that constraints.txt names."
        )
    return found


def _image_samples(photos: dict[Photo, Path]) -> Iterator[dict[str, Any]]:
    for label, (photo, path) in enumerate(photos.items()):
        image = _open_rgb(path)
        boxes = [(0, 0, *image.size), *_crop_boxes(photo.name, image.size)]
        for number, box in enumerate(boxes):
            picture = image.crop(box)
            picture.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
            extension, payload = _encode_image(picture, label + number)
            yield {
                "__key__": f"{photo.name}-{number:02d}",
                extension: payload,
                "txt": f"{photo.caption}, detail" if number else photo.caption,
                "cls": str(label),
                "json": json.dumps({"photo": path.name, "box": box, "width": picture.width, "height": picture.height}),
            }


def _crop_boxes(name: str, size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    # Seeded by the name: crops stay the same when another photograph comes or goes.
    rng = random.Random(f"bsqtok demo {name}")
    width, height = size
    for _ in range(CROPS_PER_PHOTO):
        least = min(MIN_CROP_PX, width, height)
        crop_width = rng.randint(max(least, width // 3), max(least, width * 3 // 4))
        crop_height = rng.randint(max(least, height // 3), max(least, height * 3 // 4))
        left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
        yield left, top, left + crop_width, top + crop_height


def _encode_image(picture: Image.Image, number: int) -> tuple[str, bytes]:
    """Encode as one of the formats that a real corpus mixes; of seven, four are JPEG."""
    sink = io.BytesIO()
    match number % 7:
        case 0 | 3:
            picture.save(sink, "JPEG", quality=92)
            return "jpg", sink.getvalue()
        case 1:
            picture.save(sink, "JPEG", quality=85, progressive=True)
            return "jpg", sink.getvalue()
        case 5:
            picture.save(sink, "JPEG", quality=95, subsampling=0)
            return "jpeg", sink.getvalue()
        case 2:
            picture.save(sink, "PNG", compress_level=3)
            return "png", sink.getvalue()
        case 4:
            picture.save(sink, "WEBP", quality=88, method=2)
            return "webp", sink.getvalue()
        case _:
            picture.convert("L").save(sink, "PNG", compress_level=3)
            return "png", sink.getvalue()


def _clip_samples(photos: dict[Photo, Path]) -> Iterator[dict[str, Any]]:
    by_name = {photo.name: (label, photo, path) for label, (photo, path) in enumerate(photos.items())}
    for number, move in enumerate(move for move in _MOVES if move.photo in by_name):
        label, photo, path = by_name[move.photo]
        yield {
            "__key__": f"clip-{number:02d}-{photo.name}",
            "mp4": _film(_open_rgb(path), move),
            "txt": f"the camera moves over {photo.caption}",
            "cls": str(label),
            "json": json.dumps({"photo": path.name, "seconds": move.seconds, "fps": CLIP_RATE}),
        }


def _film(photo: Image.Image, move: _Move) -> bytes:
    """Film the move over a photograph: an H.264 clip in MP4."""
    sink = io.BytesIO()
    try:
        container = av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"})
        stream = container.add_stream("libx264", rate=Fraction(CLIP_RATE), options=_X264)
    except (ValueError, av.FFmpegError) as error:
        raise SpecError(
            f"This PyAV cannot encode H.264 ({error}). Install it from the Python package index: pip install av"
        ) from error
    stream.width, stream.height = CLIP_SIZE
    stream.pix_fmt = "yuv420p"
    with container:
        for box in _boxes(photo.size, move):
            picture = photo.resize(CLIP_SIZE, Image.Resampling.BICUBIC, box=box)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return sink.getvalue()


def _boxes(size: tuple[int, int], move: _Move) -> Iterator[tuple[float, float, float, float]]:
    """Window of each frame: it starts and stops gently and zooms by equal factors in equal times."""
    width, height = size
    fit = min(width / CLIP_SIZE[0], height / CLIP_SIZE[1])
    num_frames = move.seconds * CLIP_RATE
    for frame in range(num_frames):
        share = (1 - math.cos(math.pi * frame / (num_frames - 1))) / 2
        x, y = (begin + share * (end - begin) for begin, end in zip(move.begin[:2], move.end[:2], strict=True))
        zoom = move.begin[2] * (move.end[2] / move.begin[2]) ** share
        box_width, box_height = CLIP_SIZE[0] * fit / zoom, CLIP_SIZE[1] * fit / zoom
        left = min(max(x * width - box_width / 2, 0), width - box_width)
        top = min(max(y * height - box_height / 2, 0), height - box_height)
        yield left, top, left + box_width, top + box_height


def _open_rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> None:
    from webdataset import TarWriter  # takes a second: it imports torch

    temporary = path.with_name(f".{path.name}.tmp")
    # mtime: the archive's bytes must not depend on the day.
    with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            encoded = {
                name: value.encode() if isinstance(value, str) and name != "__key__" else value
                for name, value in sample.items()
            }
            writer.write(encoded)
    temporary.rename(path)
