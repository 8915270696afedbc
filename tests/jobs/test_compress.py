"""Pictures, clips and rows go into .bsq files and come back as their tokens say; whatever is wrong is one line."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from jobs.cli import run
from jobs.compress import CompressOptions, compress, safe_name
from jobs.decompress import decode_files, decompress, read_bsq, require_same_tokens
from jobs.inspect import describe
from pipeline.tiles import cut_tiles, join_tiles
from schemas.errors import OutputNotOurs, SpecError, StreamError
from tests.tiny_corpus import mp4
from tests.tiny_priors import TINY_TOKENIZER, save_tiny_prior
from tests.token_datasets import TokenDatasetWriter
from tokenizer import BSQViT
from tokenizer.checkpoint import read_checkpoint
from tokenizer.losses import to_uint8


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return save_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture of one tile, one of six, and a smaller one."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for name, height, width in (("one", 32, 32), ("six", 40, 90), ("small", 20, 9)):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def options(prior, **values):
    return CompressOptions(tokenizer=TINY_TOKENIZER, prior=str(prior), **values)


def back(files, out, prior, **values):
    return decompress([str(file) for file in files], out, tokenizer=TINY_TOKENIZER, prior=str(prior), **values)


def reconstructed(pixels_HWC):
    """What the tokenizer makes of a picture, tile by tile, without any coding."""
    model = BSQViT.from_pretrained(TINY_TOKENIZER)
    tiles = torch.from_numpy(cut_tiles(pixels_HWC[None], (32, 32)))
    made = to_uint8(model.decode(model.encode(tiles))).numpy()
    return join_tiles(made, *pixels_HWC.shape[:2])[0]


@pytest.mark.parametrize("pack", [False, True])
def test_pictures_come_back_as_their_tokens_decode(prior, pictures, tmp_path, pack):
    written = compress([str(path) for path in pictures], tmp_path / "coded", options(prior, pack=pack))
    assert [each.path.name for each in written] == (["pack.bsq"] if pack else ["one.bsq", "six.bsq", "small.bsq"])
    for each in written:
        assert each.path.stat().st_size == each.num_bytes
        assert pack or each.num_bytes - each.file.payload_bytes <= 48
    paths = back([each.path for each in written], tmp_path / "decoded", prior)
    assert [path.name for path in paths] == ["one.png", "six.png", "small.png"]
    for source, path in zip(pictures, paths, strict=True):
        expected = reconstructed(np.asarray(Image.open(source)))
        assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_one_file_of_many_is_read_alone(prior, pictures, tmp_path):
    """It lay in a lane beside the others, and is decoded without them."""
    written = compress([str(path) for path in pictures], tmp_path / "coded", options(prior, lanes=4))
    assert [each.file.first_lane for each in written] == [0, 1, 3]
    assert len(written[1].file.streams) == 2
    for each in written:
        (path,) = back([each.path], tmp_path / each.path.stem, prior)
        assert path.exists()


def test_clips_are_cut_in_time_and_space(prior, tmp_path):
    source = tmp_path / "walk.mp4"
    source.write_bytes(mp4(1, 11))
    (written,) = compress([str(source)], tmp_path / "coded", options(prior))
    (item,) = written.file.items
    assert item.frames == 11 and item.step_us > 0
    assert set(written.file.clips(item)) == {8, 3}
    (path,) = back([written.path], tmp_path / "decoded", prior)
    assert path.suffix == ".mp4" and path.stat().st_size > 100
    text = describe(str(written.path))
    assert f"a clip of 11 frames at {1e6 / item.step_us:.4g} fps" in text and "bits per token" in text


def test_rows_of_a_dataset_come_back_bit_for_bit(prior, tmp_path):
    sha256 = read_checkpoint(TINY_TOKENIZER).weight_sha256()
    dataset = TokenDatasetWriter(
        url=str(tmp_path / "tokens"),
        clips_of_file=[3, 2],
        grid=(4, 4),
        weight_sha256=sha256,
        frames=lambda file, clip: 1 + (file + clip) % 3,
    ).write()
    (written,) = compress([dataset.url], tmp_path / "coded", options(prior, pack=True, lanes=3))
    assert len(written.file.items) == 5
    paths = back([written.path], tmp_path / "decoded", prior, tokens=True)
    for row, path in zip(dataset.rows, paths, strict=True):
        assert np.array_equal(np.load(path), dataset.indices(row))
    text = describe(str(written.path))
    assert "a pack of 5 items" in text and "0000/000000: a picture of 32 x 32 px" in text
    (limited,) = compress([dataset.url], tmp_path / "limited", options(prior, pack=True, limit=2))
    assert [item.name for item in limited.file.items] == [row.key for row in dataset.rows[:2]]


def test_what_cannot_be_compressed_is_named_and_nothing_is_written(prior, pictures, tmp_path):
    out = tmp_path / "coded"
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:100])
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.png").write_bytes(pictures[0].read_bytes())
    stranger = save_tiny_prior(tmp_path / "stranger", seed=1)
    other = save_tiny_prior(tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace(read_checkpoint(TINY_TOKENIZER).weight_sha256(), "cd" * 32))
    one = str(pictures[0])
    for inputs, given, message in (
        ([one, str(broken)], options(prior), "broken.png: "),
        ([one, str(tmp_path / "text.png")], options(prior), "text.png: "),
        ([one, str(tmp_path / "absent.png")], options(prior), r"absent.png: cannot be read"),
        ([one, str(tmp_path / "sub" / "one.png")], options(prior), r"would be written to one.bsq. Use --pack"),
        ([], options(prior), "No inputs are named"),
        ([one], options(other), r"is for tokens of tokenizer cdcdcdcd; those of untrained:vit-tiny-32-l18"),
        ([one], CompressOptions(tokenizer=TINY_TOKENIZER, prior="untrained:prior-small"), r"is for 18 bits on a grid"),
    ):
        with pytest.raises(SpecError, match=message) as caught:
            compress(inputs, out, given)
        assert "\n" not in str(caught.value)
    assert not out.exists()
    (written,) = compress([one], out, options(prior))
    with pytest.raises(OutputNotOurs, match=r"one.bsq is there already"):
        compress([one], out, options(prior))
    with pytest.raises(StreamError, match=r"one.bsq: made with prior .*Name the one it was made with: --prior DIR"):
        back([written.path], tmp_path / "decoded", stranger)
    with pytest.raises(StreamError, match=r"one.bsq: made with tokenizer"):
        decompress([str(written.path)], tmp_path / "decoded", tokenizer="untrained:vit-small-128-l18", prior=str(prior))


def test_bad_files_are_one_line_and_nothing_is_written(prior, pictures, tmp_path, capsys):
    (written,) = compress([str(pictures[1])], tmp_path / "coded", options(prior))
    content = written.path.read_bytes()
    out = tmp_path / "decoded"
    arguments = ["--tokenizer", TINY_TOKENIZER, "--prior", str(prior), "--out", str(out)]
    for number, (bad, message) in enumerate(
        (
            (content[:-3], "damaged or cut off"),
            (content[:50] + bytes([content[50] ^ 1]) + content[51:], "damaged or cut off"),
            (b"", "no .bsq file"),
            (content[:3] + b"\x09" + content[4:], "format version 9"),
        )
    ):
        path = tmp_path / f"bad-{number}.bsq"
        path.write_bytes(bad)
        assert run(["decompress", str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and path.name in error
    assert run(["decompress", str(tmp_path / "absent.bsq"), *arguments]) == 2
    assert not out.exists()


def test_a_machine_that_computes_other_probabilities_says_so(prior, pictures, tmp_path):
    """A last digit of one weight stands for arithmetic that rounds differently."""
    from dataclasses import replace

    from tokenizer.prior_checkpoint import build_prior, read_prior
    from tokenizer.prior_coder import PriorCoder

    (written,) = compress([str(pictures[1])], tmp_path / "coded", options(prior))
    named = read_bsq(written.path)
    other = build_prior(read_prior(prior))
    with torch.no_grad():
        other.head_bias += torch.linspace(0, 0.5, other.head_bias.shape[1])
    (clips,) = decode_files(PriorCoder(other, lanes=named.file.lanes), [named.file])
    with pytest.raises(StreamError, match="its tokens come out differently here"):
        require_same_tokens(named, clips)
    wrong = replace(named.file, tokens_crc32=named.file.tokens_crc32 ^ 1)
    written.path.write_bytes(wrong.to_bytes())
    with pytest.raises(StreamError, match=r"six.bsq: its tokens come out differently here"):
        back([written.path], tmp_path / "decoded", prior)
    assert not (tmp_path / "decoded").exists()


def test_the_commands_say_what_a_file_takes(prior, pictures, tmp_path, capsys):
    models = ["--tokenizer", TINY_TOKENIZER, "--prior", str(prior)]
    assert run(["compress", str(pictures[0]), "--out", str(tmp_path / "coded"), *models]) == 0
    line = capsys.readouterr().out
    assert "one.bsq: " in line and "of 18 bits per token" in line
    assert run(["inspect", str(tmp_path / "coded" / "one.bsq")]) == 0
    assert "a picture of 32 x 32 px" in capsys.readouterr().out
    assert run(["inspect", str(prior)]) == 0
    assert "prior over tokens (custom)" in capsys.readouterr().out
    assert run(["decompress", str(tmp_path / "coded" / "one.bsq"), "--out", str(tmp_path / "decoded"), *models]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'decoded' / 'one.png'}\n"
    assert run(["compress", str(pictures[0]), "--out", str(tmp_path), "--fps", "fast", *models]) == 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (33, 64), (5, 70)])
def test_tiles_join_to_the_picture_they_were_cut_from(height, width):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    tiles = cut_tiles(frames, (32, 32))
    assert tiles.shape[1:] == (2, 32, 32, 3)
    assert np.array_equal(join_tiles(tiles, height, width), frames)
    assert np.array_equal(tiles[0][:, :height, :width], frames[:, :32, :32])


@hypothesis.given(name=st.text(max_size=300))
@hypothesis.example("../" * 40 + "\u6f22" * 200)
def test_any_key_makes_a_name_that_a_file_can_have(name):
    safe = safe_name(name)
    assert safe and "/" not in safe and safe not in (".", "..") and len(safe.encode()) <= 200
