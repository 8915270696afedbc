"""What training minimises: similarity of pictures, perceptual distance, adversarial terms, the entropies' weight.

Shape letters: B pictures, C channels, H W pixels, T frames.  Pictures are planar floats; `data_range` is white where
black is 0, as SSIM needs it, 2 for pixels from -1 to 1 after 1 is added."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import CheckpointError, printable
from tokenizer.config import QuantizerLossConfig
from tokenizer.quantizer import LOG_FLOOR, QuantizerLosses

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales of MS-SSIM, from the finest (Wang, Simoncelli and Bovik 2003)."""
SIGMA_PX = 1.5
LOG_MSE_SCALE = 0.01
LOG_MSE_FLOOR = 0.001
"""36 dB: better pictures than that have no need to become better still."""
LEAST_SIMILARITY = 1e-6
"""A root's slope is infinite at 0, and a scale's contrast may fall below it early in training."""


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of fp32 in fp32, also on GPUs, where cuDNN may round their inputs to TF32: 10 bits after the first.

    For measures alone: they are differences of large numbers."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def ssim(x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = 2.0, taps: int = 11) -> Tensor:
    """Structural similarity of each pair of pictures, [B]: Gaussian window of `taps`, whole windows only."""
    similarity, _ = _similarity(x_BCHW.float(), y_BCHW.float(), data_range, taps)
    return similarity.mean(1)


def ms_ssim(x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = 2.0, taps: int = 11) -> Tensor:
    """Multi-scale structural similarity of each pair, [B].

    Five scales where the picture is larger than 16 * (taps - 1) px; a smaller one has fewer, whose weights are scaled
    to the same sum."""
    x, y = x_BCHW.float(), y_BCHW.float()
    shortest = min(x.shape[-2:])
    num_scales = next((n for n in range(len(SCALE_WEIGHTS), 1, -1) if shortest > (taps - 1) << (n - 1)), 1)
    weights = torch.tensor(SCALE_WEIGHTS[:num_scales]) * (sum(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS[:num_scales]))
    product = torch.ones(x.shape[:2], device=x.device)
    for scale in range(num_scales):
        similarity, contrast = _similarity(x, y, data_range, taps)
        last = scale == num_scales - 1
        product = product * (similarity if last else contrast).clamp_min(LEAST_SIMILARITY) ** float(weights[scale])
        if not last:
            padding = [side % 2 for side in x.shape[-2:]]
            x, y = (F.avg_pool2d(each, 2, padding=padding) for each in (x, y))
    return product.mean(1)


def _similarity(x: Tensor, y: Tensor, data_range: float, taps: int) -> tuple[Tensor, Tensor]:
    """Mean similarity and mean contrast-structure term of each channel, [B, C]."""

    def blur(images: Tensor) -> Tensor:
        return gaussian_blur(images, taps, SIGMA_PX)

    # bf16 would lose the variances, which are small differences of large numbers.
    with torch.autocast(x.device.type, enabled=False):
        mean_x, mean_y = blur(x), blur(y)
        variance_x = blur(x * x) - mean_x**2
        variance_y = blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        contrast = (2 * covariance + second) / (variance_x + variance_y + second)
        similarity = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first) * contrast
    return similarity.mean((2, 3)), contrast.mean((2, 3))


def gaussian_blur(x_BCHW: Tensor, taps: int, sigma_px: float) -> Tensor:
    """Pictures under a Gaussian window of `taps`, whole windows only: smaller by taps - 1 along both sides."""
    channels = x_BCHW.shape[1]
    offsets = torch.arange(taps, dtype=torch.float32, device=x_BCHW.device) - taps // 2
    window = torch.exp(-(offsets**2) / (2 * sigma_px**2))
    window = (window / window.sum()).expand(channels, 1, taps)
    with exact_convolutions():
        along = F.conv2d(x_BCHW, window[:, :, None], groups=channels)
        return F.conv2d(along, window[:, :, :, None], groups=channels)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each element of the first axis, pixels from -1 to 1 rounded to 8 bits."""
    difference = to_uint8(x).float() - to_uint8(y).float()
    error = difference.square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp_min(1e-10))


def reconstruction_loss(kind: Literal["l1", "mse", "log_mse"], difference_BCHW: Tensor) -> Tensor:
    """What pixels, from -1 to 1, are off: mean distance, mean square, or the mean over pictures of the square's log.

    The last is the mean PSNR, but for its floor and scale: a picture of little detail counts as much as one of much.
    Near its usual values, 0.01, its slope is that of the mean square."""
    if kind == "l1":
        return difference_BCHW.abs().mean()
    if kind == "mse":
        return difference_BCHW.square().mean()
    floored_B = difference_BCHW.square().flatten(1).mean(1) + LOG_MSE_FLOOR
    return LOG_MSE_SCALE * floored_B.log().mean()


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels from -1 to 1 as 0 to 255, rounded; uint8 stays as it is."""
    if pixels.dtype == torch.uint8:
        return pixels
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def generator_loss(fake_logits_B: Tensor) -> Tensor:
    """The non-saturating loss of the tokenizer: its reconstructions shall pass for real."""
    return F.softplus(-fake_logits_B).mean()


