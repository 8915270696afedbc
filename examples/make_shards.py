"""Turn a folder of pictures and videos into WebDataset shards that `bsq tokenize` reads.

    python examples/make_shards.py FOLDER SHARDS [--samples 1000]

A picture or video becomes one sample.  Its key is a number and its file name; beside it goes a `.json` with the path
that it had, and a `.txt` with the text of a file of the same name that ends in `.txt`, if there is one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset

MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"} | {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v",
}  # fmt: skip


def media_files(folder: Path) -> list[Path]:
    """Pictures and videos anywhere under `folder`, sorted; what a hidden folder or file holds is left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in MEDIA
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    """One sample for each file: what WebDataset's writer calls a dictionary of members."""
    for number, path in enumerate(media_files(folder)):
        # A key ends at the first dot of the name, so dots inside a name must go.
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "sample"
        sample: dict[str, Any] = {
            "__key__": f"{number:07d}-{name}",
            path.suffix.lower().removeprefix("."): path.read_bytes(),
            "json": {"path": path.relative_to(folder).as_posix()},
        }
        caption = path.with_suffix(".txt")
        if caption.is_file():
            sample["txt"] = caption.read_text(encoding="utf-8")
        yield sample


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a folder of pictures and videos into WebDataset shards.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of pictures and videos")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder to write shards to, made if need be")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="samples in one shard (default: 1000)")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder")
    if not media_files(arguments.folder):
        parser.error(f"{arguments.folder} holds no picture and no video")

    arguments.shards.mkdir(parents=True, exist_ok=True)
    num_samples = 0
    pattern = str(arguments.shards / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=arguments.samples, verbose=0) as writer:
        for sample in samples(arguments.folder):
            writer.write(sample)
            num_samples += 1
        num_shards = writer.shard
    print(f"Wrote {num_samples:,} samples in {num_shards:,} shards to {arguments.shards}.")


if __name__ == "__main__":
    main()
