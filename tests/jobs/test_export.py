"""Every format holds the rows of the dataset, as readers that know nothing of this project see them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from jobs.export import RECORD_NAME, export_dataset
from pipeline.storage import open_storage
from schemas.errors import OutputNotOurs, SpecError
from tests.running_jobs import StartJob
from tests.tiny_corpus import BSQ, bsq_environment

TARGETS = ["megatron", "mds", "webdataset", "npy"]


def without_some_captions(table: pa.Table) -> pa.Table:
    captions = [None if row % 3 == 0 else f"ein Bild, №{row}" for row in range(len(table))]
    return table.set_column(table.schema.get_field_index("caption"), table.schema.field("caption"), [captions])


@pytest.fixture
def dataset(write_dataset):
    """Three token files; each has four samples of 1 to 3 frames in two views."""
    return write_dataset(views=2, frames=lambda position: 1 + position % 3, edit_table=without_some_captions)


def rows_of(dataset) -> list[tuple[str, int, int, str | None, list[Any]]]:
    """Key, view, frames, caption and nested indices of every row, by NumPy alone."""
    rows = []
    for commit in dataset.commits:
        for row in pq.read_table(dataset.path(commit.file)).to_pylist():
            count = row["frames"] * 16
            bits = np.unpackbits(np.frombuffer(row["tokens"], np.uint8), count=count * 18, bitorder="little")
            indices = (bits.reshape(count, 18).astype(np.int64) @ (1 << np.arange(18))).reshape(-1, 4, 4)
            rows.append((row["key"], row["view"], row["frames"], row["caption"], indices.tolist()))
    return rows


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_npy(dataset, tmp_path):
    out = tmp_path / "out"
    exported = export_dataset(dataset.url, str(out), "npy")
    assert (exported.rows, exported.files, exported.written) == (24, 3, 3)
    rows = []
    for number in range(3):
        frames = np.load(out / f"tokens-{number:06d}.npy", mmap_mode="r")
        first = np.load(out / f"tokens-{number:06d}.first.npy")
        assert frames.dtype == np.int32
        lines = (out / f"tokens-{number:06d}.jsonl").read_text(encoding="utf-8").splitlines()
        for line, begin, end in zip(map(json.loads, lines), first, first[1:], strict=False):
            rows.append((line["key"], line["view"], line["frames"], line["caption"], frames[begin:end].tolist()))
    assert rows == rows_of(dataset)


def test_webdataset(dataset, tmp_path):
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "webdataset")
    shards = str(out / "tokens-{000000..000002}.tar")
    rows = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        named = sample["json"]
        assert sample["__key__"] == named["key"] + ("@0v1" if named["view"] else "")
        rows.append((named["key"], named["view"], named["frames"], sample.get("txt"), sample["npy"].tolist()))
        assert sample["npy"].dtype == np.int32
    assert rows == rows_of(dataset)


def mds_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Read MDS by its description (docs.mosaicml.com, "Dataset Format")."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        (num_samples,) = struct.unpack_from("<I", data)
        assert num_samples == shard["samples"]
        offsets = struct.unpack_from(f"<{num_samples + 1}I", data, 4)
        assert offsets[-1] == len(data)
        config = json.loads(data[4 * (num_samples + 2) : offsets[0]])
        assert config == {name: shard[name] for name in config}
        for begin in offsets[:-1]:
            variable = [size for size in shard["column_sizes"] if size is None]
            sizes = iter(struct.unpack_from(f"<{len(variable)}I", data, begin))
            place = begin + 4 * len(variable)
            row = {}
            for name, encoding, fixed in zip(
                shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True
            ):
                size = next(sizes) if fixed is None else fixed
                value = data[place : place + size]
                place += size
                if encoding == "int":
                    row[name] = struct.unpack("<q", value)[0]
                elif encoding == "str":
                    row[name] = value.decode()
                else:
                    assert encoding == "ndarray:int32" and value[0] == 3 << 2 | 1
                    row[name] = np.frombuffer(value, "<i4", offset=7).reshape(struct.unpack_from("<3H", value, 1))
            yield row


def test_mds(dataset, tmp_path):
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "mds")
    rows = [
        (row["key"], row["view"], row["frames"], row["caption"] or None, row["tokens"].tolist())
        for row in mds_rows(out)
    ]
    assert rows == rows_of(dataset)


def test_mds_as_its_own_library_reads_it(dataset, tmp_path):
    streaming = pytest.importorskip("streaming", reason="needs mosaicml-streaming")
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "mds")
    read = streaming.StreamingDataset(local=str(out), batch_size=1, shuffle=False)
    rows = [
        (row["key"], row["view"], row["frames"], row["caption"] or None, row["tokens"].tolist())
        for row in (read[number] for number in range(len(read)))
    ]
    assert rows == rows_of(dataset)


def megatron_sequences(folder: Path) -> list[list[int]]:
    """Read an indexed dataset by the description at the top of Megatron-LM's own reader."""
    index = (folder / "tokens.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and documents == sequences + 1
    dtype = {4: np.dtype("<i4"), 8: np.dtype("<u2")}[code]
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert bounds.tolist() == list(range(documents))
    data = (folder / "tokens.bin").read_bytes()
    assert len(data) == lengths.sum() * dtype.itemsize
    return [
        np.frombuffer(data, dtype, length, pointer).tolist() for length, pointer in zip(lengths, pointers, strict=True)
    ]


def test_megatron(dataset, tmp_path):
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "megatron")
    assert megatron_sequences(out) == [np.ravel(row[4]).tolist() for row in rows_of(dataset)]
    assert {path.name for path in out.iterdir()} == {"tokens.bin", "tokens.idx", RECORD_NAME}


