"""Tells real pictures from reconstructions: the residual discriminator of StyleGAN2 (Karras et al., arXiv 1912.04958).

Written from the paper in plain torch, so that gradients of gradients work everywhere: equalised learning rate,
residual blocks with blurred downsampling, and the deviation within a small group of pictures as a last channel.

Shape letters: B pictures, C channels, H W pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import SpecError

LEAK = 0.2
GAIN = math.sqrt(2)
"""Keeps the variance through a leaky rectifier, as in the paper's implementation notes."""
LAST_SIZE = 4
"""Height and width where the convolutions end."""
DEVIATION_GROUP = 4
"""Pictures whose deviation is measured together."""


class EqualisedConv(nn.Module):
    """Convolution whose weights are N(0, 1) and scaled at run time, so that all layers learn at one speed."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = (inputs * kernel * kernel) ** -0.5
        self.stride = stride
        self.padding = kernel // 2 if stride == 1 else 0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualisedLinear(nn.Module):
    """The same for a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Blur(nn.Module):
    """Low-pass filter (1, 3, 3, 1) before every other pixel is dropped."""

    def __init__(self, padding: tuple[int, int]) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.kernel: Tensor
        self.register_buffer("kernel", taps[:, None] * taps, persistent=False)
        self.padding = padding

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        padded = F.pad(x_BCHW, (*self.padding, *self.padding))
        return F.conv2d(padded, self.kernel.to(x_BCHW.dtype).expand(channels, 1, 4, 4), groups=channels)


class ResidualBlock(nn.Module):
    """Halves height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = EqualisedConv(inputs, inputs, 3)
        self.conv_down = nn.Sequential(Blur((2, 2)), EqualisedConv(inputs, outputs, 3, stride=2))
        self.skip = nn.Sequential(Blur((1, 1)), EqualisedConv(inputs, outputs, 1, stride=2, bias=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        main = _rectify(self.conv_down(_rectify(self.conv_in(x_BCHW))))
        out: Tensor = (main + self.skip(x_BCHW)) / math.sqrt(2)
        return out


class Discriminator(nn.Module):
    """Pictures from -1 to 1, [B, 3, H, W] -> one logit each, [B]; higher is more like a real one."""

    def __init__(self, image_size: int, *, channels: int = 64, max_channels: int = 512, seed: int = 0) -> None:
        """`channels` at full size, doubled with every halving up to `max_channels`; weights drawn from `seed`."""
        super().__init__()
        num_blocks = round(math.log2(image_size / LAST_SIZE))
        if num_blocks < 1 or image_size != LAST_SIZE << num_blocks:
            raise SpecError(
                f"image_size is {image_size}; the adversarial loss needs a power of 2 from {2 * LAST_SIZE} px on. "
                "Set losses.adversarial_weight to 0."
            )
        widths = [min(max_channels, channels << level) for level in range(num_blocks + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.from_rgb = EqualisedConv(3, widths[0], 1)
            self.blocks = nn.Sequential(*(ResidualBlock(widths[i], widths[i + 1]) for i in range(num_blocks)))
            self.conv_last = EqualisedConv(widths[-1] + 1, widths[-1], 3)
            self.hidden = EqualisedLinear(widths[-1] * LAST_SIZE**2, widths[-1])
            self.logit = EqualisedLinear(widths[-1], 1)

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        x = self.blocks(_rectify(self.from_rgb(pictures_BCHW)))
        x = _rectify(self.conv_last(torch.cat([x, group_deviation(x)], dim=1)))
        logits: Tensor = self.logit(_rectify(self.hidden(x.flatten(1))))
        return logits.squeeze(1).float()


def group_deviation(x_BCHW: Tensor) -> Tensor:
    """How much the pictures of a group differ, the same number at every place: [B, 1, H, W].

    Groups are neighbours, as many as divide the batch, at most 4."""
    num, _, height, width = x_BCHW.shape
    size = next(size for size in range(min(DEVIATION_GROUP, num), 0, -1) if num % size == 0)
    grouped = x_BCHW.float().reshape(-1, size, *x_BCHW.shape[1:])
    deviation = (grouped.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    each: Tensor = deviation.repeat_interleave(size).to(x_BCHW.dtype)
    return each[:, None, None, None].expand(num, 1, height, width)


def _rectify(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAK) * GAIN
