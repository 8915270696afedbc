"""Rows/s and bytes on disk of this loader and of others, over the same rows, shuffled, in batches of 256.

Every system runs as its documentation advises (links below) in one process without workers, pinned to one core, and
gives int64 tensors [256, 1024].  It is set up in a process of its own, runs one epoch that is not timed, in which the
checksum of all rows must be right, then the timed ones.  Rounds are interleaved, so that other load strikes all alike;
what matters are ratios, on a busy machine those of processor time.

    pip install mosaicml-streaming litdata
    python -m benchmarks.loading_peers --folder /fast/disk/peers

What is not installed is left out.  The memmap without a loader (`bare loop`) has neither state nor order to keep and
nothing to decode: it is the limit, not a peer."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.token_rows import TokenRows, row_checksums

BATCH = 256
Batches = Iterator[torch.Tensor]
NUM_TOKENS = 1024


@dataclass(frozen=True)
class System:
    """How one loader writes the rows, and how it gives the batches of an epoch."""

    title: str
    write: Callable[[TokenRows, Path], None]
    open: Callable[[Path], Callable[[int], Batches]]
    packages: tuple[str, ...] = ()
    stored_as: str | None = None
    """Name of the system whose files it reads; its own unless told."""


# --- this project


def write_ours(rows: TokenRows, out: Path) -> None:
    rows.write_dataset(out)


def open_ours(out: Path, view: str = "index", prefetch: int = 4) -> Callable[[int], Batches]:
    from pipeline import TokenDataset, TokenLoader

    loader = TokenLoader(TokenDataset(out, view=view), BATCH, seed=0, prefetch=prefetch)

    def epoch(number: int) -> Batches:
        for batch in loader:
            yield batch[view]

    return epoch


# --- MosaicML streaming: https://docs.mosaicml.com/projects/streaming/en/stable/getting_started/quick_start.html


def write_mds(rows: TokenRows, out: Path) -> None:
    from streaming import MDSWriter

    # A fixed shape and dtype, so that none is stored with each sample.
    with MDSWriter(out=str(out), columns={"tokens": f"ndarray:int32:{NUM_TOKENS}"}) as writer:
        for _, indices in rows.files():
            for row in indices.astype(np.int32):
                writer.write({"tokens": row})


def open_mds(out: Path) -> Callable[[int], Batches]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, batch_size=BATCH)

    def epoch(number: int) -> Batches:
        for batch in loader:
            yield batch["tokens"].long()

    return epoch


# --- litdata: https://github.com/Lightning-AI/litData#speed-up-model-training


def _litdata_rows(file: int, num_rows: int, rows_per_file: int, flat: bool) -> Iterator[Any]:
    rows = TokenRows(num_rows, rows_per_file)
    for number, (_, indices) in enumerate(rows.files()):
        if number == file:
            for row in indices.astype(np.int32):
                yield torch.from_numpy(row) if flat else {"tokens": row}
            return


def write_litdata(rows: TokenRows, out: Path, tokens_loader: bool = False) -> None:
    import litdata

    item_loader = litdata.TokensLoader(block_size=NUM_TOKENS) if tokens_loader else None
    litdata.optimize(
        fn=functools.partial(
            _litdata_rows, num_rows=rows.num_rows, rows_per_file=rows.rows_per_file, flat=tokens_loader
        ),
        inputs=list(range(-(-rows.num_rows // rows.rows_per_file))),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=1,
        item_loader=item_loader,
    )


def open_litdata(out: Path) -> Callable[[int], Batches]:
    import litdata

    dataset = litdata.StreamingDataset(str(out), shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)

    def epoch(number: int) -> Batches:
        for batch in loader:
            yield batch["tokens"].long()

    return epoch


def open_litdata_tokens(out: Path) -> Callable[[int], Batches]:
    """https://github.com/Lightning-AI/litData#features, "LLM Pre-training"."""
    import litdata

    item_loader = litdata.TokensLoader(block_size=NUM_TOKENS)
    dataset = litdata.StreamingDataset(str(out), item_loader=item_loader, shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)

    def epoch(number: int) -> Batches:
        for batch in loader:
            yield batch.long()

    return epoch


# --- Hugging Face datasets: https://huggingface.co/docs/datasets/use_with_pytorch


