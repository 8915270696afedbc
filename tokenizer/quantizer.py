"""Binary spherical quantization (paper section 3.1): latent -> bit -> code, and its entropy loss (section 3.2).

Shape letters: B batch, N tokens, L bits per token, G groups, K codes of one group.
Everything here is computed in fp32, also under autocast: in bf16 a large latent's code is not +-1."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.codes import indices_to_bits
from tokenizer.config import QuantizerLossConfig

LOG_FLOOR = 1e-8
"""Added to a probability before its logarithm, as in the reference; one that underflowed to 0 keeps a finite slope."""


class QuantizerLosses(NamedTuple):
    """What `tokenizer.losses.quantizer_loss` sums up, in fp32: scalars, the entropy in nats, and `mean_assignment`
    [G, K], which sums to 1 over K, code 0 being all -1."""

    commit: Tensor
    sample_entropy: Tensor
    mean_assignment: Tensor


class Quantized(NamedTuple):
    """`codes` fp32 [..., L] with the straight-through gradient, `bits` bool [..., L]."""

    codes: Tensor
    bits: Tensor
    losses: QuantizerLosses


class Quantizer(Protocol):
    """What the model asks of a quantizer, so that another one can take its place."""

    bits_per_token: int

    def project(self, vectors: Tensor) -> Tensor:
        """Latents from the encoder's linear output, [..., L] -> [..., L]."""

    def to_bits(self, latents: Tensor) -> Tensor:
        """The stored form of latents, bool [..., bits_per_token]."""

    def to_codes(self, bits: Tensor) -> Tensor:
        """What the decoder is given for those bits."""

    def __call__(self, latents: Tensor) -> Quantized:
        """All of it for training: codes with a gradient, bits, losses."""


class BinarySphericalQuantizer(nn.Module):
    """Bits are the signs of a latent's channels; codes are the corners of the cube inside the unit sphere."""

    def __init__(
        self,
        bits_per_token: int,
        *,
        group_size: int = 9,
        l2_norm: bool = True,
        post_q_l2_norm: bool = True,
        losses: QuantizerLossConfig | None = None,
    ) -> None:
        super().__init__()
        if bits_per_token % group_size:
            raise SpecError(f"bits_per_token is {bits_per_token}, not a multiple of group_size, {group_size}.")
        self.bits_per_token = bits_per_token
        self.group_size = group_size
        self.l2_norm = l2_norm
        self.code_magnitude = bits_per_token**-0.5 if post_q_l2_norm else 1.0
        self.loss_config = losses or QuantizerLossConfig()

    def project(self, vectors: Tensor) -> Tensor:
        """Latents [..., L] in fp32, on the unit sphere where `l2_norm`; a zero vector stays zero."""
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    def to_bits(self, latents: Tensor) -> Tensor:
        """Bool [..., L]: whether a channel is above 0; exactly 0, -0 and NaN give False."""
        return latents > 0

    def to_codes(self, bits: Tensor) -> Tensor:
        """Codes fp32 [..., L] of bool bits [..., L]: +-1/sqrt(L), or +-1 where codes are not normalised."""
        # Exact, and without a constant that would have to be copied to the device.
        return bits.float() * (2 * self.code_magnitude) - self.code_magnitude

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [..., L] for training."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            bits = self.to_bits(latents)
            codes = self.to_codes(bits)
            losses = self._losses(latents, codes)
            # The difference is exactly 0, so the codes keep their value and take the latents' gradient.
            slope = self.code_magnitude if self.loss_config.straight_through == "scaled" else 1.0
            return Quantized(codes + slope * (latents - latents.detach()), bits, losses)

    def soft_assignment(self, latents: Tensor, group_size: int) -> Tensor:
        """q(c|u) per group, [..., G, 2^group_size]; index 0 is the code of all -1 (paper eq. 6).

        The codebook is a product of signs, so q over all L channels is the product over the groups."""
        codes_KC = self.to_codes(indices_to_bits(torch.arange(2**group_size, device=latents.device), group_size))
        temperature = 2 * self.loss_config.inv_temperature
        scores = latents.reshape(*latents.shape[:-1], -1, group_size) @ codes_KC.T
        return torch.softmax(temperature * scores, dim=-1)

    def _losses(self, latents: Tensor, codes: Tensor) -> QuantizerLosses:
        config = self.loss_config
        sample_size = self._entropy_group_size(config.sample_entropy)
        codebook_size = self._entropy_group_size(config.codebook_entropy)
        sample = self.soft_assignment(latents, sample_size)
        codebook = sample if codebook_size == sample_size else self.soft_assignment(latents, codebook_size)

        sample_entropy = _entropy(sample).sum(-1).mean()
        commit = config.beta * (codes - latents).square().sum(-1).mean()
        return QuantizerLosses(commit, sample_entropy, codebook.flatten(0, -3).mean(0))

    def _entropy_group_size(self, kind: str) -> int:
        return 1 if kind == "bit" else self.group_size


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis."""
    return -(probabilities * (probabilities + LOG_FLOOR).log()).sum(-1)
