"""BSQ-ViT, the whole tokenizer: frames -> bits -> frames (paper section 3).

Shape letters: B batch, T frames, H W pixels, C the 3 colour channels, h w the token grid, L bits per token.
Callers see frames as [B, T, H, W, 3], uint8 from 0 to 255 or float from -1 to 1.  In memory they are best planar,
[B, T, 3, H, W], seen through `permute(0, 1, 3, 4, 2)`: then nothing is transposed on the way in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.codes import pack_bits
from tokenizer.config import BSQViTConfig
from tokenizer.quantizer import BinarySphericalQuantizer, Quantized
from tokenizer.vit import Decoder, Encoder, patchify, unpatchify

INIT_STD = 0.02


class PackedTokens(NamedTuple):
    """`packed` uint8 [B, ceil(T*h*w*L / 8)]; `finite` bool [B]: False where a latent was NaN or infinite."""

    packed: Tensor
    finite: Tensor


class Autoencoded(NamedTuple):
    """`frames` [B, T, H, W, 3] clamped to [-1, 1], `unclamped` the same before that, and the quantizer's results."""

    frames: Tensor
    unclamped: Tensor
    quantized: Quantized


class BSQViT(nn.Module):
    """A tokenizer for images (T = 1) and clips of up to `config.max_frames` frames.

    Attention is block-causal: the tokens of a frame depend on it and on the frames before it."""

    def __init__(
        self, config: BSQViTConfig, *, seed: int | None = 0, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """Build with random weights drawn from `seed`; None leaves them on the meta device, to be loaded.

        With compute_dtype bfloat16 (or float16) the transformers run under autocast in that dtype; the projection
        to latents, the normalisation and the sign stay in fp32."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        with torch.device("meta"):
            self.encoder = Encoder(config)
            self.to_latents = nn.Linear(config.encoder.width, config.bits_per_token)
            self.from_codes = nn.Linear(config.bits_per_token, config.decoder.width)
            self.decoder = Decoder(config)
        self.quantizer = BinarySphericalQuantizer(
            config.bits_per_token,
            group_size=config.group_size,
            l2_norm=config.l2_norm,
            post_q_l2_norm=config.post_q_l2_norm,
            losses=config.losses,
        )
        if seed is not None:
            self.to_empty(device="cpu")
            initialise_weights(self, seed)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] = "default", *, device: str | torch.device = "cpu", **options: Any
    ) -> BSQViT:
        """A tokenizer by shipped name ("default" is the one that ships), folder or URL, in eval mode.

        `options` are those of `tokenizer.checkpoint.from_pretrained`.  Raises CheckpointError."""
        from tokenizer.checkpoint import from_pretrained

        return from_pretrained(source, device=device, **options)

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        """Bits, bool [B, T, h, w, L], of frames [B, T, H, W, 3]."""
        latents = self.quantizer.project(self._vectors(self._planar(frames_BTHWC)))
        return self._on_grid(self.quantizer.to_bits(latents))

    @torch.no_grad()
    def encode_packed(self, frames_BTCHW: Tensor) -> PackedTokens:
        """Packed bits of planar frames [B, T, 3, H, W], packed on their device without waiting for it."""
        vectors_BTNL = self._vectors(frames_BTCHW)
        bits_BML = self.quantizer.to_bits(self.quantizer.project(vectors_BTNL)).flatten(1, 2)
        # A vector whose norm overflows would be projected to 0 and pass for a token.
        finite_B = torch.linalg.vector_norm(vectors_BTNL, dim=-1).isfinite().flatten(1).all(1)
        return PackedTokens(pack_bits(bits_BML), finite_B)

    def latents(self, frames_BTHWC: Tensor) -> Tensor:
        """Latents before the sign, fp32 [B, T, h, w, L], with gradients where torch records them."""
        vectors_BTNL = self._vectors(self._planar(frames_BTHWC))
        return self._on_grid(self.quantizer.project(vectors_BTNL))

    @torch.no_grad()
    def decode(self, bits_BThwL: Tensor) -> Tensor:
        """Frames, fp32 [B, T, H, W, 3] from -1 to 1, of bits [B, T, h, w, L]."""
        self._require_bits(bits_BThwL)
        codes_BTNL = self.quantizer.to_codes(bits_BThwL.flatten(2, 3))
        return self._public(self._clamp(self._pixels(codes_BTNL)))

    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        """What is left of the frames after tokenization; the same numbers as `decode(encode(frames))`."""
        return self.autoencode(frames_BTHWC).frames

    def autoencode(self, frames_BTHWC: Tensor) -> Autoencoded:
        """Encode, quantize and decode with gradients and losses, for training."""
        latents_BTNL = self.quantizer.project(self._vectors(self._planar(frames_BTHWC)))
        quantized: Quantized = self.quantizer(latents_BTNL)
        pixels = self._pixels(quantized.codes)
        return Autoencoded(self._public(self._clamp(pixels)), self._public(pixels), quantized)

    def vectors(self, frames_BTHWC: Tensor) -> Tensor:
        """What latents are projected from, fp32 [B, T, N, L], with gradients: its signs are the bits."""
        return self._vectors(self._planar(frames_BTHWC))

    def render(self, bits_BTNL: Tensor) -> Tensor:
        """Unclamped frames of bits [B, T, N, L], with gradients in the decoder."""
        return self._public(self._pixels(self.quantizer.to_codes(bits_BTNL)))

    def _vectors(self, frames_BTCHW: Tensor) -> Tensor:
        """What is projected to latents: fp32 [B, T, N, L]."""
        self._require_frames(frames_BTCHW)
        # Patches first: cutting uint8 moves a quarter of the bytes of cutting floats.
        patches_BTNP = self._to_range(patchify(frames_BTCHW, self.config.patch_size))
        with self._autocast(frames_BTCHW):
            features_BTND = self.encoder(patches_BTNP)
        with torch.autocast(frames_BTCHW.device.type, enabled=False):
            linear = self.to_latents
            return nn.functional.linear(features_BTND.float(), linear.weight.float(), linear.bias.float())

    def _pixels(self, codes_BTNL: Tensor) -> Tensor:
        """Unclamped planar pixels in the network's range, fp32 [B, T, 3, H, W]."""
        with self._autocast(codes_BTNL):
            patches_BTNP = self.decoder(self.from_codes(codes_BTNL)).float()
        return unpatchify(patches_BTNP, self.config.grid, self.config.patch_size)

    def _on_grid(self, tokens_BTNL: Tensor) -> Tensor:
        return tokens_BTNL.reshape(*tokens_BTNL.shape[:2], *self.config.grid, -1)

    def _autocast(self, tensor: Tensor) -> AbstractContextManager[object]:
        # In fp32 an autocast that the caller opened stays in force: mixed-precision training relies on it.
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(tensor.device.type, self.compute_dtype)

    def _to_range(self, pixels: Tensor) -> Tensor:
        low_is_zero = self.config.clamp_range[0] == 0
        if pixels.dtype == torch.uint8:
            return pixels.float() / 255 if low_is_zero else pixels.float() / 127.5 - 1
        return (pixels.float() + 1) / 2 if low_is_zero else pixels.float()

    def _clamp(self, pixels: Tensor) -> Tensor:
        return pixels.clamp(*self.config.clamp_range)

    def _public(self, pixels_BTCHW: Tensor) -> Tensor:
        if self.config.clamp_range[0] == 0:
            pixels_BTCHW = 2 * pixels_BTCHW - 1
        return pixels_BTCHW.permute(0, 1, 3, 4, 2)

    def _planar(self, frames_BTHWC: Tensor) -> Tensor:
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3:
            raise SpecError(
                f"frames have shape {tuple(frames_BTHWC.shape)}; expected [batch, frames, height, width, 3]. "
                "An image is a clip of one frame."
            )
        return frames_BTHWC.permute(0, 1, 4, 2, 3)

    def _require_frames(self, frames_BTCHW: Tensor) -> None:
        size = self.config.image_size
        if frames_BTCHW.ndim != 5 or frames_BTCHW.shape[2] != 3:
            raise SpecError(
                f"planar frames have shape {tuple(frames_BTCHW.shape)}; expected [batch, frames, 3, height, width]."
            )
        num_clips, num_frames, _, height, width = frames_BTCHW.shape
        if (height, width) != (size, size):
            raise SpecError(f"frames are {height} x {width} px; this tokenizer takes {size} x {size} px. Resize them.")
        self._require_counts(num_clips, num_frames)
        if frames_BTCHW.dtype != torch.uint8 and not frames_BTCHW.is_floating_point():
            raise SpecError(f"frames are {frames_BTCHW.dtype}; give uint8 from 0 to 255 or floats from -1 to 1.")

    def _require_bits(self, bits_BThwL: Tensor) -> None:
        expected = (*self.config.grid, self.config.bits_per_token)
        if bits_BThwL.ndim != 5 or tuple(bits_BThwL.shape[2:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise SpecError(f"bits have shape {tuple(bits_BThwL.shape)}; expected [batch, frames, {wanted}].")
        if bits_BThwL.dtype != torch.bool:
            raise SpecError(f"bits are {bits_BThwL.dtype}; expected bool.")
        self._require_counts(*bits_BThwL.shape[:2])

    def _require_counts(self, num_clips: int, num_frames: int) -> None:
        most = self.config.max_frames
        if not 1 <= num_frames <= most:
            raise SpecError(f"a clip has {num_frames} frames; this tokenizer takes 1 to {most}. Cut it into clips.")
        if num_clips < 1:
            raise SpecError("the batch is empty; give at least one clip.")


def initialise_weights(model: BSQViT, seed: int) -> None:
    """Fill the weights from a seed: matrices and positions from N(0, .02), biases and temporal positions 0.

    The two linear layers around the quantizer are uniform in +-1/sqrt(inputs), as in the reference.  NumPy draws the
    numbers, for torch's depend on the CPU's vector unit.  The paper's truncation at +-2 is 100 deviations away."""
    generator = np.random.default_rng(seed)
    around_quantizer = {"to_latents": model.to_latents.in_features, "from_codes": model.from_codes.in_features}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            if owner in around_quantizer:
                bound = around_quantizer[owner] ** -0.5
                parameter.copy_(torch.from_numpy(generator.uniform(-bound, bound, tuple(parameter.shape))))
            elif kind.endswith("_scale"):
                half = model.config.encoder if name.startswith("encoder.") else model.config.decoder
                parameter.fill_(half.layer_scale or 0.0)
            elif kind == "bias" or kind == "temporal":
                parameter.zero_()
            elif ".norm_" in name or "_norm." in name:
                parameter.fill_(1.0)
            else:
                drawn = generator.standard_normal(tuple(parameter.shape), dtype=np.float32)
                parameter.copy_(torch.from_numpy(drawn * np.float32(INIT_STD)))
