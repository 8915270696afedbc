"""Makes the colours of training pictures as sharp as their brightness.

JPEG and video keep colours at half the resolution.  A tokenizer that has seen nothing else misreads pictures whose
colours are sharp: PNG files, and photographs that were reduced a lot.

Shape letters: B samples, T frames, H W pixels, C brightness (Y) and two colour differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.losses import gaussian_blur, to_uint8

SIGMA_PX = 1.2
"""Of the blur that tells detail from the rest: about what colours lose at half the resolution."""
WINDOW_PX = 7
"""Side of the square in which colours are taken to follow brightness."""
LEAST_VARIANCE = 8e-4
"""Of brightness from -1 to 1: where there is less, nothing is said of how colours follow it."""
MOST_SLOPE = 1.0
RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""BT.601, as in JPEG."""
LUMA_GAIN, COLOUR_GAIN = (0.0, 0.5), (0.5, 2.0)
NOISE = (0.01, 0.02, 0.02)
"""Largest standard deviation of brightness and colours, from -1 to 1."""
NUM_DRAWS = 6
"""Numbers that a sample's change is drawn from: whether, two gains, three deviations."""

Draws = np.ndarray[Any, np.dtype[np.float64]]


def sharpen_colours(frames_BTHWC: Tensor, draws_BD: Draws, share: float) -> Tensor:
    """uint8 frames, of which about `share` of the samples get detail; `draws_BD` are uniform in [0, 1), D = NUM_DRAWS.

    Where colours follow brightness in a neighbourhood, its detail is added to them by the same slope; brightness is
    sharpened a little, and both get some noise.  All frames of a clip are changed alike."""
    chosen = np.flatnonzero(draws_BD[:, 0] < share)
    if not len(chosen):
        return frames_BTHWC
    where = torch.from_numpy(chosen).to(frames_BTHWC.device)
    clips_BTCHW = frames_BTHWC[where].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    result = frames_BTHWC.clone()
    result[where] = to_uint8(_sharper(clips_BTCHW, draws_BD[chosen])).permute(0, 1, 3, 4, 2)
    return result


def _sharper(clips_BTCHW: Tensor, draws_BD: Draws) -> Tensor:
    device = clips_BTCHW.device
    rgb_to_ycc = torch.tensor(RGB_TO_YCC, device=device)
    ycc = torch.einsum("ij,btjhw->btihw", rgb_to_ycc, clips_BTCHW).flatten(0, 1)
    blurred = gaussian_blur(_padded(ycc), WINDOW_PX, SIGMA_PX)
    luma, colour = blurred[:, :1], blurred[:, 1:]
    mean_luma, mean_colour = _mean(luma), _mean(colour)
    variance = _mean(luma * luma) - mean_luma**2
    slope = (_mean(luma * colour) - mean_luma * mean_colour) / (variance + LEAST_VARIANCE)
    detail = ycc[:, :1] - luma
    follows = torch.cat([detail, slope.clamp(-MOST_SLOPE, MOST_SLOPE) * detail], 1)
    follows = torch.unflatten(follows, 0, clips_BTCHW.shape[:2])
    draws = torch.from_numpy(draws_BD.astype(np.float32)).to(device)[..., None, None, None]
    luma_gain, colour_gain = (low + (high - low) * draws[:, i] for i, (low, high) in ((1, LUMA_GAIN), (2, COLOUR_GAIN)))
    gains = torch.cat([luma_gain, colour_gain, colour_gain], 1)[:, None]
    noise = torch.tensor(NOISE, device=device)[:, None, None] * draws[:, 3:, 0] * _noise(draws_BD, clips_BTCHW)
    added = gains * follows + noise[:, None]
    return clips_BTCHW + torch.einsum("ij,btjhw->btihw", torch.linalg.inv(rgb_to_ycc), added)


def _noise(draws_BD: Draws, clips_BTCHW: Tensor) -> Tensor:
    """[B, C, H, W] for each sample, whichever process or batch it is in."""
    seeds = (draws_BD[:, 0] * 2**62).astype(np.int64)
    shape = clips_BTCHW.shape[2:]
    noise = [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(noise)).to(clips_BTCHW.device)


def _mean(frames_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(_padded(frames_BCHW), WINDOW_PX, stride=1)


def _padded(frames_BCHW: Tensor) -> Tensor:
    return F.pad(frames_BCHW, (WINDOW_PX // 2,) * 4, mode="reflect")