def test_megatron_as_its_own_library_reads_it(dataset, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "megatron")
    read = indexed.IndexedDataset(str(out / "tokens"))
    assert [read[number].tolist() for number in range(len(read))] == [
        np.ravel(row[4]).tolist() for row in rows_of(dataset)
    ]


def test_megatron_with_ids_around_the_tokens(dataset, tmp_path):
    settings = tmp_path / "sequence.yaml"
    settings.write_text("id_offset: 3\nboi: 0\neof: 1\neos: 2\n", encoding="utf-8")
    out = tmp_path / "out"
    export_dataset(dataset.url, str(out), "megatron", sequence=settings)
    expected = []
    for *_, frames in rows_of(dataset):
        ids = [0]
        for frame in frames:
            ids += [3 + index for index in np.ravel(frame).tolist()] + [1]
        expected.append([*ids, 2])
    assert megatron_sequences(out) == expected


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_that_was_stopped_goes_on_to_the_same_bytes(dataset, tmp_path, target):
    """Stopped again and again, after each token file, with bytes behind the last whole one."""
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    export_dataset(dataset.url, str(unbroken), target)
    for stop_at in range(1, 4):

        def observe(done: int, total: int, stop_at: int = stop_at) -> None:
            if done == stop_at:
                raise Stopped

        with pytest.raises(Stopped):
            export_dataset(dataset.url, str(stopped), target, observe=observe)
        assert not json.loads((stopped / RECORD_NAME).read_text())["complete"]
        for name in ("unfinished/tokens.bin", "unfinished/lengths"):
            if (stopped / name).exists():
                with (stopped / name).open("ab") as file:
                    file.write(b"torn")
    resumed = export_dataset(dataset.url, str(stopped), target)
    assert resumed.written == 0
    assert files_of(stopped) == files_of(unbroken)
    assert "3 of them from an earlier run" in resumed.describe()
    assert export_dataset(dataset.url, str(stopped), target).written == 0
    assert files_of(stopped) == files_of(unbroken)


