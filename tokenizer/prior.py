"""A prior over tokens: a causal transformer that gives each token a probability, given those before it.

Tokens come in the order (t, row, column).  One is L bits in groups of g; a group is a symbol of 2^g, and the groups of
a token are predicted one after another by a light head, each given those before it.  No table of 2^L exists: a token
enters by a linear map of its bits as +-1.

What predicts token m enters at place m: the bits of the token before it in the order, of the one above it, and of the
one at its place in the frame before; where there is none, zeros.  Attention adds the rest, as far back as
`context_frames` frames of tokens.

Shape letters: B batch, T frames, h w the grid, N tokens of a frame, M tokens of a clip (T*N), L bits per token,
G groups, K symbols of a group (2^g), D width, A width of an attention head, H width of the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.codes import bits_to_groups
from tokenizer.initialise import initialise
from tokenizer.prior_config import PriorConfig


class PriorBlock(nn.Module):
    """Pre-norm transformer block whose query heads share one head of keys and values (multi-query attention)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * (config.width // config.heads))
        self.out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BMD: Tensor, tokens_per_frame: int, context_tokens: int, dropout: float) -> Tensor:
        """All tokens of a clip at once; each attends to itself and to those before it within the context."""
        normed = self.attention_norm(x_BMD)
        query = torch.unflatten(self.query(normed), -1, (self.heads, -1)).transpose(1, 2)
        key, value = (each.unsqueeze(1) for each in self.key_value(normed).chunk(2, -1))
        attended = torch.cat(
            [
                _attend_frame(query, key, value, end - tokens_per_frame, end, context_tokens)
                for end in range(tokens_per_frame, x_BMD.shape[1] + 1, tokens_per_frame)
            ],
            dim=2,
        )
        x_BMD = x_BMD + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), dropout, self.training)
        return x_BMD + F.dropout(self.mix(x_BMD), dropout, self.training)

    def mix(self, x: Tensor) -> Tensor:
        """The MLP branch of [..., D]."""
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return mixed


