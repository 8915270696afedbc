"""Priors over tokens that take a moment, with random weights that make uneven probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenizer.checkpoint import read_checkpoint
from tokenizer.prior import TokenPrior
from tokenizer.prior_checkpoint import save_prior
from tokenizer.prior_config import PriorConfig

TINY_TOKENIZER = "untrained:vit-tiny-32-l18"


def tiny_prior(seed: int = 0, sharpness: float = 2.0, **sizes: Any) -> TokenPrior:
    """A prior of one narrow layer; `sharpness` is the deviation of its logits."""
    given: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "head_width": 16, "grid": (2, 3), "max_frames": 3}
    prior = TokenPrior(PriorConfig(**{**given, **sizes}), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (prior.head_bias, prior.place, prior.time):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * sharpness)
        prior.head_logits.copy_(torch.randn(prior.head_logits.shape, generator=generator) * sharpness)
    return prior.requires_grad_(False)


def random_bits(prior: TokenPrior, num_clips: int, num_frames: int, seed: int = 0) -> torch.Tensor:
    """Bool [B, T, h, w, L]."""
    shape = (num_clips, num_frames, *prior.config.grid, prior.config.bits_per_token)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def save_tiny_prior(folder: Path, **sizes: Any) -> Path:
    """A prior for the tokens of `TINY_TOKENIZER`, in a folder."""
    sha256 = read_checkpoint(TINY_TOKENIZER).weight_sha256()
    save_prior(tiny_prior(grid=(4, 4), max_frames=8, tokenizer_sha256=sha256, **sizes), folder)
    return folder
