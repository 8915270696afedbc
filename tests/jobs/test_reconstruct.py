"""Pictures come back as the tokenizer decodes them, originals as the job saw them, and errors say what to do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jobs.contact_sheet import Tile, draw_sheet
from jobs.reconstruct import TokenDecoder, _read_originals, _spread_rows, describe_psnr, reconstruct, side_by_side
from jobs.start import start_job
from pipeline.dataset_files import read_job
from pipeline.find_rows import find_rows, list_token_files, read_row
from pipeline.storage import open_storage
from pipeline.write_video import encode_mp4
from schemas.errors import BsqError, ShardNotFound, SpecError
from schemas.jobspec import parse_spec
from tests.tiny_corpus import jpeg, mp4, photo_members, write_tar
from tokenizer import from_pretrained
from tokenizer.codes import unpack_bits

TINY = "untrained:vit-tiny-32-l18"


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory) -> str:
    """A real dataset: ten pictures and a clip of 12 frames (so of 8 and 4) in two shards, two views of each."""
    folder = tmp_path_factory.mktemp("reconstruct")
    shards = [
        write_tar(folder / "photos.tar", photo_members(0, 10)),
        write_tar(folder / "clips.tar", [("walk/one.mp4", mp4(1, 12)), ("walk/two.jpg", jpeg(77))]),
    ]
    values = {"shards": [str(path) for path in shards], "out": str(folder / "tokens"), "tokenizer": TINY}
    values |= {"preprocess": {"crop": "random", "views": 2, "flip": 0.5}}
    assert start_job(parse_spec(values, source="test"), runner="in-process").exit_code == 0
    return values["out"]


def decoded(out: str, key: str, clip: int = 0, view: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the tokens of a row decode to, worked out with the tokenizer alone: uint8 [T, H, W, 3]."""
    (row,) = (
        row.values
        for row in find_rows(open_storage(out), key)
        if (row.values["clip"], row.values["view"]) == (clip, view)
    )
    packed = torch.frombuffer(bytearray(row["tokens"]), dtype=torch.uint8)[None]
    bits = unpack_bits(packed, row["frames"] * 16, 18).reshape(1, row["frames"], 4, 4, 18)
    frames = from_pretrained(TINY).decode(bits)[0]
    return ((frames + 1) / 2 * 255).round().to(torch.uint8).numpy()


# --- one sample


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_picture_holds_the_pixels_that_its_tokens_decode_to(tokenized, tmp_path, suffix):
    path = reconstruct(tokenized, "000003", view=1, target=tmp_path / f"x{suffix}")
    assert path == tmp_path / f"x{suffix}"
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), decoded(tokenized, "000003", view=1)[0])