@pytest.mark.parametrize(
    ("target", "publication"),
    [
        ("npy", 1),
        ("npy", 6),
        ("megatron", 3),
        pytest.param("mds", 3, marks=pytest.mark.long),
        pytest.param("webdataset", 3, marks=pytest.mark.long),
    ],
)
def test_an_export_that_was_killed_goes_on_and_leaves_nothing_else(
    dataset, tmp_path, bsq, start: StartJob, target, publication
):
    """While it publishes its record, or something of the second token file."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    export_dataset(dataset.url, str(unbroken), target)
    command = ("export", dataset.url, "--to", target, "--out", killed)
    job = start(*command, hold_at="after_temp")
    for _ in range(publication - 1):
        job.wait_until_standing()
        job.let_go()
    job.wait_until_standing()
    job.kill()
    assert [path for path in killed.rglob(".*.tmp") if path.is_file()]
    assert (killed / RECORD_NAME).exists() == (publication > 1)
    done = bsq(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("from an earlier run" in done.stdout) == (publication > 1)
    assert files_of(killed) == files_of(unbroken)


def test_a_terminal_shows_a_bar(dataset, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [*BSQ, "export", dataset.url, "--to", "npy", "--out", str(tmp_path / "out")]
    environment = bsq_environment({"TERM": "xterm"})
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other side is closed
            os.close(ours)
    assert process.returncode == 0
    assert "token files" in shown.decode() and "3/3" in shown.decode() and "━" in shown.decode()


def test_a_stop_between_the_two_files_of_megatron_is_mended(dataset, tmp_path, monkeypatch):
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    export_dataset(dataset.url, str(unbroken), "megatron")

    def killed(path: Path, target: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Path, "rename", killed)
        export_dataset(dataset.url, str(stopped), "megatron")
    assert {path.name for path in stopped.iterdir()} == {"tokens.idx", "unfinished", RECORD_NAME}
    assert export_dataset(dataset.url, str(stopped), "megatron").written == 0
    assert files_of(stopped) == files_of(unbroken)


def test_what_is_not_this_export_is_left_alone(dataset, tmp_path):
    somebody = tmp_path / "somebody"
    somebody.mkdir()
    (somebody / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(OutputNotOurs, match=r"holds thesis\.tex and no export"):
        export_dataset(dataset.url, str(somebody), "npy")
    assert [path.name for path in somebody.iterdir()] == ["thesis.tex"]
    export_dataset(dataset.url, str(tmp_path / "out"), "npy")
    with pytest.raises(OutputNotOurs, match=r"another export \(to: npy there, mds asked for\)"):
        export_dataset(dataset.url, str(tmp_path / "out"), "mds")


def test_what_cannot_be_exported_is_refused_in_a_line(dataset, write_dataset, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(SpecError, match="Did you mean 'megatron'"):
        export_dataset(dataset.url, out, "megatronn")
    with pytest.raises(SpecError, match="there is no finished dataset"):
        export_dataset(str(tmp_path / "nothing"), out, "npy")
    settings = tmp_path / "sequence.yaml"
    settings.write_text("eoi: 5\n", encoding="utf-8")
    with pytest.raises(SpecError, match="eoi: 5 is also the id of a code"):
        export_dataset(dataset.url, out, "megatron", sequence=settings)
    with pytest.raises(SpecError, match="--sequence goes with --to megatron"):
        settings.write_text("eoi: 300000\n", encoding="utf-8")
        export_dataset(dataset.url, out, "npy", sequence=settings)
    with pytest.raises(SpecError, match=r"no setting 'eoy'.*Did you mean 'eo"):
        settings.write_text("eoy: 5\n", encoding="utf-8")
        export_dataset(dataset.url, out, "megatron", sequence=settings)
    assert not Path(out).exists()


def test_from_and_to_an_object_store(write_dataset, object_store, tmp_path):
    options = object_store.storage_options
    dataset = write_dataset(url=f"{object_store.url}/dataset", storage_options=options)
    export_dataset(dataset.url, f"{object_store.url}/npy", "npy", storage_options=options)
    stored = open_storage(f"{object_store.url}/npy", options)
    (tmp_path / "first.npy").write_bytes(stored.read_bytes("tokens-000000.npy"))
    assert np.load(tmp_path / "first.npy").shape == (4, 4, 4)
    assert json.loads(stored.read_bytes(RECORD_NAME))["complete"]
    with pytest.raises(SpecError, match="grow by appending"):
        export_dataset(dataset.url, f"{object_store.url}/megatron", "megatron", storage_options=options)


def test_the_command_says_what_it_wrote(dataset, tmp_path, bsq):
    done = bsq("export", dataset.url, "--to", "npy", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: 24 rows of 3 token files as npy\n"
    done = bsq("export", dataset.url, "--to", "mds", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert done.stderr.startswith("OutputNotOurs: ") and len(done.stderr.splitlines()) == 1