def discriminator_loss(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """The non-saturating loss of the discriminator."""
    return F.softplus(-real_logits_B).mean() + F.softplus(fake_logits_B).mean()


def r1_penalty(discriminator: nn.Module, real_BCHW: Tensor) -> Tensor:
    """Half the squared slope of the logits at real pictures (Mescheder et al. 2018), mean over the batch.

    The graph of the slope is kept, so the penalty has a gradient in the discriminator's parameters."""
    real = real_BCHW.detach().float().requires_grad_()
    with torch.autocast(real.device.type, enabled=False), exact_convolutions():
        logits = discriminator(real)
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean() / 2


class Perceptual(nn.Module):
    """LPIPS with a VGG-16 trunk (Zhang et al. 2018), version 0.1, of pictures [B, 3, H, W] from -1 to 1.

    Weights come from two local safetensors files; nothing is ever fetched."""

    TRUNK_FILE, HEADS_FILE = "vgg16.safetensors", "lpips_vgg.safetensors"
    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises CheckpointError where a file is missing or does not hold these weights."""
        super().__init__()
        path = Path(folder)
        trunk, heads = (_read_tensors(path / name, self.TRUNK_FILE) for name in (self.TRUNK_FILE, self.HEADS_FILE))
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.stages = nn.ModuleList()
        inputs, number = 3, 0
        for stage, widths in enumerate(self.STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage else []
            number += 1 if stage else 0
            for width in widths:
                layer = nn.Conv2d(inputs, width, 3, padding=1)
                for kind in ("weight", "bias"):
                    _fill(getattr(layer, kind), trunk, f"features.{number}.{kind}", path / self.TRUNK_FILE)
                layers += [layer, nn.ReLU()]
                inputs, number = width, number + 2
            self.stages.append(nn.Sequential(*layers))
            head = torch.empty(1, inputs, 1, 1)
            names = [name for name in (f"lin{stage}.model.1.weight", f"lin{stage}.weight") if name in heads]
            _fill(head, heads, names[0] if names else f"lin{stage}.weight", path / self.HEADS_FILE)
            self.register_buffer(f"head_{stage}", head)
        self.requires_grad_(False).eval()

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distance of each pair, [B]."""
        x, y = ((each - self.shift) / self.scale for each in (x_BCHW, y_BCHW))
        total = torch.zeros(len(x), device=x.device)
        for number, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)
            # Only the trunk may run in bf16: the features of near pictures differ by little.
            with torch.autocast(x.device.type, enabled=False):
                difference = (_unit(x) - _unit(y)).square()
                total = total + F.conv2d(difference, getattr(self, f"head_{number}")).mean((1, 2, 3))
        return total


def _unit(x_BCHW: Tensor) -> Tensor:
    x = x_BCHW.float()
    # Where all features are 0 the root's slope would be infinite.
    return x / (x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)


def _read_tensors(path: Path, trunk: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(
            f"{printable(str(path))}: LPIPS needs this file, which is not there, and nothing is fetched. Put {trunk} "
            "and its heads into that folder (docs/training.md says how), or train with the recipe no-lpips."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{printable(str(path))}: no readable safetensors file ({error}).") from error


@torch.no_grad()
def _fill(target: Tensor, weights: dict[str, Tensor], name: str, path: Path) -> None:
    found = tuple(weights[name].shape) if name in weights else None
    if found != tuple(target.shape):
        what = "is missing" if found is None else f"has shape {list(found)} instead of {list(target.shape)}"
        raise CheckpointError(
            f"{printable(str(path))}: tensor {name!r} {what}. These are not the weights of LPIPS-VGG."
        )
    target.copy_(weights[name])


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, with gradients to every one of them; itself in a single process.

    Where every process computes the same function of the mean and gradients are then averaged over processes, the
    result is that function's gradient on the joined batch."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    mean: Tensor = _MeanOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return mean


def quantizer_loss(losses: QuantizerLosses, config: QuantizerLossConfig) -> tuple[Tensor, Tensor]:
    """The quantizer's weighted sum and its codebook entropy (nats), of the codes of all processes together."""
    mean_GK = mean_over_ranks(losses.mean_assignment)
    codebook_entropy = -(mean_GK * (mean_GK + LOG_FLOOR).log()).sum()
    entropy = config.gamma0 * losses.sample_entropy - config.gamma * codebook_entropy
    return losses.commit + config.zeta * entropy / config.inv_temperature, codebook_entropy
