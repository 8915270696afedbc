"""The first phase of training on little compute: both halves learn a fixed transform code, each by itself.

A tokenizer that learns from its own reconstructions alone soon codes each patch by itself, and much of what its tokens
say follows from their neighbours.  A transform code of blocks (`tokenizer/transform_code.py`) has spent its bits better
before the first update; the encoder learns its bits by cross entropy, the decoder to render them, and training goes on
from there with `model.init_from`.

Shape letters: B clips, T frames, H W pixels, C colours, N tokens of a frame, L bits per token, D width."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.bsqvit import BSQViT
from tokenizer.ema import MovingAverage
from tokenizer.losses import psnr
from tokenizer.ranks import broadcast_from_first_rank, copy_from_first_rank
from tokenizer.train_config import TrainConfig
from tokenizer.train_state import TrainState
from tokenizer.train_step import Learner, Metrics, pictures
from tokenizer.transform_code import BLOCK_TOKENS, TransformCode
from tokenizer.vit import Block, FrameTransformer, patchify

NUM_FITTED = 2048
"""Pictures that the code is fitted to."""
MOST_PICTURES = 256
"""From which the first features are scaled."""
PLACE_SHARE = 1 / 3
"""Of the first features' variance, that says where a token is in its block; the rest is what it shows."""
FRAME_LENGTH = 1.5
"""Length of a temporal position's direction as a multiple of the others': one must outweigh all frames before."""
SHARPNESS = 2.0
"""Scale of the first queries and keys: at 2 a token gives its partner nearly half of a head's weight."""


class CodeLearner(Learner):
    """Teaches both halves of a tokenizer a transform code."""

    def __init__(self, config: TrainConfig, model: BSQViT, device: torch.device) -> None:
        super().__init__(config, model, device)
        self._code: TransformCode | None = None
        self._vectors: Any = self._compiled(self.model.vectors)
        self._render: Any = self._compiled(self.model.render)

    @property
    def is_prepared(self) -> bool:
        """Whether there is a code to learn."""
        return self._code is not None

    def prepare(self, frames_BTHWC: Tensor) -> None:
        """Fit the code to uint8 frames, and let a random model look at the tokens of its block.

        Raises SpecError where the model's grid has no such blocks or the frames are too few."""
        config = self.model.config
        frames_BCHW = pictures(frames_BTHWC.to(self.device).float() / 127.5 - 1)
        self._use(
            TransformCode.fit(
                frames_BCHW,
                patch_size=config.patch_size,
                bits_per_token=config.bits_per_token,
                num_classes=self.config.losses.code_classes,
            )
        )
        if self.config.model.init_from is None:
            self._begin(frames_BCHW)

    @torch.no_grad()
    def _begin(self, frames_BCHW: Tensor) -> None:
        assert self._code is not None
        model, seed = self.model, self.config.run.seed
        patches_MP = patchify(frames_BCHW[:MOST_PICTURES, None], model.config.patch_size).flatten(0, 2)
        codes_ML = model.quantizer.to_codes(self._code.encode(frames_BCHW[:MOST_PICTURES]).bits).flatten(0, 1)
        for embedding, inputs, half in (
            (model.encoder.patch_embedding, patches_MP, model.encoder),
            (model.from_codes, codes_ML, model.decoder),
        ):
            embed_evenly(embedding, inputs, seed=seed)
            look_at_partners(half.transformer, model.config.grid, seed=seed)
        copy_from_first_rank(model)
        self.average = MovingAverage(model, self.config.optimizer.ema)

    def tensors(self) -> dict[str, Tensor]:
        assert self._code is not None
        return super().tensors() | {f"code.{name}": value for name, value in _arrays(self._code).items()}

    def load(self, state: TrainState) -> None:
        super().load(state)
        sizes = {"patch_size": self.model.config.patch_size, "block_tokens": BLOCK_TOKENS}
        arrays = {name: value.to(self.device) for name, value in state.part("code").items()}
        self._use(TransformCode(**sizes, **arrays))  # type: ignore[arg-type]

    def _is_adversarial(self, step: int) -> bool:
        # A discriminator would learn what gives away the code that both halves are to have.
        return False

    def _use(self, code: TransformCode) -> None:
        broadcast_from_first_rank(_arrays(code).values())
        self._code = code

    def _tokenizer_gradients(self, frames_BTHWC: Tensor, real_BCHW: Tensor, step: int) -> tuple[Metrics, Tensor]:
        assert self._code is not None
        bits_BTNL, weights_BTNL = (
            torch.unflatten(each, 0, frames_BTHWC.shape[:2]) for each in self._code.encode(real_BCHW)
        )
        vectors_BTNL = self._vectors(frames_BTHWC)
        said_BTNL = vectors_BTNL.detach() > 0
        self.usage.add(said_BTNL)
        # First the code as it should be, then as the encoder has it.
        has_own = step >= self.config.losses.own_bits_from * self.config.optimizer.steps
        made_BTHWC = self._render(said_BTNL if has_own else bits_BTNL)
        fake_BCHW = pictures(made_BTHWC)
        similarity, metrics = self._similarity(fake_BCHW, real_BCHW)
        errors = F.binary_cross_entropy_with_logits(vectors_BTNL, bits_BTNL.float(), reduction="none")
        metrics["bit_cross_entropy"] = (errors * weights_BTNL).mean()
        total = similarity + metrics["bit_cross_entropy"]
        torch.autograd.backward(total)
        metrics["loss"] = total
        metrics["wrong_bits"] = (said_BTNL != bits_BTNL).float().mean()
        metrics["psnr"] = psnr(made_BTHWC.detach().clamp(-1, 1), frames_BTHWC).mean()
        return {name: value.detach() for name, value in metrics.items()}, fake_BCHW


