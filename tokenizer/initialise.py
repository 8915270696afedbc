"""First weights of models over tokens."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import nn

INIT_STD = 0.02


def initialise(model: nn.Module, seed: int, *, layers: int, embeddings: Collection[str]) -> None:
    """Fill the weights from a seed: matrices from N(0, 1/inputs), those that end a branch smaller, biases 0.

    Parameters whose last name is in `embeddings` come from N(0, 0.02).  NumPy draws the numbers, for torch's depend on
    the CPU's vector unit."""
    generator = np.random.default_rng(seed)
    branches = math.sqrt(2 * layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind.endswith("bias"):
                parameter.zero_()
                continue
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            deviation = INIT_STD
            if kind not in embeddings:
                deviation = parameter.shape[1] ** -0.5 / (branches if name.endswith("out.weight") else 1.0)
            drawn = generator.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.copy_(torch.from_numpy(drawn * np.float32(deviation)))
