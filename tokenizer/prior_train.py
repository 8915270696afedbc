"""Training of a prior: settings, and how it learns.

Shape letters: B batch, T frames, h w the grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.errors import SpecError
from tokenizer.prior import TokenPrior
from tokenizer.prior_checkpoint import build_prior, read_prior, save_prior
from tokenizer.prior_config import prior_preset
from tokenizer.token_train import TokenBatch, TokenKind, TokenLearner, TokenTrainConfig
from tokenizer.train_config import build_settings, require_given_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorPart:
    """Which prior is trained; tokens and grid are those of the data."""

    preset: str = "prior-small"
    """Sizes to begin with."""
    init_from: str | None = None
    """Folder or URL of a prior whose weights are the start; it decides the sizes then."""
    max_frames: int | None = None
    """The most frames of a clip; None: as many as the longest of the data."""
    context_frames: int | None = None
    """Frames of tokens that one is predicted from; None, here and below: as in the preset."""
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    head_width: int | None = None
    group_size: int | None = None
    """Bits of a symbol; None: the group size of the data's tokenizer."""
    dropout: float = 0.1
    """Of both branches of a block, while training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorTrainConfig(TokenTrainConfig):
    """A whole run of a prior, except where its tokens come from."""

    model: PriorPart = field(default_factory=PriorPart)

    def __post_init__(self) -> None:
        TokenTrainConfig.__post_init__(self)
        if not 0 <= self.model.dropout < 1:
            raise SpecError(f"model.dropout is {self.model.dropout}; it must be from 0 to below 1.")


def prior_train_config(values: object, where: str = "training config") -> PriorTrainConfig:
    """Read a mapping of settings.  Raises SpecError, in one line, for an unknown name or an impossible value."""
    config: PriorTrainConfig = build_settings(PriorTrainConfig, values, where)
    return config


class PriorLearner(TokenLearner[TokenPrior]):
    """Learns to give high probabilities to tokens."""

    name = "prior"

    def __init__(self, config: PriorTrainConfig, kind: TokenKind, device: torch.device) -> None:
        """Raises SpecError where `model.init_from` is for other tokens."""
        super().__init__(config, starting_prior(config, kind), device)

    def losses(self, batch: TokenBatch) -> dict[str, Tensor]:
        """The mean over tokens of -log2 p: bits that a token takes."""
        # Clips of one length at a time: pictures that are padded to a clip would take as long as one.
        total = torch.stack([bits_of_tokens(self.model, part).sum() for part in parts_of_one_length(batch)]).sum()
        return {"loss": total / batch.num_tokens}

    def measure(self, batch: TokenBatch) -> tuple[float, float]:
        """The bits of all tokens together, and their number."""
        total = sum(float(bits_of_tokens(self.model, part).double().sum()) for part in parts_of_one_length(batch))
        return total, batch.num_tokens

    def save(self, folder: Path) -> None:
        """Write the prior."""
        save_prior(self.model, folder)


def parts_of_one_length(batch: TokenBatch) -> Iterator[TokenBatch]:
    """The clips of a batch without padding, those of one length together."""
    if batch.mask is None:
        yield batch
        return
    lengths_B = batch.mask.sum(1)
    for length in sorted(set(lengths_B.tolist())):
        yield TokenBatch(batch.bits[lengths_B == length, :length])


def bits_of_tokens(prior: TokenPrior, batch: TokenBatch) -> Tensor:
    """-log2 p of each token of clips without padding, fp32 [B, T, h, w], with gradients."""
    return prior.log_prob(batch.bits) * (-1 / math.log(2))


def starting_prior(config: PriorTrainConfig, kind: TokenKind) -> TokenPrior:
    """The prior at step 0, for tokens of `kind`.

    Raises SpecError where `model.init_from` is for other tokens, or has another size than is given."""
    part = config.model
    max_frames = part.max_frames or kind.max_frames
    if part.init_from is not None:
        prior = build_prior(read_prior(part.init_from)).requires_grad_(True)
        prior.dropout = part.dropout
        sizes = prior.config
        if (sizes.bits_per_token, sizes.grid) != (kind.bits, kind.grid) or sizes.max_frames < max_frames:
            raise SpecError(
                f"model.init_from: {part.init_from} is for tokens of {sizes.bits_per_token} bits on a grid of "
                f"{sizes.grid} in clips of up to {sizes.max_frames} frames; the data has {kind.bits}, {kind.grid} and "
                f"{max_frames}."
            )
        names = ("max_frames", "context_frames", "width", "layers", "heads", "head_width", "group_size")
        require_given_sizes({name: getattr(part, name) for name in names}, dataclasses.asdict(sizes))
        prior.config = dataclasses.replace(sizes, tokenizer_sha256=kind.tokenizer_sha256)
        return prior
    given: dict[str, Any] = {
        name: getattr(part, name)
        for name in ("context_frames", "width", "layers", "heads", "head_width")
        if getattr(part, name) is not None
    }
    if given:
        given["preset"] = "custom"
    sizes = dataclasses.replace(
        prior_preset(part.preset),
        **given,
        bits_per_token=kind.bits,
        group_size=part.group_size or kind.group_size,
        grid=kind.grid,
        max_frames=max_frames,
        tokenizer_sha256=kind.tokenizer_sha256,
    )
    return TokenPrior(sizes, seed=config.run.seed, dropout=part.dropout)
