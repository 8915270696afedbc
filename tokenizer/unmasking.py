"""Tokens of new pictures: all masked at first, and unmasked in a few steps, those that are surest first.

After MaskGIT (Chang et al. 2022): in each step every masked symbol is drawn from its distribution, and those of the
highest probability stay.  Noise on the order, which falls to nothing, keeps the first of them from being the most
common ones alone; guidance pushes the distributions away from those without a label.

Shape letters: B batch, h w the grid, L bits per token, G groups, K symbols of a group, U units (h*w*G): groups of all
tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SpecError
from tokenizer.codes import groups_to_bits
from tokenizer.config import require_float, require_int
from tokenizer.generator import MaskedTokenModel, require_bool_shape

MAX_STEPS = 4096
ON_GPU_AT_ONCE = 64

GuidanceSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How tokens are drawn."""

    steps: int = 24
    """Runs of the model."""
    guidance: float = 2.0
    """w in logits + w * (logits - logits without label); 0 uses the former alone."""
    guidance_schedule: GuidanceSchedule = "linear"
    """From 0 in the first step to w in the last, in a line or half a cosine; or w from the beginning."""
    temperature: float = 1.0
    """Divides the logits that symbols are drawn from; 0 takes the likeliest."""
    noise: float = 4.0
    """Factor of the Gumbel noise on the order at the beginning, in nats; it falls to 0 in a line."""

    def __post_init__(self) -> None:
        require_int("steps", self.steps, 1, MAX_STEPS)
        for name in ("guidance", "temperature", "noise"):
            value = getattr(self, name)
            require_float(name, value)
            if value < 0:
                raise SpecError(f"{name} is {value}; it must be at least 0.")

    def guidance_at(self, step: int) -> float:
        """The factor in `step`, from 0."""
        share = 1.0 if self.steps == 1 else step / (self.steps - 1)
        if self.guidance_schedule == "constant":
            return self.guidance
        return self.guidance * (share if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2)


class KeptTokens(NamedTuple):
    """Tokens that stand already, the same for all samples; the others are drawn around them."""

    bits: Tensor
    """Bool [h, w, L]."""
    kept: Tensor
    """Bool [h, w]; False for what is drawn."""


def masked_share(progress: float | Tensor) -> Tensor:
    """Share of symbols that are masked, of progress from 0 (all) to 1 (none): a quarter of a cosine."""
    return torch.cos(torch.as_tensor(progress, dtype=torch.float64) * (math.pi / 2))


def sample_tokens(
    model: MaskedTokenModel,
    labels: Sequence[int],
    seed: int,
    options: SamplingOptions | None = None,
    *,
    first: int = 0,
    around: KeptTokens | None = None,
    at_once: int | None = None,
) -> Tensor:
    """Draw the tokens of one picture for each label, bool [B, h, w, L], on the model's device.

    A function of its arguments alone: sample i is drawn from `seed` and the number `first + i`.  `labels` are those of
    the config, `no_label` among them.  `at_once`: samples that are computed together; None: 64 on a GPU, and on a CPU
    one, so that it does not depend on the others to the last bit.  Raises SpecError."""
    options = options or SamplingOptions()
    require_int("seed", seed, 0, 2**63 - 1)
    for label in labels:
        require_int("label", label, 0, model.config.no_label)
    if around is not None:
        require_bool_shape("bits", around.bits, (*model.config.grid, model.config.bits_per_token))
        require_bool_shape("kept tokens", around.kept, model.config.grid)
    at_once = at_once or samples_at_once(model.masked.device)
    numbers = range(len(labels))
    drawn = [
        _sample(model, labels[start : start + at_once], seed, first + start, options, around)
        for start in numbers[::at_once]
    ]
    empty = (0, *model.config.grid, model.config.bits_per_token)
    return torch.cat(drawn) if drawn else torch.zeros(empty, dtype=torch.bool, device=model.masked.device)


def samples_at_once(device: torch.device) -> int:
    """Samples that are computed together."""
    # On a CPU one by one, for sums of products may end in another digit in a batch of another size.
    return 1 if device.type == "cpu" else ON_GPU_AT_ONCE


@torch.no_grad()
def _sample(
    model: MaskedTokenModel,
    labels: Sequence[int],
    seed: int,
    first: int,
    options: SamplingOptions,
    around: KeptTokens | None,
) -> Tensor:
    config, device = model.config, model.masked.device
    generators = [np.random.default_rng([seed, first + number]) for number in range(len(labels))]
    labels_B = torch.tensor(labels, device=device)
    bits = torch.zeros(len(labels), *config.grid, config.bits_per_token, dtype=torch.bool, device=device)
    masked = torch.ones(len(labels), *config.grid, config.num_groups, dtype=torch.bool, device=device)
    if around is not None:
        bits = bits | around.bits.to(device)
        masked = masked & ~around.kept.to(device).unsqueeze(-1)
    num_units = int(masked[0].sum())
    for step in range(options.steps):
        progress = (step + 1) / options.steps
        logits = _guided_logits(model, bits, masked, labels_B, options.guidance_at(step))
        if options.temperature:
            logits = logits / options.temperature
            symbols = (logits + _gumbel(generators, logits)).argmax(-1)
        else:
            symbols = logits.argmax(-1)
        chosen = logits.log_softmax(-1).gather(-1, symbols.unsqueeze(-1)).squeeze(-1)
        sureness = chosen + options.noise * (1 - progress) * _gumbel(generators, chosen)
        # What stands stays: it comes last in the order in which units are masked again.
        sureness = sureness.masked_fill(~masked, math.inf).flatten(1)
        left = math.floor(float(masked_share(progress)) * num_units)
        order_BU = sureness.argsort(stable=True, dim=1)
        still = torch.zeros_like(order_BU, dtype=torch.bool).scatter(1, order_BU[:, :left], True).view_as(masked)
        taken = (masked & ~still).repeat_interleave(config.group_size, -1)
        bits = torch.where(taken, groups_to_bits(symbols, config.group_size), bits)
        masked = still
    return bits


def _guided_logits(model: MaskedTokenModel, bits: Tensor, masked: Tensor, labels_B: Tensor, guidance: float) -> Tensor:
    """fp32 logits [B, h, w, G, K]."""
    if not guidance:
        logits: Tensor = model(bits, masked, labels_B).float()
        return logits
    without = torch.full_like(labels_B, model.config.no_label)
    both = model(bits.repeat(2, 1, 1, 1), masked.repeat(2, 1, 1, 1), torch.cat([labels_B, without]))
    with_label, without_label = both.float().chunk(2)
    guided: Tensor = with_label + guidance * (with_label - without_label)
    return guided


def _gumbel(generators: Sequence[np.random.Generator], like: Tensor) -> Tensor:
    """Gumbel noise of the shape of `like`, [B, ...], each sample's from its own generator.

    NumPy draws it, so that it is the same on every device."""
    drawn = [torch.from_numpy(each.gumbel(size=tuple(like.shape[1:])).astype(np.float32)) for each in generators]
    return torch.stack(drawn).to(like.device)