class TokenPrior(nn.Module):
    """p(token | tokens before it) for images (T = 1) and clips of up to `config.max_frames` frames."""

    def __init__(self, config: PriorConfig, *, seed: int | None = 0, dropout: float = 0.0) -> None:
        """Build with random weights drawn from `seed`; None leaves them on the meta device, to be loaded.

        `dropout` is that of both branches of a block while training."""
        super().__init__()
        self.config, self.dropout = config, dropout
        bits, groups = config.bits_per_token, config.num_groups
        with torch.device("meta"):
            self.neighbours = nn.Linear(3 * bits, config.width)
            self.place = nn.Parameter(torch.empty(config.tokens_per_frame, config.width))
            self.time = nn.Parameter(torch.empty(config.max_frames, config.width))
            self.blocks = nn.ModuleList(PriorBlock(config) for _ in range(config.layers))
            self.norm_out = nn.LayerNorm(config.width)
            self.head_hidden = nn.Linear(config.width, groups * config.head_width)
            self.head_earlier = nn.Parameter(torch.empty(groups * config.head_width, bits))
            self.head_logits = nn.Parameter(torch.empty(groups, config.head_width, 1 << config.group_size))
            self.head_bias = nn.Parameter(torch.empty(groups, 1 << config.group_size))
        if seed is not None:
            self.to_empty(device="cpu")
            initialise(self, seed, layers=config.layers, embeddings=("place", "time", "head_logits"))

    def log_prob(self, bits_BThwL: Tensor) -> Tensor:
        """Natural logarithm of each token's probability, fp32 [B, T, h, w], of bool bits, with gradients."""
        self._require_bits(bits_BThwL)
        bits_BML = bits_BThwL.flatten(1, 3)
        logits_BMGK = self._logits(bits_BML)
        symbols_BMG = bits_to_groups(bits_BML, self.config.group_size)
        chosen = -F.cross_entropy(logits_BMGK.flatten(0, 2).float(), symbols_BMG.flatten(), reduction="none")
        return chosen.view(symbols_BMG.shape).sum(-1).view(bits_BThwL.shape[:4])

    def forward(self, bits_BThwL: Tensor) -> Tensor:
        """The same as `log_prob`."""
        return self.log_prob(bits_BThwL)

    def allowed_bits(self) -> Tensor:
        """Which bits the head of each group may see, bool [G, L]: those of earlier groups."""
        groups_L = torch.arange(self.config.bits_per_token) // self.config.group_size
        return groups_L < torch.arange(self.config.num_groups).unsqueeze(1)

    def _logits(self, bits_BML: Tensor) -> Tensor:
        """Logits of every symbol, [B, M, G, K]."""
        config = self.config
        signs_BML = bits_BML.to(self.place.dtype) * 2 - 1
        num_frames = bits_BML.shape[1] // config.tokens_per_frame
        x_BMD = self.neighbours(self._neighbours(signs_BML))
        positions = self.time[:num_frames].unsqueeze(1) + self.place
        x_BMD = F.dropout(x_BMD + positions.flatten(0, 1), self.dropout, self.training)
        for block in self.blocks:
            x_BMD = block(x_BMD, config.tokens_per_frame, config.context_tokens, self.dropout)
        hidden = self.head_hidden(self.norm_out(x_BMD))
        # Masked weights instead of one product for each group.
        allowed = self.allowed_bits().to(signs_BML).repeat_interleave(config.head_width, 0)
        hidden = F.gelu(hidden + F.linear(signs_BML, self.head_earlier * allowed))
        hidden_BMGH = torch.unflatten(hidden, -1, (config.num_groups, -1))
        return torch.einsum("bmgh,ghk->bmgk", hidden_BMGH, self.head_logits) + self.head_bias

    def _neighbours(self, signs_BML: Tensor) -> Tensor:
        """Signs of the token before, of the one above and of the one a frame earlier, [B, M, 3 * L]."""
        rows, columns = self.config.grid
        before = F.pad(signs_BML, (0, 0, 1, 0))[:, :-1]
        frames = torch.unflatten(signs_BML, 1, (-1, rows, columns))
        above = F.pad(frames, (0, 0, 0, 0, 1, 0))[:, :, :-1].flatten(1, 3)
        earlier = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(1, 3)
        return torch.cat([before, above, earlier], -1)

    def _require_bits(self, bits_BThwL: Tensor) -> None:
        expected = (*self.config.grid, self.config.bits_per_token)
        if bits_BThwL.ndim != 5 or tuple(bits_BThwL.shape[2:]) != expected or bits_BThwL.dtype != torch.bool:
            wanted = ", ".join(map(str, expected))
            raise SpecError(
                f"bits are {bits_BThwL.dtype} of shape {tuple(bits_BThwL.shape)}; expected bool [batch, frames, "
                f"{wanted}]."
            )
        self.require_frames(bits_BThwL.shape[1])

    def require_frames(self, num_frames: int) -> None:
        """Raise SpecError for a clip that is too long."""
        if not 1 <= num_frames <= self.config.max_frames:
            raise SpecError(f"a clip has {num_frames} frames; this prior takes 1 to {self.config.max_frames}.")


def _attend_frame(query: Tensor, key: Tensor, value: Tensor, start: int, end: int, context_tokens: int) -> Tensor:
    """What the tokens [start, end), of one frame, gather from those before them; heads lie in dimension 1."""
    first = max(0, start + 1 - context_tokens)
    heads = query.shape[1]
    key, value = (each[:, :, first:end].expand(-1, heads, -1, -1) for each in (key, value))
    distance = torch.arange(start, end, device=query.device).unsqueeze(1) - torch.arange(
        first, end, device=query.device
    )
    seen = (distance >= 0) & (distance < context_tokens)
    return F.scaled_dot_product_attention(query[:, :, start:end], key, value, attn_mask=seen)
