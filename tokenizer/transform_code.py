"""A transform code that fills the tokens of a grid: what a tokenizer can learn before it finds better.

Pictures are cut into blocks of several patches.  A block's Karhunen-Loeve coefficients are quantized by Lloyd-Max
quantizers; the bits of its tokens go one by one to the coefficient where they save most squared error.  Levels are
counted in Gray code, so that a wrong bit beside a threshold is an error of one step, and a coefficient's bits stay in
one token where they fit.

Shape letters: B pictures, H W pixels, V values of a block, M blocks, K coefficients, Q levels, S tokens of a block,
N tokens of a picture, L bits per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import SpecError

NUM_ITERATIONS = 20
MOST_BLOCKS = 60_000
"""Of which the covariance is taken; quantizers come from a third of them."""


@dataclass(frozen=True)
class TransformCode:
    """A fitted code.  All arrays are on one device."""

    patch_size: int
    block_tokens: int
    """Patches along a block's side."""
    mean_V: Tensor
    basis_VK: Tensor
    """Orthonormal columns, K = S * L; those that no bit goes to are not used."""
    thresholds_KQ: Tensor
    """Infinite where a coefficient has fewer levels."""
    levels_KQ: Tensor
    coefficient_SL: Tensor
    """Which coefficient each bit of a block belongs to."""
    shift_SL: Tensor
    """And its place in that coefficient's Gray code."""
    saved_SL: Tensor
    """Mean squared error of a coefficient that the bit saves."""

    @classmethod
    def fit(
        cls, frames_BCHW: Tensor, *, patch_size: int, bits_per_token: int, block_tokens: int = 2, most_bits: int = 5
    ) -> TransformCode:
        """The code of pictures like these, planar floats; `most_bits` is the most that one coefficient gets.

        Raises SpecError where the pictures are too few or cannot be cut into blocks."""
        block, num_tokens = patch_size * block_tokens, block_tokens**2
        if any(side % block for side in frames_BCHW.shape[-2:]):
            raise SpecError(f"pictures of {tuple(frames_BCHW.shape[-2:])} px cannot be cut into blocks of {block} px.")
        blocks_MV = _spread(_cut(frames_BCHW, block), MOST_BLOCKS)
        num_coefficients = min(num_tokens * bits_per_token, blocks_MV.shape[1])
        if len(blocks_MV) < 2 * blocks_MV.shape[1]:
            raise SpecError(
                f"a transform code of {block} px blocks needs at least {2 * blocks_MV.shape[1]:,} blocks to be fitted "
                f"to; there are {len(blocks_MV):,}. Give more pictures."
            )
        mean_V = blocks_MV.mean(0)
        centred_MV = blocks_MV - mean_V
        _, vectors = torch.linalg.eigh(centred_MV.T @ centred_MV / len(centred_MV))
        basis_VK = vectors.flip(1)[:, :num_coefficients].contiguous()
        samples_KM = (_spread(centred_MV, MOST_BLOCKS // 3) @ basis_VK).T.contiguous()
        books = [_Quantizers(samples_M, most_bits) for samples_M in samples_KM]
        bits = _allocate(books, num_tokens * bits_per_token)
        coefficient_SL, shift_SL = _deal(bits, num_tokens, bits_per_token)
        number_of_levels = 2**most_bits
        thresholds_KQ = basis_VK.new_full((num_coefficients, number_of_levels - 1), torch.inf)
        levels_KQ = basis_VK.new_zeros(num_coefficients, number_of_levels)
        for number, count in enumerate(bits):
            levels_KQ[number, : 2**count] = books[number].levels(count)
            thresholds_KQ[number, : 2**count - 1] = _thresholds(books[number].levels(count))
        saved_SL = torch.tensor(
            [
                [books[k].saved(bits[k] - 1 - shift) for k, shift in zip(*row, strict=True)]
                for row in zip(coefficient_SL.tolist(), shift_SL.tolist(), strict=True)
            ],
            device=basis_VK.device,
        )
        return cls(
            patch_size, block_tokens, mean_V, basis_VK, thresholds_KQ, levels_KQ,
            coefficient_SL.to(basis_VK.device), shift_SL.to(basis_VK.device), saved_SL,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Bits, bool [B, N, L], of planar float pictures."""
        blocks_MV = _cut(frames_BCHW, self._block)
        coefficients_MK = (blocks_MV - self.mean_V) @ self.basis_VK
        place_MK = (coefficients_MK[..., None] > self.thresholds_KQ).sum(-1)
        gray_MK = place_MK ^ (place_MK >> 1)
        bits_MSL = (gray_MK[:, self.coefficient_SL] >> self.shift_SL) & 1
        return self._to_grid(bits_MSL.bool(), frames_BCHW)

    @torch.no_grad()
    def decode(self, bits_BNL: Tensor, height: int, width: int) -> Tensor:
        """Planar float pictures [B, 3, height, width] of bits."""
        rows, columns = height // self._block, width // self._block
        side = self.block_tokens
        bits_MSL = bits_BNL.reshape(len(bits_BNL), rows, side, columns, side, -1).transpose(2, 3).flatten(3, 4)
        bits_MSL = bits_MSL.flatten(0, 2)
        gray_MK = bits_MSL.new_zeros(len(bits_MSL), self.levels_KQ.shape[0], dtype=torch.long)
        gray_MK.index_add_(1, self.coefficient_SL.flatten(), (bits_MSL.long() << self.shift_SL).flatten(1))
        place_MK = gray_MK.clone()
        for shift in range(1, self.levels_KQ.shape[1].bit_length()):
            place_MK ^= gray_MK >> shift
        coefficients_MK = self.levels_KQ.gather(1, place_MK.T).T
        blocks_MV = coefficients_MK @ self.basis_VK.T + self.mean_V
        cut = blocks_MV.reshape(len(bits_BNL), rows, columns, 3, self._block, self._block)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(bits_BNL), 3, height, width)

    def weights(self, height: int, width: int) -> Tensor:
        """How much each bit of a picture matters, [N, L], mean 1: the root of the error that it saves."""
        root_SL = self.saved_SL.clamp_min(0).sqrt()
        rows, columns = height // self._block, width // self._block
        each = (root_SL / root_SL.mean()).expand(rows * columns, -1, -1)
        return self._grid(each, 1, rows, columns)[0]

    @property
    def _block(self) -> int:
        return self.patch_size * self.block_tokens

    def _to_grid(self, values_MSL: Tensor, frames_BCHW: Tensor) -> Tensor:
        rows, columns = (side // self._block for side in frames_BCHW.shape[-2:])
        return self._grid(values_MSL, len(frames_BCHW), rows, columns)

    def _grid(self, values_MSL: Tensor, num_pictures: int, rows: int, columns: int) -> Tensor:
        side = self.block_tokens
        blocks = values_MSL.reshape(num_pictures, rows, columns, side, side, -1)
        return blocks.transpose(2, 3).flatten(1, 4)


class _Quantizers:
    """The Lloyd-Max quantizers of one coefficient with 0 to `most_bits` bits."""

    def __init__(self, samples_M: Tensor, most_bits: int) -> None:
        self._levels = [_lloyd_max(samples_M, 2**bits) for bits in range(most_bits + 1)]
        self._errors = [
            float((samples_M - levels[torch.bucketize(samples_M, _thresholds(levels))]).square().mean())
            for levels in self._levels
        ]

    def levels(self, bits: int) -> Tensor:
        return self._levels[bits]

    def saved(self, bits: int) -> float:
        """Error that one bit more than `bits` saves; none is to be had beyond the most."""
        return self._errors[bits] - self._errors[bits + 1] if bits + 1 < len(self._errors) else -1.0


def _lloyd_max(samples_M: Tensor, number: int) -> Tensor:
    places = (torch.arange(number, device=samples_M.device) + 0.5) / number
    levels_Q = torch.quantile(samples_M, places)
    for _ in range(NUM_ITERATIONS):
        cells_M = torch.bucketize(samples_M, _thresholds(levels_Q))
        sums_Q = torch.zeros_like(levels_Q).index_add_(0, cells_M, samples_M)
        counts_Q = torch.bincount(cells_M, minlength=number)
        levels_Q = torch.where(counts_Q > 0, sums_Q / counts_Q.clamp_min(1), levels_Q)
    return levels_Q


def _thresholds(levels_Q: Tensor) -> Tensor:
    return (levels_Q[1:] + levels_Q[:-1]) / 2


def _allocate(books: list[_Quantizers], num_bits: int) -> list[int]:
    """Bits of each coefficient: every bit goes where it saves most."""
    bits = [0] * len(books)
    for _ in range(num_bits):
        best = max(range(len(books)), key=lambda number: books[number].saved(bits[number]))
        if books[best].saved(bits[best]) < 0:
            raise SpecError("the transform code has more bits than its coefficients can take; allow more for each.")
        bits[best] += 1
    return bits


def _deal(bits: list[int], num_tokens: int, bits_per_token: int) -> tuple[Tensor, Tensor]:
    """Which bit of which coefficient each place of a block's tokens holds."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(num_tokens)]

    def emptiest() -> list[tuple[int, int]]:
        return min(places, key=len)

    for coefficient in sorted(range(len(bits)), key=lambda number: -bits[number]):
        each = [(coefficient, shift) for shift in reversed(range(bits[coefficient]))]
        if len(emptiest()) + len(each) <= bits_per_token:
            emptiest().extend(each)
        else:
            for one in each:
                emptiest().append(one)
    dealt = torch.tensor(places)
    return dealt[..., 0], dealt[..., 1]


def _cut(frames_BCHW: Tensor, block: int) -> Tensor:
    """Blocks [M, V], a picture's row by row; a block's values in order (channel, row, column)."""
    pictures, channels, height, width = frames_BCHW.shape
    cut = frames_BCHW.reshape(pictures, channels, height // block, block, width // block, block)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
