"""Training pictures get colours as sharp as their brightness, the same whoever draws them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.data import astronaut
from skimage.filters import gaussian

from tokenizer.colour_detail import NUM_DRAWS, sharpen_colours


def photograph() -> np.ndarray:
    """A photograph whose colours are as sharp as its brightness, uint8 [128, 128, 3]."""
    return np.array(Image.fromarray(astronaut()).resize((128, 128), Image.Resampling.LANCZOS))


def colour_detail(picture: np.ndarray) -> float:
    ycc = rgb2ycbcr(picture)
    return float(np.std([ycc[..., i] - gaussian(ycc[..., i], 1.2) for i in (1, 2)]))


def as_jpeg(picture: np.ndarray) -> np.ndarray:
    """With its colours at half the resolution."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return np.array(Image.open(file))


def changed(pictures: np.ndarray, draws: np.ndarray, share: float = 1.0) -> np.ndarray:
    return sharpen_colours(torch.from_numpy(pictures[:, None]), draws, share)[:, 0].numpy()


def test_colours_that_jpeg_blurred_become_about_as_sharp_as_they_were() -> None:
    draws = np.full((1, NUM_DRAWS), 0.4)
    draws[:, 3:] = 0
    soft = as_jpeg(photograph())
    sharp = changed(soft[None], draws)[0]
    assert colour_detail(soft) < 0.6 * colour_detail(photograph())
    assert 0.7 * colour_detail(photograph()) < colour_detail(sharp) < 1.5 * colour_detail(photograph())
    assert float(np.abs(sharp.astype(float) - soft).mean()) < 4


def test_a_share_of_the_samples_is_changed_and_the_rest_left_alone() -> None:
    draws = np.random.default_rng(0).random((40, NUM_DRAWS))
    pictures = np.repeat(photograph()[None], 40, 0)
    after = changed(pictures, draws, 0.5)
    same = (after == pictures).all((1, 2, 3))
    assert (same == (draws[:, 0] >= 0.5)).all()
    assert 10 < same.sum() < 30
    assert changed(pictures, draws, 0.0) is not None and (changed(pictures, draws, 0.0) == pictures).all()


def test_a_sample_changes_alike_whatever_is_beside_it() -> None:
    draws = np.random.default_rng(1).random((4, NUM_DRAWS))
    pictures = np.stack([photograph(), as_jpeg(photograph()), photograph()[::-1], photograph()[:, ::-1]])
    together = changed(pictures, draws)
    alone = np.concatenate([changed(pictures[i : i + 1], draws[i : i + 1]) for i in range(4)])
    assert np.abs(together.astype(int) - alone).max() <= 1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_colour_gets_noise_only(value: int) -> None:
    plain = np.full((1, 128, 128, 3), value, np.uint8)
    draws = np.random.default_rng(2).random((1, NUM_DRAWS))
    after = changed(plain, draws).astype(int)
    assert np.abs(after - value).max() < 30 and abs(after.mean() - value) < 3
    draws[:, 3:] = 0
    assert (changed(plain, draws) == plain).all()


def test_all_frames_of_a_clip_are_changed_alike() -> None:
    clip = torch.from_numpy(np.stack([photograph()] * 3))[None]
    after = sharpen_colours(clip, np.random.default_rng(3).random((1, NUM_DRAWS)), 1.0)[0]
    assert after.shape == clip.shape[1:] and torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
