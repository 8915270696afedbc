"""Generators of tokens that take a moment, with random weights that make uneven probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny_priors import TINY_TOKENIZER
from tokenizer.checkpoint import read_checkpoint
from tokenizer.generator import MaskedTokenModel
from tokenizer.generator_checkpoint import save_generator
from tokenizer.generator_config import GeneratorConfig


def tiny_generator(seed: int = 0, sharpness: float = 1.0, **sizes: Any) -> MaskedTokenModel:
    """A generator of one narrow layer and three classes; `sharpness` is the deviation of what each class adds."""
    given: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "grid": (2, 3), "bits_per_token": 6,
                             "group_size": 3, "classes": ("dress", "hat", "shoes")}  # fmt: skip
    model = MaskedTokenModel(GeneratorConfig(**{**given, **sizes}), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.labels, model.masked, model.head.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * sharpness)
    return model.requires_grad_(False)


def random_tokens(model: MaskedTokenModel, count: int, seed: int = 0) -> torch.Tensor:
    """Bool [B, h, w, L]."""
    shape = (count, *model.config.grid, model.config.bits_per_token)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def save_tiny_generator(folder: Path, **sizes: Any) -> Path:
    """A generator for the tokens of `TINY_TOKENIZER`, in a folder."""
    given: dict[str, Any] = {"grid": (4, 4), "bits_per_token": 18, "group_size": 9,
                             "tokenizer_sha256": read_checkpoint(TINY_TOKENIZER).weight_sha256()}  # fmt: skip
    save_generator(tiny_generator(**{**given, **sizes}), folder)
    return folder