@torch.no_grad()
def embed_evenly(embedding: nn.Linear, inputs_MP: Tensor, *, seed: int) -> None:
    """Begin a linear map with a rotation of its inputs' principal components, the strong ones damped.

    Their standard deviations become square roots of what they are, so that detail is not lost beside brightness; the
    outputs have variance 1 on the average."""
    generator = torch.Generator().manual_seed(seed)
    variances, vectors = torch.linalg.eigh(inputs_MP.T @ inputs_MP / len(inputs_MP))
    damped = vectors * variances.clamp_min(variances.max() * 1e-6) ** -0.25
    widest = max(embedding.weight.shape)
    rotation = torch.linalg.qr(torch.randn(widest, widest, generator=generator))[0].to(inputs_MP.device)
    weight = rotation[: embedding.out_features, : embedding.in_features] @ damped.T
    embedding.weight.copy_(weight / (inputs_MP @ weight.T).square().mean().sqrt())


@torch.no_grad()
def look_at_partners(transformer: FrameTransformer, grid: tuple[int, int], *, seed: int) -> None:
    """Let each of the first layer's heads begin with looking at one other token of a 2 x 2 block of the same frame.

    Positions become sums of directions for the block's row and column and the place within the block, temporal
    positions directions of their own, of which the first frame has none.  Queries and keys of the first layer compare
    them, with the place of the partner exchanged in the keys.  Heads beyond three, one for each partner, stay as they
    are.  Raises SpecError where the heads are too narrow for so many directions."""
    width = transformer.position.shape[1]
    attention = cast(Block, transformer.blocks[0]).attention
    head_width = width // attention.heads
    rows, columns = grid[0] // 2, grid[1] // 2
    frames = 0 if transformer.temporal is None else len(transformer.temporal) - 1
    num_directions = rows + columns + 4 + frames
    if num_directions > head_width or any(side % 2 for side in grid):
        raise SpecError(
            f"a grid of {grid[0]} x {grid[1]} tokens and {frames + 1} frames needs heads of at least {num_directions} "
            f"values, and even sides, to begin with a transform code; they have {head_width}. Set "
            "losses.transform_code to false."
        )
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].T.to(transformer.position.device)
    of_row, of_column, of_top, of_left, of_frame = torch.split(basis[:num_directions], [rows, columns, 2, 2, frames])
    # Four unit directions, beside features whose squared norm is the width times their variance.
    length = math.sqrt(width * PLACE_SHARE / (1 - PLACE_SHARE) / 4)
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = of_row[y // 2] + of_column[x // 2] + of_top[y % 2] + of_left[x % 2]
    transformer.position.copy_(length * places.flatten(0, 1))
    if transformer.temporal is not None:
        transformer.temporal.zero_()
        transformer.temporal[1:] = FRAME_LENGTH * length * of_frame
    queries, keys = attention.qkv.weight[:width], attention.qkv.weight[width : 2 * width]
    for head, (other_row, other_column) in enumerate(((0, 1), (1, 0), (1, 1))[: attention.heads]):
        compared = slice(head * head_width, head * head_width + num_directions)
        for projection, is_key in ((queries, False), (keys, True)):
            projection[head * head_width : (head + 1) * head_width] = 0
            top = of_top.flip(0) if is_key and other_row else of_top
            left = of_left.flip(0) if is_key and other_column else of_left
            projection[compared] = SHARPNESS * torch.cat([of_row, of_column, top, left, of_frame / 2])


def _arrays(code: TransformCode) -> dict[str, Tensor]:
    values = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
