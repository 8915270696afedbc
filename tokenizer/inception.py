"""Inception-v3 as the Fréchet inception distance uses it (Szegedy et al. 2015, Heusel et al. 2017).

The network is the TensorFlow one of 2015-12-05 in the layout of `pytorch-fid`, whose tensor names it has.  It differs
from torchvision's: average pools leave padding out, and the last block pools by maximum.

Shape letters: N pictures, C channels, H W pixels, F features, K classes."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.published_weights import fill_published, read_published

WHAT = "the weights of the FID Inception network"
NUM_FEATURES = 2048
NUM_CLASSES = 1008
INPUT_PX = 299

Size = int | tuple[int, int]


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: Size = 1, *, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_NCHW)))


def _average(x_NCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_NCHW, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x_NCHW: Tensor) -> Tensor:
    return F.max_pool2d(x_NCHW, 3, stride=1, padding=1)


def _halved(x_NCHW: Tensor) -> Tensor:
    return F.max_pool2d(x_NCHW, 3, stride=2)


class _Mixed35(nn.Module):
    """At 35 x 35 px: windows of 1, 3 and 5."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _Reduce17(nn.Module):
    """From 35 x 35 to 17 x 17 px."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, _halved(x)], 1)


class _Mixed17(nn.Module):
    """At 17 x 17 px: windows of 7 as a row and a column."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1 = _Conv(inputs, width)
        self.branch7x7_2 = _Conv(width, width, row[0], padding=row[1])
        self.branch7x7_3 = _Conv(width, 192, column[0], padding=column[1])
        self.branch7x7dbl_1 = _Conv(inputs, width)
        self.branch7x7dbl_2 = _Conv(width, width, column[0], padding=column[1])
        self.branch7x7dbl_3 = _Conv(width, width, row[0], padding=row[1])
        self.branch7x7dbl_4 = _Conv(width, width, column[0], padding=column[1])
        self.branch7x7dbl_5 = _Conv(width, 192, row[0], padding=row[1])
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class _Reduce8(nn.Module):
    """From 17 x 17 to 8 x 8 px."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), _halved(x)], 1)


class _Mixed8(nn.Module):
    """At 8 x 8 px: rows and columns of 3 side by side."""

    def __init__(self, inputs: int, *, by_maximum: bool) -> None:
        super().__init__()
        self._pool = _largest if by_maximum else _average
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self._pool(x))]
        return torch.cat(parts, 1)


class InceptionFeatures(nn.Module):
    """Pictures to the 2,048 features before the classifier, and features to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Mixed35(192, 32)
        self.Mixed_5c = _Mixed35(256, 64)
        self.Mixed_5d = _Mixed35(288, 64)
        self.Mixed_6a = _Reduce17(288)
        self.Mixed_6b = _Mixed17(768, 128)
        self.Mixed_6c = _Mixed17(768, 160)
        self.Mixed_6d = _Mixed17(768, 160)
        self.Mixed_6e = _Mixed17(768, 192)
        self.Mixed_7a = _Reduce8(768)
        self.Mixed_7b = _Mixed8(1280, by_maximum=False)
        self.Mixed_7c = _Mixed8(2048, by_maximum=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, pictures_NCHW: Tensor) -> Tensor:
        """Features fp32 [N, 2048] of uint8 pictures, resized to 299 px as `pytorch-fid` does (bilinear, no filter)."""
        pictures = F.interpolate(pictures_NCHW.float() / 255, (INPUT_PX, INPUT_PX), mode="bilinear")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * pictures - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features: Tensor = self.Mixed_7c(self.Mixed_7b(x))
        return features.mean((2, 3))

    def logits(self, features_NF: Tensor) -> Tensor:
        """Logits [N, 1008] as the inception score takes them: without the bias (Salimans et al. 2016, its code)."""
        return F.linear(features_NF, self.fc.weight)


def load_inception(path: str | os.PathLike[str]) -> InceptionFeatures:
    """The network with published weights, such as `pt_inception-2015-12-05-6726825d.pth` of `pytorch-fid`.

    Raises CheckpointError where the file is missing or holds something else."""
    with torch.device("meta"):
        network = InceptionFeatures()
    weights = read_published(path, WHAT)
    return fill_published(network, weights, path, WHAT, unused=("AuxLogits.",))


def inception_score(logits_NK: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of each picture's classes from those of all (Salimans et al. 2016).

    Mean and standard deviation over `splits` parts of the pictures, in their order; fewer where there are fewer
    pictures.  From 1 to K."""
    scores = []
    for part_NK in logits_NK.double().tensor_split(min(splits, len(logits_NK))):
        own_NK = part_NK.log_softmax(1)
        together_K = own_NK.logsumexp(0) - math.log(len(own_NK))
        scores.append((own_NK.exp() * (own_NK - together_K)).sum(1).mean().exp())
    over_parts = torch.stack(scores)
    return float(over_parts.mean()), float(over_parts.std(correction=0))
