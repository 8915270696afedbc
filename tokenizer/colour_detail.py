"""Makes the colours of training pictures as sharp as their brightness.

JPEG and video keep colours at half the resolution.  A tokenizer that has seen nothing else misreads pictures whose
colours are sharp: PNG files, and photographs that were reduced a lot.

Shape letters: B samples, T frames, H W pixels, C brightness (Y) and two colour differences."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_PX = 1.2
"""Of the blur that tells detail from the rest: about what colours lose at half the resolution."""
WINDOW_PX = 7
"""Side of the square in which colours are taken to follow brightness."""
LEAST_VARIANCE = 8e-4
"""Of brightness from -1 to 1: where there is less, nothing is said of how colours follow it."""
MOST_SLOPE = 1.0
LUMA = (0.299, 0.587, 0.114)

NUM_DRAWS = 6
"""Numbers that a sample's change is drawn from."""
LUMA_GAIN, COLOUR_GAIN = (0.0, 0.5), (0.5, 2.0)
LUMA_NOISE, COLOUR_NOISE = 0.01, 0.02


def sharpen_colours(frames_BTHWC: Tensor, draws_BD: np.ndarray, share: float) -> Tensor:
    """uint8 frames, of which about `share` of the samples get detail; `draws_BD` are uniform in [0, 1), D = NUM_DRAWS.

    Where colours follow brightness in a neighbourhood, its detail is added to them by the same slope; brightness is
    sharpened a little, and both get some noise.  All frames of a clip are changed alike."""
    chosen = np.flatnonzero(draws_BD[:, 0] < share)
    if not len(chosen):
        return frames_BTHWC
    where = torch.from_numpy(chosen).to(frames_BTHWC.device)
    clips = frames_BTHWC[where]
    drawn = draws_BD[chosen]
    changed = _change(clips.permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 127.5 - 1, drawn.repeat(clips.shape[1], 0))
    pixels = (changed * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    result = frames_BTHWC.clone()
    result[where] = torch.unflatten(pixels, 0, clips.shape[:2]).permute(0, 1, 3, 4, 2)
    return result


def _change(frames_BCHW: Tensor, drawn_BD: np.ndarray) -> Tensor:
    draws = torch.from_numpy(drawn_BD.astype(np.float32)).to(frames_BCHW.device)[..., None, None, None]
    to_ycc = _matrix(frames_BCHW)
    ycc = torch.einsum("ij,bjhw->bihw", to_ycc, frames_BCHW)
    blurred = _blur(ycc)
    luma, colour = blurred[:, :1], blurred[:, 1:]
    mean_luma, mean_colour = _mean(luma), _mean(colour)
    variance = _mean(luma * luma) - mean_luma**2
    slope = (_mean(luma * colour) - mean_luma * mean_colour) / (variance + LEAST_VARIANCE)
    detail = ycc[:, :1] - luma
    luma_gain, colour_gain = (low + (high - low) * draws[:, i] for i, (low, high) in ((1, LUMA_GAIN), (2, COLOUR_GAIN)))
    sharper = torch.cat(
        [ycc[:, :1] + luma_gain * detail, ycc[:, 1:] + colour_gain * slope.clamp(-MOST_SLOPE, MOST_SLOPE) * detail], 1
    )
    deviations = torch.cat([LUMA_NOISE * draws[:, 3], *(COLOUR_NOISE * draws[:, i] for i in (4, 5))], 1)
    return torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycc), sharper + deviations * _noise(ycc, drawn_BD))


def _noise(like_BCHW: Tensor, drawn_BD: np.ndarray) -> Tensor:
    # A sample's noise depends on its own draws alone, whichever process or batch it is in.
    seeds = (drawn_BD[:, 0] * 2**62).astype(np.int64)
    noise = [np.random.default_rng(seed).standard_normal(like_BCHW.shape[1:], dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(noise)).to(like_BCHW.device)


def _blur(frames_BCHW: Tensor) -> Tensor:
    reach = WINDOW_PX // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=frames_BCHW.device)
    window = torch.exp(-(offsets**2) / (2 * SIGMA_PX**2))
    window = (window / window.sum()).expand(frames_BCHW.shape[1], 1, -1)
    padded = F.pad(frames_BCHW, (reach,) * 4, mode="reflect")
    along = F.conv2d(padded, window[:, :, None], groups=len(window))
    return F.conv2d(along, window[:, :, :, None], groups=len(window))


def _mean(frames_BCHW: Tensor) -> Tensor:
    reach = WINDOW_PX // 2
    return F.avg_pool2d(F.pad(frames_BCHW, (reach,) * 4, mode="reflect"), WINDOW_PX, stride=1)


def _matrix(like: Tensor) -> Tensor:
    """RGB to brightness and colour differences (BT.601)."""
    red, green, blue = LUMA
    rows = [
        [red, green, blue],
        [-red / (2 - 2 * blue), -green / (2 - 2 * blue), 0.5],
        [0.5, -green / (2 - 2 * red), -blue / (2 - 2 * red)],
    ]
    return torch.tensor(rows, device=like.device)
