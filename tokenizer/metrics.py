"""How close reconstructions are to their originals, in pixels as a viewer gets them: rounded to uint8.

Shape letters: B clips, T frames, N pictures, H W pixels, C the 3 colours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SpecError
from tokenizer.frechet import FeatureStatistics, frechet_distance
from tokenizer.i3d import LEAST_FRAMES, I3DLogits, load_i3d
from tokenizer.inception import InceptionFeatures, load_inception
from tokenizer.losses import SCALE_WEIGHTS, Perceptual, exact_convolutions, ms_ssim, psnr, ssim

LEAST_PX_OF_11_TAPS = 176
"""From this side on MS-SSIM has its usual window of 11 taps; its five scales need more than 160 px."""
MOST_DECIBELS = 100.0
"""What identical pictures get: JSON has no infinity."""
PICTURES_AT_ONCE = 64
"""Of a feature network, to bound memory."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over items: pictures, or clips, of which each is the mean over its frames."""

    mean: float
    std: float
    least: float
    p05: float
    median: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; `std` is that of the values, not of a sample."""
        points = np.quantile(np.asarray(values, np.float64), [0, 0.05, 0.5, 0.95, 1])
        return cls(float(np.mean(values)), float(np.std(values)), *(float(point) for point in points))


def ms_ssim_form(side_px: int) -> tuple[str, int]:
    """Name and taps of MS-SSIM for pictures of this short side: forms with another name are other numbers.

    `ms_ssim` has 11 taps and 5 scales, `ms_ssim_w7` 7 taps and 5 scales; of under 97 px `_s4`, `_s3` ... scales fit."""
    taps = 11 if side_px >= LEAST_PX_OF_11_TAPS else 7
    scales = next((n for n in range(len(SCALE_WEIGHTS), 1, -1) if side_px > (taps - 1) << (n - 1)), 1)
    name = "ms_ssim" if taps == 11 else "ms_ssim_w7"
    return name + (f"_s{scales}" if scales < len(SCALE_WEIGHTS) else ""), taps


def decibels(similarity: Tensor) -> Tensor:
    """-10 log10(1 - x), at most 100: spreads out similarities close to 1."""
    return (-10 * torch.log10((1 - similarity.double()).clamp_min(1e-10))).clamp_max(MOST_DECIBELS)


def picture_scores(originals_NHWC: Tensor, made_NHWC: Tensor) -> dict[str, Tensor]:
    """Each measure of each pair of uint8 pictures, [N]: psnr (dB), ssim, MS-SSIM under its name and in dB."""
    if originals_NHWC.dtype != torch.uint8 or made_NHWC.dtype != torch.uint8:
        raise SpecError(f"pictures are {originals_NHWC.dtype} and {made_NHWC.dtype}; measures are of uint8 pixels.")
    x, y = (each.permute(0, 3, 1, 2).float() for each in (originals_NHWC, made_NHWC))
    name, taps = ms_ssim_form(min(x.shape[-2:]))
    similarity = ms_ssim(x, y, data_range=255.0, taps=taps)
    return {
        "psnr": psnr(originals_NHWC, made_NHWC).clamp_max(MOST_DECIBELS),
        "ssim": ssim(x, y, data_range=255.0, taps=min(11, _largest_odd(min(x.shape[-2:])))),
        name: similarity,
        f"{name}_db": decibels(similarity),
    }


def _largest_odd(size: int) -> int:
    return size if size % 2 else size - 1


class FeatureNetworks:
    """What needs weights: LPIPS, and the networks of the Fréchet distances; each is left out where none are given."""

    def __init__(
        self,
        *,
        lpips: str | os.PathLike[str] | None = None,
        inception: str | os.PathLike[str] | None = None,
        i3d: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`lpips` is a folder, the others are files.  Raises CheckpointError for one that is named and is not there."""
        self.device = torch.device(device)
        self.lpips: Perceptual | None = None if lpips is None else Perceptual(lpips).to(device)
        self.inception: InceptionFeatures | None = None if inception is None else load_inception(inception).to(device)
        self.i3d: I3DLogits | None = None if i3d is None else load_i3d(i3d).to(device)

    @torch.no_grad()
    def distances(self, originals_NHWC: Tensor, made_NHWC: Tensor) -> dict[str, Tensor]:
        """LPIPS of each pair, [N], where there are weights."""
        if self.lpips is None:
            return {}
        scores = []
        for first in range(0, len(made_NHWC), PICTURES_AT_ONCE):
            pair = (each[first : first + PICTURES_AT_ONCE] for each in (originals_NHWC, made_NHWC))
            x, y = (each.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1 for each in pair)
            with exact_convolutions():
                scores.append(self.lpips(x, y).cpu())
        return {"lpips": torch.cat(scores)}

    @torch.no_grad()
    def features(self, clips_BTHWC: Tensor) -> dict[str, Tensor]:
        """Features of the Fréchet distances, [B, F] each: rfid of pictures, rfvd of clips of at least 9 frames."""
        clips_BCTHW = clips_BTHWC.permute(0, 4, 1, 2, 3)
        if clips_BTHWC.shape[1] == 1:
            parts = torch.split(clips_BCTHW[:, :, 0], PICTURES_AT_ONCE)
            return {} if self.inception is None else {"rfid": self._through(self.inception, parts)}
        if self.i3d is None or clips_BTHWC.shape[1] < LEAST_FRAMES:
            return {}
        return {"rfvd": self._through(self.i3d, torch.split(clips_BCTHW, 4))}

    def _through(self, network: torch.nn.Module, parts: Sequence[Tensor]) -> Tensor:
        with exact_convolutions():
            return torch.cat([network(part.to(self.device)).float().cpu() for part in parts])


class QualityMeter:
    """Collects the measures of one way to make pictures again: a tokenizer, or a codec at a rate."""

    def __init__(self, networks: FeatureNetworks | None = None) -> None:
        self._networks = networks or FeatureNetworks()
        self._made: dict[str, FeatureStatistics] = {}
        self.values: dict[str, list[float]] = {}
        """One number for each item, by measure, in the order in which they were added."""

    def add(self, originals_BTHWC: Tensor, made_BTHWC: Tensor) -> None:
        """Measure uint8 clips (pictures: T = 1) against their originals; a clip's number is the mean of its frames."""
        pairs = originals_BTHWC.flatten(0, 1), made_BTHWC.flatten(0, 1)
        scores = picture_scores(*pairs) | self._networks.distances(*pairs)
        for name, values_N in scores.items():
            of_clips = values_N.double().reshape(originals_BTHWC.shape[:2]).mean(1)
            self.values.setdefault(name, []).extend(of_clips.tolist())
        for name, features in self._networks.features(made_BTHWC).items():
            self._made.setdefault(name, FeatureStatistics()).add(features)

    def spreads(self) -> dict[str, Spread]:
        """Mean and spread of each measure."""
        return {name: Spread.of(values) for name, values in self.values.items()}

    def frechet_distances(self, originals: Mapping[str, FeatureStatistics]) -> dict[str, float]:
        """rfid and rfvd against the statistics of the originals, as far as there are two items."""
        return {
            name: frechet_distance(originals[name], made)
            for name, made in self._made.items()
            if made.count > 1 and name in originals
        }