def write_hugging_face(rows: TokenRows, out: Path) -> None:
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=NUM_TOKENS)})

    def generate() -> Iterator[dict[str, Any]]:
        for _, indices in rows.files():
            for row in indices.astype(np.int32):
                yield {"tokens": row}

    made = datasets.Dataset.from_generator(generate, features=features, cache_dir=str(out.with_suffix(".cache")))
    made.save_to_disk(str(out))


def open_hugging_face(out: Path, form: str = "torch") -> Callable[[int], Batches]:
    import datasets

    loader = DataLoader(datasets.load_from_disk(str(out)).with_format(form), batch_size=BATCH, shuffle=True)

    def epoch(number: int) -> Batches:
        for batch in loader:
            yield batch["tokens"].long()

    return epoch


def open_hugging_face_iterable(out: Path) -> Callable[[int], Batches]:
    """https://huggingface.co/docs/datasets/stream#shuffle"""
    import datasets

    # The documentation's way to shuffle quickly: shards, and a buffer of 1,000.
    iterable = datasets.load_from_disk(str(out)).to_iterable_dataset(num_shards=40).with_format("torch")
    iterable = iterable.shuffle(seed=0, buffer_size=1000)
    loader = DataLoader(iterable, batch_size=BATCH)

    def epoch(number: int) -> Batches:
        iterable.set_epoch(number)
        for batch in loader:
            yield batch["tokens"].long()

    return epoch


# --- WebDataset: https://github.com/webdataset/webdataset#webdataset


def write_webdataset(rows: TokenRows, out: Path) -> None:
    import webdataset

    out.mkdir(parents=True)
    for number, (keys, indices) in enumerate(rows.files()):
        # A time with a fraction would cost a header of 1 kB for each sample.
        with webdataset.TarWriter(str(out / f"tokens-{number:06d}.tar"), mtime=0) as writer:
            for key, row in zip(keys, indices.astype(np.int32), strict=True):
                writer.write({"__key__": key, "npy": row})


def open_webdataset(out: Path) -> Callable[[int], Batches]:
    import webdataset

    shards = sorted(map(str, out.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode().to_tuple("npy").batched(BATCH)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=0)

    def epoch(number: int) -> Batches:
        for (tokens,) in loader:
            yield torch.as_tensor(tokens).long()

    return epoch


# --- one flat file of uint32, as nanoGPT and Megatron-LM keep tokens


def write_memmap(rows: TokenRows, out: Path) -> None:
    out.mkdir(parents=True)
    with (out / "tokens.bin").open("wb") as file:
        for _, indices in rows.files():
            file.write(indices.astype(np.uint32).tobytes())


class MemmapDataset(Dataset[torch.Tensor]):
    """Map style, a row at a time."""

    def __init__(self, path: Path) -> None:
        self.rows = np.memmap(path, np.uint32, "r").reshape(-1, NUM_TOKENS)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[row].astype(np.int64))


def open_memmap(out: Path) -> Callable[[int], Batches]:
    loader = DataLoader(MemmapDataset(out / "tokens.bin"), batch_size=BATCH, shuffle=True)
    return lambda number: iter(loader)


def open_bare_memmap(out: Path) -> Callable[[int], Batches]:
    rows = MemmapDataset(out / "tokens.bin").rows

    def epoch(number: int) -> Batches:
        order = np.random.default_rng(number).permutation(len(rows))
        for first in range(0, len(rows), BATCH):
            yield torch.from_numpy(rows[order[first : first + BATCH]].astype(np.int64))

    return epoch


SYSTEMS = {
    "ours": System("this project", write_ours, open_ours),
    "ours-no-thread": System(
        "this project, prefetch=0", write_ours, functools.partial(open_ours, prefetch=0), stored_as="ours"
    ),
    "mds": System("MosaicML streaming", write_mds, open_mds, ("mosaicml-streaming",)),
    "litdata": System("litdata StreamingDataset", write_litdata, open_litdata, ("litdata",)),
    "litdata-tokens": System(
        "litdata TokensLoader", functools.partial(write_litdata, tokens_loader=True), open_litdata_tokens, ("litdata",)
    ),
    "hf": System("HF datasets, map style, torch", write_hugging_face, open_hugging_face, ("datasets",)),
    "hf-numpy": System(
        "HF datasets, map style, numpy",
        write_hugging_face,
        functools.partial(open_hugging_face, form="numpy"),
        ("datasets",),
        "hf",
    ),
    "hf-iterable": System("HF datasets, iterable", write_hugging_face, open_hugging_face_iterable, ("datasets",), "hf"),
    "webdataset": System("WebDataset", write_webdataset, open_webdataset, ("webdataset",)),
    "memmap": System("uint32 memmap, DataLoader", write_memmap, open_memmap),
    "memmap-bare": System("uint32 memmap, bare loop", write_memmap, open_bare_memmap, stored_as="memmap"),
}