@pytest.mark.parametrize(("clip", "num_frames"), [(0, 8), (1, 4)])
def test_a_clip_becomes_a_film_at_its_own_speed(tokenized, tmp_path, clip, num_frames):
    path = reconstruct(tokenized, "walk/one", clip=clip, target=tmp_path / "x.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.average_rate) == ("h264", 8)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    expected = decoded(tokenized, "walk/one", clip=clip)
    assert frames.shape == expected.shape == (num_frames, 32, 32, 3)
    # H.264 keeps colour at half the resolution, and what random weights decode to is noise of single pixels.
    grey = [film.astype(float).mean(-1) for film in (frames, expected)]
    assert np.abs(grey[0] - grey[1]).mean() < 4


def test_a_clip_becomes_a_gif_or_a_sheet_of_all_frames(tokenized, tmp_path):
    gif = Image.open(reconstruct(tokenized, "walk/one", target=tmp_path / "x.gif"))
    assert (gif.n_frames, gif.info["duration"]) == (8, 120)  # a GIF counts in hundredths of a second
    sheet = Image.open(reconstruct(tokenized, "walk/one", target=tmp_path / "x.png"))
    assert sheet.width > 4 * 160


def test_the_file_is_named_after_the_key_and_lies_in_the_working_folder(tokenized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reconstruct(tokenized, "walk/one", clip=1, view=1) == Path("walk_one-clip1-view1.mp4")
    assert reconstruct(tokenized, "walk/two") == Path("walk_two.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["walk_one-clip1-view1.mp4", "walk_two.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": "00003"}, "no row has the key '00003'. Keys like it: '000003', "),
        ({"key": "zebra"}, "no row has the key 'zebra', and none is like it."),
        ({"key": "000003", "shard": 1}, "no row has the key '000003' in shard 1; it is in shard 0."),
        ({"key": "000003", "clip": 1}, "'000003' has no clip 1 with view 0; its clips are 0, its views 0 to 1."),
        (
            {"key": "walk/one", "view": 2},
            "has no clip 0 with view 2; its clips are 0 to 1, its views 0 to 1.",
        ),
        ({"key": "000003", "target": "x.mp4"}, "x.mp4: '000003' is a picture; name a file that ends in .png,"),
        (
            {"key": "walk/one", "target": "x.jpg"},
            "x.jpg: 'walk/one' is a clip of 8 frames; name a file that",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tokenized, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        reconstruct(tokenized, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_key_of_several_shards_asks_which(write_dataset, tmp_path):
    def same_keys(table):
        return table.set_column(0, table.schema.field("key"), pa.array(["a", "b", "c", "d"]))

    dataset = write_dataset(edit_table=same_keys)
    with pytest.raises(SpecError, match=r"'b' is in 3 shards: 0, 1, 2. Name one with --shard."):
        reconstruct(dataset.url, "b", target=tmp_path / "x.png")
    reconstruct(dataset.url, "b", shard=2, target=tmp_path / "x.png")
    assert {row.source.shard for row in find_rows(dataset.storage, "b")} == {0, 1, 2}


def test_a_sample_that_failed_says_why(write_dataset, tmp_path):
    with pytest.raises(SpecError, match=r"its sample failed \(NoMedia: only a \.txt member\)"):
        reconstruct(write_dataset().url, "001/00004", target=tmp_path / "x.png")


def test_a_dataset_that_is_not_finished_can_be_looked_at(write_dataset, tmp_path):
    dataset = write_dataset(finished=False)
    assert reconstruct(dataset.url, "002/00001", target=tmp_path / "x.png").is_file()
    with pytest.raises(BsqError, match="generation 0 is not finished"):
        reconstruct(dataset.url, "002/00001", generation=0, target=tmp_path / "x.png")


def test_tokens_in_an_object_store_are_decoded_as_well(write_dataset, object_store, tmp_path):
    dataset = write_dataset(url=f"{object_store.url}/dataset", storage_options=object_store.storage_options)
    options = dataset.storage_options
    assert reconstruct(dataset.url, "001/00002", target=tmp_path / "x.png", storage_options=options).is_file()


def test_the_stub_is_refused_in_one_line(write_dataset, tmp_path):
    dataset = write_dataset()
    path = dataset.path("job.json")
    job = json.loads(path.read_text())
    job["tokenizer"]["config"]["preset"] = "stub"
    path.write_text(json.dumps(job))
    with pytest.raises(SpecError, match="whose tokens cannot be decoded"):
        reconstruct(dataset.url, "001/00002", target=tmp_path / "x.png")


def test_a_token_file_that_is_gone_points_to_verify(write_dataset, tmp_path):
    dataset = write_dataset()
    dataset.path(dataset.commits[1].file).unlink()
    with pytest.raises(BsqError, match=r"it is gone or damaged\. Run `bsq verify"):
        reconstruct(dataset.url, "001/00002", target=tmp_path / "x.png")


# --- finding


def test_every_row_is_found_by_its_key_and_by_its_number(tokenized):
    storage = open_storage(tokenized)
    for source in list_token_files(storage):
        for number in range(source.rows):
            row = read_row(storage, source, number)
            assert row.values in [found.values for found in find_rows(storage, row.values["key"])]


# --- beside the originals


def test_originals_read_again_give_the_stored_tokens(tokenized):
    storage = open_storage(tokenized)
    job = read_job(storage)
    assert job is not None
    rows = [read_row(storage, source, number) for source in list_token_files(storage) for number in range(source.rows)]
    assert len(rows) == 2 * (10 + 2 + 1)
    originals = _read_originals(rows, job, None)
    model = from_pretrained(TINY)
    for number, row in enumerate(rows):
        frames_BTCHW = torch.from_numpy(originals[number]).permute(0, 3, 1, 2)[None]
        assert model.encode_packed(frames_BTCHW).packed.numpy().tobytes() == row.values["tokens"]


def test_a_sheet_shows_original_above_reconstruction(tokenized, tmp_path):
    sheet = np.asarray(Image.open(side_by_side(tokenized, tmp_path / "s.png", keys=["000003", "walk/two"])))
    expected = decoded(tokenized, "000003")[0].repeat(5, 0).repeat(5, 1)  # 32 px enlarged to 160
    top = next(y for y in range(sheet.shape[0]) if np.array_equal(sheet[y : y + 160, 10:170], expected))
    job = read_job(open_storage(tokenized))
    assert job is not None
    original = _read_originals(find_rows(open_storage(tokenized), "000003")[:1], job, None)[0][0]
    assert np.array_equal(sheet[top - 162 : top - 2, 10:170], original.repeat(5, 0).repeat(5, 1))


@pytest.mark.parametrize("count", [1, 3, 13, 26, 100])
def test_without_keys_rows_are_spread_evenly_over_the_dataset(tokenized, count):
    storage = open_storage(tokenized)
    every = [read_row(storage, source, number) for source in list_token_files(storage) for number in range(source.rows)]
    places = [every.index(row) for row in _spread_rows(storage, count, None)]
    assert len(places) == min(count, len(every))
    steps = np.diff(places)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert abs(places[0] - (len(every) - 1 - places[-1])) <= 1


def test_a_sheet_without_keys_is_drawn(tokenized, tmp_path):
    with Image.open(side_by_side(tokenized, tmp_path / "s.png", count=6)) as sheet:
        assert sheet.width == 10 + 4 * 170


def test_an_original_that_is_gone_or_was_replaced_is_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", photo_members(0, 2))
    values = {"shards": [str(shard)], "out": str(tmp_path / "tokens"), "tokenizer": TINY}
    start_job(parse_spec(values, source="test"), runner="in-process")
    write_tar(shard, photo_members(5, 2))
    with pytest.raises(SpecError, match="sample 0 is not '000000' any more"):
        side_by_side(values["out"], tmp_path / "s.png")
    write_tar(shard, photo_members(0, 1))
    with pytest.raises(SpecError, match="fewer samples than when its tokens were made"):
        side_by_side(values["out"], tmp_path / "s.png")
    shard.unlink()
    with pytest.raises(ShardNotFound):
        side_by_side(values["out"], tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()


def test_nothing_to_draw_is_said(write_dataset, tmp_path):
    with pytest.raises(SpecError, match="no rows"):
        side_by_side(write_dataset(num_shards=0).url, tmp_path / "s.png")


def test_psnr_of_a_known_pair():
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert describe_psnr(black, black) == "identical"
    # An error of 16 everywhere: 20 log10(255 / 16) = 24.05.
    assert describe_psnr(black, black + 16) == "24.0 dB"


def test_captions_stay_within_their_picture():
    pixels = np.zeros((64, 64, 3), np.uint8)
    sheet = np.asarray(draw_sheet("t", [Tile([pixels], ["key/" * 50]), Tile([pixels], ["\x1b\n"])]))
    gap = sheet[:, 10 + 192 : 10 + 192 + 10]
    assert (gap == 255).all()


def test_odd_sides_are_padded_for_h264(tmp_path):
    frames = np.full((3, 31, 33, 3), 200, np.uint8)
    with av.open(io.BytesIO(encode_mp4(frames, 12.5))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (34, 32, 12.5)
        assert [round(float(frame.time), 2) for frame in container.decode(stream)] == [0.0, 0.08, 0.16]


def test_the_first_frames_alone_decode_to_what_they_do_among_the_others(tokenized):
    storage = open_storage(tokenized)
    job = read_job(storage)
    assert job is not None
    row = next(row for row in find_rows(storage, "walk/one") if row.values["frames"] == 8)
    decoder = TokenDecoder(storage, job, None)
    assert np.array_equal(decoder.frames(row, 3), decoder.frames(row)[:3])
