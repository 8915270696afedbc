"""Counts which bits and which codes of each group occur in tokens.

Shape letters: M tokens, L bits per token, G groups, K codes of one group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """How much of one group's codes occurs."""

    codes: int
    """Codes that there are, 2 to the group's bits."""
    used: int
    """Codes that occur at least once."""
    entropy_bits: float
    """Entropy of the codes that occur; at most the group's bits."""


class CodeCounts:
    """Counts of bits and of each group's codes; they add up over batches, and over processes where asked."""

    def __init__(self, bits_per_token: int, group_size: int, device: torch.device | str = "cpu") -> None:
        num_groups, num_codes = bits_per_token // group_size, 2**group_size
        self._group_size = group_size
        self._weights_C = 2 ** torch.arange(group_size, device=device)
        self.ones_L = torch.zeros(bits_per_token, dtype=torch.float64, device=device)
        self.codes_GK = torch.zeros(num_groups, num_codes, dtype=torch.float64, device=device)

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.codes_GK[0].sum())

    def add(self, bits: Tensor) -> None:
        """Count bool bits [..., L]."""
        bits_ML = bits.reshape(-1, bits.shape[-1])
        self.ones_L += bits_ML.sum(0)
        codes_MG = (bits_ML.reshape(len(bits_ML), -1, self._group_size) * self._weights_C).sum(-1)
        self.codes_GK.scatter_add_(1, codes_MG.T, torch.ones_like(codes_MG.T, dtype=torch.float64))

    def channel_bits(self) -> list[float]:
        """Entropy of each channel in bits, 0 to 1."""
        share_L = (self.ones_L / max(self.num_tokens, 1)).clamp(1e-12, 1 - 1e-12)
        entropy_L = -(share_L * share_L.log2() + (1 - share_L) * (1 - share_L).log2())
        return [float(each) for each in entropy_L]

    def groups(self) -> list[GroupUsage]:
        """The usage of each group."""
        share_GK = self.codes_GK / max(self.num_tokens, 1)
        entropy_G = -torch.special.xlogy(share_GK, share_GK).sum(1) / torch.tensor(2.0, dtype=torch.float64).log()
        used_G = (self.codes_GK > 0).sum(1)
        return [
            GroupUsage(codes=self.codes_GK.shape[1], used=int(used), entropy_bits=abs(float(entropy)))
            for used, entropy in zip(used_G, entropy_G, strict=True)
        ]