def measure(name: str, folder: Path, checksum: int, num_rows: int, epochs: int) -> None:
    """Run one system in this process and print its rows/s as JSON."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    epoch = SYSTEMS[name].open(folder / (SYSTEMS[name].stored_as or name))
    total, seen = 0, 0
    for tokens in epoch(0):
        assert tokens.dtype == torch.int64, tokens.dtype
        rows = tokens.numpy().reshape(len(tokens), NUM_TOKENS)
        total, seen = total + int(row_checksums(rows).sum()), seen + len(rows)
    assert (seen, total % (1 << 63)) == (num_rows, checksum), f"{name}: other rows than written"
    rates = []
    for number in range(1, 1 + epochs):
        begun, cpu = time.perf_counter(), time.process_time()
        seen = sum(len(tokens) for tokens in epoch(number))
        assert seen == num_rows, seen
        rates.append((seen / (time.perf_counter() - begun), seen / (time.process_time() - cpu)))
    print(json.dumps(rates), flush=True)


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def prepare(name: str, rows: TokenRows, folder: Path) -> None:
    """Write the files of a system, in a process of its own: some start threads and caches that stay."""
    if not (folder / name).exists():
        print(f"writing {name}", file=sys.stderr)
        writer = multiprocessing.get_context("spawn").Process(target=SYSTEMS[name].write, args=(rows, folder / name))
        writer.start()
        writer.join()
        assert writer.exitcode == 0, name


def run_once(name: str, folder: Path, checksum: int, num_rows: int, epochs: int) -> tuple[float, float]:
    """Rows per second, and per second of this process's processor time: medians of the epochs of one process."""
    command = [sys.executable, "-m", "benchmarks.loading_peers", "--folder", str(folder), "--rows", str(num_rows)]
    command += ["--measure", name, "--checksum", str(checksum), "--epochs", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr[-2000:]}")
    wall, cpu = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return statistics.median(wall), statistics.median(cpu)


def size_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def describe_ratios(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], which: int) -> str:
    """How many times faster the first system was: median over the rounds, least and most."""
    ratios = [each[which] / other[which] for each, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the rows are written, once")
    parser.add_argument("--rows", type=int, default=61_440)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs in each round")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--checksum", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder, options.checksum, options.rows, options.epochs)
        return

    assert options.rows % BATCH == 0, f"give a multiple of {BATCH} rows, so that no system drops any"
    rows = TokenRows(options.rows, rows_per_file=1536)
    options.folder.mkdir(parents=True, exist_ok=True)
    checksum = rows.checksum()
    systems = [name for name in options.systems if all(map(is_installed, SYSTEMS[name].packages))]
    for name in systems:
        prepare(SYSTEMS[name].stored_as or name, rows, options.folder)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for number in range(options.rounds):
        for name in systems:
            rates[name].append(run_once(name, options.folder, checksum, options.rows, options.epochs))
            print(f"round {number + 1}: {name:<16} {rates[name][-1][0]:>12,.0f} rows/s", file=sys.stderr)

    packages = {"torch", "numpy", "pyarrow", *(each for name in systems for each in SYSTEMS[name].packages)}
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in sorted(packages))
    print(f"{platform.machine()}, one core; Python {platform.python_version()}, {versions}")
    print(f"{options.rows:,} rows of {NUM_TOKENS:,} tokens of {rows.bits} bits; medians of {options.rounds} rounds\n")
    uint32 = options.rows * NUM_TOKENS * 4
    print("| | rows/s | rows per CPU second | this project: rows/s | per CPU second | MB | of uint32 |")
    print("|---|---|---|---|---|---|---|")
    for name in systems:
        wall, cpu = (statistics.median(each) for each in zip(*rates[name], strict=True))
        faster = " | ".join(describe_ratios(rates[systems[0]], rates[name], which) for which in (0, 1))
        size = size_on_disk(options.folder / (SYSTEMS[name].stored_as or name))
        print(
            f"| {SYSTEMS[name].title} | {wall:,.0f} | {cpu:,.0f} | {faster} | {size / 1e6:.1f} | {size / uint32:.1%} |"
        )


if __name__ == "__main__":
    main()
