"""`bsq generate` draws the same picture for the same options, keeps what it shall keep, and says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.cli import run
from jobs.generate import GenerateOptions, generate, kept_outside
from schemas.errors import CheckpointError, SpecError
from tests.tiny_corpus import jpeg
from tests.tiny_generators import save_tiny_generator
from tests.tiny_priors import TINY_TOKENIZER
from tokenizer.unmasking import SamplingOptions


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


def options(weights, **given):
    values = {"labels": ["shoes"], "count": 2, "tokenizer": TINY_TOKENIZER, "sampling": SamplingOptions(steps=3)}
    return GenerateOptions(weights=str(weights), **{**values, **given})


def test_a_grid_is_drawn_and_is_the_same_again(weights, tmp_path, capsys):
    arguments = ["generate", "--weights", weights, "--tokenizer", TINY_TOKENIZER, "--label", "shoes", "--label", "hat",
                 "--count", 3, "--steps", 2, "--seed"]  # fmt: skip
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run([*map(str, arguments), str(seed), "--out", str(tmp_path / f"{name}.png")]) == 0
    assert "Wrote 6 pictures to" in capsys.readouterr().out
    drawn = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert drawn[0] == drawn[1] != drawn[2]
    with Image.open(tmp_path / "a.png") as picture:
        # Three columns, and two rows, of pictures of 32 px five times as large.
        assert picture.width == 10 + 3 * 170 and picture.height > 2 * 160


def test_a_part_of_a_picture_is_drawn_anew(weights, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg(1))
    generate(options(weights, inpaint=tmp_path / "photo.jpg", box=(0, 0, 0.5, 1), count=1), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 10 + 2 * 170, "the picture's own tokens, then the sample"


def test_tokens_that_a_box_touches_are_not_kept():
    assert torch.equal(kept_outside((0.25, 0.5, 0.75, 1.0), (4, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1],
                       [1, 0, 0, 1], [1, 0, 0, 1]]).bool())  # fmt: skip
    assert kept_outside((0.3, 0.3, 0.31, 0.31), (2, 2)).tolist() == [[False, True], [True, True]]
    assert not kept_outside((0, 0, 1, 1), (3, 5)).any()


def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(weights, tmp_path):
    stranger = save_tiny_generator(tmp_path / "stranger", tokenizer_sha256="cd" * 32)
    wide = save_tiny_generator(tmp_path / "wide", grid=(5, 5), tokenizer_sha256="")
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    for given, error, message in (
        ({"labels": ["shoe"]}, SpecError, r"no class 'shoe'. Did you mean 'shoes'\?"),
        ({"count": 2000}, SpecError, r"2,000 pictures are asked for; it must be from 1 to 1,024"),
        ({"weights": str(tmp_path / "absent")}, CheckpointError, "absent"),
        ({"weights": str(stranger)}, CheckpointError, r"of tokenizer cdcdcdcd; untrained:vit-tiny-32-l18 is"),
        ({"weights": str(wide)}, CheckpointError, r"on a grid of \(5, 5\)"),
        ({"inpaint": tmp_path / "no.jpg"}, SpecError, r"no.jpg: "),
        ({"inpaint": tmp_path / "absent.jpg"}, SpecError, r"absent.jpg: cannot be read \(No such file"),
        ({"inpaint": tmp_path / "no.jpg", "box": (0.5, 0, 0.5, 1)}, SpecError, r"--box is 0.5,0,0.5,1; give left,top"),
        ({"box": (0, 0, 1, 1)}, SpecError, r"--box goes with --inpaint only"),
    ):
        with pytest.raises(error, match=message) as caught:
            generate(GenerateOptions(**{**vars(options(weights)), **given}), tmp_path / "grid.png")
        assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match=r"name a file that ends in .png"):
        generate(options(weights), tmp_path / "grid.jpg")
    assert run(["generate", "--weights", str(weights), "--out", str(tmp_path / "grid.png"), "--box", "1,2"]) == 2
    assert not (tmp_path / "grid.png").exists()


def test_inspect_says_what_the_weights_are(weights, capsys):
    assert run(["inspect", str(weights)]) == 0
    text = capsys.readouterr().out
    assert "generator of tokens (custom), weights" in text and "dress, hat, shoes" in text
    assert "18 bits in groups of 9, 4 x 4 tokens for each picture" in text
