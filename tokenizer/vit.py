"""Patches, transformer blocks, encoder and decoder of BSQ-ViT (paper sections 3.3 and 3.4).

Shape letters: B batch, T frames, N tokens of a frame, M tokens of a clip (T*N), D width, P values of a patch,
H W pixels.  Tokens are row-major (t, row, column); a patch's values are in order (channel, row, column)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import BSQViTConfig, TransformerConfig


def patchify(frames_BTCHW: Tensor, patch_size: int) -> Tensor:
    """Cut planar frames [B, T, 3, H, W] of any dtype into patches [B, T, N, P]."""
    patches = frames_BTCHW.unfold(3, patch_size, patch_size).unfold(4, patch_size, patch_size)
    return patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)


def unpatchify(patches_BTNP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches [B, T, N, P] together to planar frames [B, T, 3, H, W]."""
    patches = patches_BTNP.reshape(*patches_BTNP.shape[:2], *grid, 3, patch_size, patch_size)
    return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


class BlockCausalAttention(nn.Module):
    """Self-attention in which a token sees its own frame and the frames before it.

    Frame by frame, over the visible prefix only: half the work of a masked clip, and a frame's numbers come from
    calls of the same shape however many frames follow, so that a prefix of a clip gives the prefix of its tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BMD: Tensor, tokens_per_frame: int) -> Tensor:
        # [3, B, heads, M, D / heads]
        query, key, value = torch.unflatten(self.qkv(x_BMD), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        num_tokens = x_BMD.shape[1]
        seen = [
            self._attend(query[:, :, end - tokens_per_frame : end], key[:, :, :end], value[:, :, :end])
            for end in range(tokens_per_frame, num_tokens + 1, tokens_per_frame)
        ]
        attended = torch.cat(seen, dim=2) if len(seen) > 1 else seen[0]
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.training and query.device.type == "cpu":
            # On CPUs the backward pass of the fused operator takes twice as long as that of these products.
            scores = (query * query.shape[-1] ** -0.5).contiguous() @ key.contiguous().transpose(-1, -2)
            attended: Tensor = scores.softmax(-1) @ value.contiguous()
            return attended
        return F.scaled_dot_product_attention(query, key, value)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP with exact GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = BlockCausalAttention(width, config.heads)
        self.attention_scale = _layer_scale(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, width)
        self.mlp_scale = _layer_scale(config)

    def forward(self, x_BMD: Tensor, tokens_per_frame: int) -> Tensor:
        attended = self.attention(self.attention_norm(x_BMD), tokens_per_frame)
        x_BMD = x_BMD + (attended if self.attention_scale is None else attended * self.attention_scale)
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BMD))))
        return x_BMD + (mixed if self.mlp_scale is None else mixed * self.mlp_scale)


class FrameTransformer(nn.Module):
    """Position embeddings, blocks and norms: what encoder and decoder share.  [B, T, N, D] -> [B, T, N, D]."""

    def __init__(self, config: TransformerConfig, tokens_per_frame: int, max_frames: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens_per_frame, config.width))
        self.temporal = nn.Parameter(torch.empty(max_frames, config.width)) if max_frames > 1 else None
        self.norm_in = nn.LayerNorm(config.width) if config.ln_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, x_BTND: Tensor) -> Tensor:
        num_frames, num_tokens = x_BTND.shape[1:3]
        positions: Tensor = self.position
        if self.temporal is not None:
            positions = positions + self.temporal[:num_frames, None]
        x_BMD = self.norm_in(x_BTND + positions).flatten(1, 2)
        for block in self.blocks:
            x_BMD = block(x_BMD, num_tokens)
        out: Tensor = self.norm_out(x_BMD)
        return out.reshape(x_BTND.shape)


class Encoder(nn.Module):
    """Patches [B, T, N, P] -> features [B, T, N, D]."""

    def __init__(self, config: BSQViTConfig) -> None:
        super().__init__()
        half = config.encoder
        self.patch_embedding = nn.Linear(config.patch_values, half.width, bias=not half.ln_pre)
        self.transformer = FrameTransformer(half, config.tokens_per_frame, config.max_frames)

    def forward(self, patches_BTNP: Tensor) -> Tensor:
        features: Tensor = self.transformer(self.patch_embedding(patches_BTNP))
        return features


class Decoder(nn.Module):
    """Embedded codes [B, T, N, D] -> patches [B, T, N, P]."""

    def __init__(self, config: BSQViTConfig) -> None:
        super().__init__()
        half = config.decoder
        self.transformer = FrameTransformer(half, config.tokens_per_frame, config.max_frames)
        self.head_hidden = None if config.head_width is None else nn.Linear(half.width, config.head_width)
        self.head = nn.Linear(config.head_width or half.width, config.patch_values)

    def forward(self, x_BTND: Tensor) -> Tensor:
        x_BTND = self.transformer(x_BTND)
        if self.head_hidden is not None:
            x_BTND = torch.tanh(self.head_hidden(x_BTND))
        patches: Tensor = self.head(x_BTND)
        return patches


def _layer_scale(config: TransformerConfig) -> nn.Parameter | None:
    return None if config.layer_scale is None else nn.Parameter(torch.empty(config.width))
