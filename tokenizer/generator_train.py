"""Training of a generator: tokens are masked by a cosine schedule, and it learns to fill them in.

Shape letters: B batch, T frames, h w the grid, L bits per token, G groups, K symbols of a group, U units (h*w*G)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import SpecError
from tokenizer.codes import bits_to_groups
from tokenizer.generator import MaskedTokenModel
from tokenizer.generator_checkpoint import build_generator, read_generator, save_generator
from tokenizer.generator_config import check_classes, generator_preset
from tokenizer.token_train import TokenBatch, TokenKind, TokenLearner, TokenTrainConfig
from tokenizer.train_config import build_settings, require_given_sizes
from tokenizer.unmasking import masked_share


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorPart:
    """Which generator is trained; tokens, grid and classes are those of the data."""

    preset: str = "generator-small"
    """Sizes to begin with."""
    init_from: str | None = None
    """Folder or URL of a generator whose weights are the start; it decides the sizes then."""
    width: int | None = None
    """None, here and below: as in the preset."""
    layers: int | None = None
    heads: int | None = None
    group_size: int | None = None
    """Bits of a symbol; None: the group size of the data's tokenizer."""
    label_drop: float = 0.1
    """Share of pictures whose label is not shown, so that guidance has something to push away from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorTrainConfig(TokenTrainConfig):
    """A whole run of a generator, except where its tokens come from."""

    model: GeneratorPart = field(default_factory=GeneratorPart)
    classes: tuple[str, ...] = ()
    """Names of labels 0, 1, ..."""

    def __post_init__(self) -> None:
        TokenTrainConfig.__post_init__(self)
        check_classes(self.classes)
        if not 0 <= self.model.label_drop <= 1:
            raise SpecError(f"model.label_drop is {self.model.label_drop}; it is a share from 0 to 1.")

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types."""
        return {**dataclasses.asdict(self), "classes": list(self.classes)}


def generator_train_config(
    values: object, classes: Sequence[str] = (), where: str = "training config"
) -> GeneratorTrainConfig:
    """Read a mapping of settings.  Raises SpecError, in one line, for an unknown name or an impossible value."""
    config: GeneratorTrainConfig = build_settings(GeneratorTrainConfig, values, where)
    return dataclasses.replace(config, classes=tuple(classes))


def random_masks(shares_B: Tensor, grid: tuple[int, int], num_groups: int, generator: torch.Generator) -> Tensor:
    """Masks with a share of each picture's groups, rounded up and at least one, bool [B, h, w, G] on the CPU."""
    num_units = grid[0] * grid[1] * num_groups
    counts_B = (shares_B * num_units).ceil().clamp(1, num_units)
    order_BU = torch.rand(len(shares_B), num_units, generator=generator).argsort(1).argsort(1)
    return (order_BU < counts_B.unsqueeze(1)).view(-1, *grid, num_groups)


class GeneratorLearner(TokenLearner[MaskedTokenModel]):
    """Learns to fill in masked groups of the first frame of each clip."""

    name = "generator"

    def __init__(self, config: GeneratorTrainConfig, kind: TokenKind, device: torch.device) -> None:
        """Raises SpecError where `model.init_from` is for other tokens."""
        super().__init__(config, starting_generator(config, kind), device)

    def losses(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Bits that a token takes whose groups are all masked, by the mean over masked groups."""
        # Spread evenly over the batch: less noise in the loss than from shares that are drawn one by one.
        drawn_B = (torch.arange(len(batch)) + torch.rand(len(batch))) / len(batch)
        bits, tokens = self._masked_bits(batch, masked_share(drawn_B), torch.default_generator)
        return {"loss": bits / tokens}

    def measure(self, batch: TokenBatch) -> tuple[float, float]:
        """The same with masks that never change."""
        middles_B = (torch.arange(len(batch)) + 0.5) / len(batch)
        bits, tokens = self._masked_bits(batch, masked_share(middles_B), torch.Generator().manual_seed(0))
        return float(bits), tokens

    def _masked_bits(self, batch: TokenBatch, shares_B: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """-log2 p of all masked groups together, and to how many tokens they add up."""
        config = self.model.config
        bits_BhwL = batch.bits[:, 0]
        masked = random_masks(shares_B, config.grid, config.num_groups, generator).to(bits_BhwL.device)
        if batch.labels is None:
            labels_B = torch.full((len(batch),), config.no_label, device=bits_BhwL.device)
        else:
            labels_B = torch.where(batch.labels < 0, config.no_label, batch.labels)
        logits_UK = self.model(bits_BhwL, masked, labels_B)[masked].float()
        symbols_U = bits_to_groups(bits_BhwL, config.group_size)[masked]
        nats = F.cross_entropy(logits_UK, symbols_U, reduction="sum")
        return nats / math.log(2), len(symbols_U) / config.num_groups

    def save(self, folder: Path) -> None:
        """Write the generator."""
        save_generator(self.model, folder)


def starting_generator(config: GeneratorTrainConfig, kind: TokenKind) -> MaskedTokenModel:
    """The generator at step 0, for tokens of `kind`.

    Raises SpecError where `model.init_from` is for other tokens, or has another size than is given."""
    part = config.model
    if part.init_from is not None:
        model = build_generator(read_generator(part.init_from)).requires_grad_(True)
        sizes = model.config
        if (sizes.bits_per_token, sizes.grid, sizes.classes) != (kind.bits, kind.grid, config.classes):
            raise SpecError(
                f"model.init_from: {part.init_from} is for tokens of {sizes.bits_per_token} bits on a grid of "
                f"{sizes.grid} in {len(sizes.classes)} classes; the data has {kind.bits}, {kind.grid} and "
                f"{len(config.classes)}, or classes of other names."
            )
        names = ("width", "layers", "heads", "group_size")
        require_given_sizes({name: getattr(part, name) for name in names}, dataclasses.asdict(sizes))
        model.config = dataclasses.replace(sizes, tokenizer_sha256=kind.tokenizer_sha256)
        return model
    given: dict[str, Any] = {
        name: getattr(part, name) for name in ("width", "layers", "heads") if getattr(part, name) is not None
    }
    if given:
        given["preset"] = "custom"
    sizes = dataclasses.replace(
        generator_preset(part.preset),
        **given,
        bits_per_token=kind.bits,
        group_size=part.group_size or kind.group_size,
        grid=kind.grid,
        classes=config.classes,
        tokenizer_sha256=kind.tokenizer_sha256,
    )
    return MaskedTokenModel(sizes, seed=config.run.seed)
