"""The prior one symbol at a time, for several clips side by side: what a coder walks along.

Shape letters: B lanes, N tokens of a frame, M tokens of the longest clip, W tokens of the context, L bits per token,
G groups, K symbols of a group, D width, A width of an attention head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.codes import indices_to_bits
from tokenizer.prior import PriorBlock, TokenPrior


class PriorSteps:
    """Goes through the symbols of `lanes` clips together, with a cache of keys and values.

    All lanes are at the same place.  What a lane is given has no influence on the others."""

    def __init__(self, prior: TokenPrior, lanes: int, num_frames: int) -> None:
        """Begin before the first symbol; memory is taken for `num_frames` frames of each lane."""
        prior.require_frames(num_frames)
        config, weight = prior.config, prior.place
        self._prior, self._config = prior, config
        self._token = self._group = 0
        num_tokens = num_frames * config.tokens_per_frame
        # The same for clips of any length, so that the same numbers come out whatever lies in the other lanes.
        self._context = min(config.context_frames, config.max_frames) * config.tokens_per_frame
        head_width = config.width // config.heads
        self._keys, self._values = (weight.new_zeros(config.layers, lanes, self._context, head_width) for _ in range(2))
        # Token m lies at 1 + m; the first place is that of the token that does not exist.
        self._signs_BML = weight.new_zeros(lanes, 1 + num_tokens, config.bits_per_token)
        self._hidden: Tensor = weight.new_zeros(lanes, 0)
        allowed = prior.allowed_bits().to(weight).repeat_interleave(config.head_width, 0)
        self._earlier = torch.unflatten((prior.head_earlier * allowed).detach(), 0, (config.num_groups, -1))

    @torch.inference_mode()
    def step(self, symbols_B: Tensor | None) -> Tensor:
        """Logits of the next symbol of each lane, [B, K], given the symbols, int64 [B], at the place before.

        The first call takes None."""
        if symbols_B is not None:
            self._take(symbols_B)
        if self._group == 0:
            self._hidden = self._advance()
        prior, group = self._prior, self._group
        width, size = self._config.head_width, self._config.group_size
        hidden = self._hidden[:, group * width : (group + 1) * width]
        if group:
            signs = self._signs_BML[:, 1 + self._token, : group * size]
            hidden = torch.addmm(hidden, signs, self._earlier[group, :, : group * size].T)
        return torch.addmm(prior.head_bias[group], F.gelu(hidden), prior.head_logits[group])

    def _take(self, symbols_B: Tensor) -> None:
        size = self._config.group_size
        bits = indices_to_bits(symbols_B, size).to(self._signs_BML)
        self._signs_BML[:, 1 + self._token, self._group * size : (self._group + 1) * size] = bits * 2 - 1
        self._group += 1
        if self._group == self._config.num_groups:
            self._group, self._token = 0, self._token + 1

    def _advance(self) -> Tensor:
        """The head's hidden values for the next token, [B, G * H], before what its own symbols add."""
        token, (_, columns), prior = self._token, self._config.grid, self._prior
        frame, place = divmod(token, self._config.tokens_per_frame)
        before = token
        above = token + 1 - columns if place >= columns else 0
        earlier = token + 1 - self._config.tokens_per_frame if frame else 0
        places = torch.tensor([before, above, earlier], device=self._signs_BML.device)
        x_BD = prior.neighbours(self._signs_BML[:, places].flatten(1)) + (prior.time[frame] + prior.place[place])
        slot, filled = token % self._context, min(token + 1, self._context)
        for number, block in enumerate(prior.blocks):
            assert isinstance(block, PriorBlock)
            keys, values = self._keys[number], self._values[number]
            normed = block.attention_norm(x_BD)
            keys[:, slot], values[:, slot] = block.key_value(normed).chunk(2, -1)
            query = torch.unflatten(block.query(normed), -1, (block.heads, -1))
            # The context is a ring: attention does not ask for the order of what it sees.
            scores = torch.bmm(query, keys[:, :filled].transpose(1, 2)) * keys.shape[-1] ** -0.5
            attended = torch.bmm(scores.softmax(-1), values[:, :filled])
            x_BD = x_BD + block.out(attended.flatten(1))
            x_BD = x_BD + block.mix(x_BD)
        hidden: Tensor = prior.head_hidden(prior.norm_out(x_BD))
        return hidden
