"""A masked model of tokens: it fills in what is masked of one frame's tokens, given the others and a class label.

A token is L bits in groups of g; a group is a symbol of 2^g, and is masked by itself.  Tokens enter by a linear map of
their bits as +-1, the bits of masked groups as 0 with a learnt vector for each masked group: no table of 2^L exists.
All tokens see each other.

After MaskGIT (Chang et al. 2022), as the BSQ-ViT paper does for synthesis, with groups of bits as its symbols.

Shape letters: B batch, h w the grid, N tokens (h*w), L bits per token, G groups, K symbols of a group (2^g),
D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.generator_config import GeneratorConfig
from tokenizer.initialise import initialise
from tokenizer.vit import FrameTransformer


class MaskedTokenModel(nn.Module):
    """p(symbol | symbols that are not masked, class) for each masked group of a frame's tokens."""

    def __init__(self, config: GeneratorConfig, *, seed: int | None = 0) -> None:
        """Build with random weights drawn from `seed`; None leaves them on the meta device, to be loaded."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.signs = nn.Linear(config.bits_per_token, config.width)
            self.masked = nn.Parameter(torch.empty(config.num_groups, config.width))
            self.labels = nn.Parameter(torch.empty(len(config.classes) + 1, config.width))
            self.transformer = FrameTransformer(config.transformer, config.tokens_per_frame, 1)
            self.head = nn.Linear(config.width, config.num_groups << config.group_size)
        if seed is not None:
            self.to_empty(device="cpu")
            initialise(self, seed, layers=config.layers, embeddings=("masked", "labels", "position"))

    def forward(self, bits_BhwL: Tensor, masked_BhwG: Tensor, labels_B: Tensor) -> Tensor:
        """Logits of every symbol, [B, h, w, G, K].

        bits: bool; what stands in masked groups makes no difference.  masked: bool.  labels: int64, of which
        `config.no_label` is for none.  Raises SpecError for other shapes or types."""
        self._require(bits_BhwL, masked_BhwG, labels_B)
        config, dtype = self.config, self.masked.dtype
        seen_BhwL = ~masked_BhwG.repeat_interleave(config.group_size, -1)
        signs_BhwL = (bits_BhwL.to(dtype) * 2 - 1) * seen_BhwL
        x_BhwD = self.signs(signs_BhwL) + masked_BhwG.to(dtype) @ self.masked
        x_BND = x_BhwD.flatten(1, 2) + self.labels[labels_B].unsqueeze(1)
        x_BND = self.transformer(x_BND.unsqueeze(1)).squeeze(1)
        logits: Tensor = self.head(x_BND)
        return logits.view(*masked_BhwG.shape, -1)

    def _require(self, bits_BhwL: Tensor, masked_BhwG: Tensor, labels_B: Tensor) -> None:
        config = self.config
        for name, given, last in (
            ("bits", bits_BhwL, config.bits_per_token),
            ("masks", masked_BhwG, config.num_groups),
        ):
            expected = (len(labels_B), *config.grid, last)
            require_bool_shape(name, given, expected)
        if labels_B.dtype != torch.int64 or labels_B.ndim != 1:
            raise SpecError(f"labels are {labels_B.dtype} of shape {tuple(labels_B.shape)}; expected int64 [batch].")


def require_bool_shape(name: str, given: Tensor, expected: tuple[int, ...]) -> None:
    """Raise SpecError unless a tensor is bool and of that shape."""
    if tuple(given.shape) != expected or given.dtype != torch.bool:
        raise SpecError(
            f"{name} are {given.dtype} of shape {list(given.shape)}; expected torch.bool of shape {list(expected)}."
        )
