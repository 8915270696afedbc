"""A transform code that fills the tokens of a grid: what a tokenizer can learn before it finds better.

Pictures are cut into blocks of several patches, and blocks are of one of a few classes, by the energy of their
detail.  A block's Karhunen-Loeve coefficients are quantized by Lloyd-Max quantizers of its class.  In each class the
bits of a block's tokens go one by one to the coefficient where they save most squared error, so that a plain block has
fine steps and a busy one many coefficients.  Levels are counted in Gray code, so that a wrong bit beside a threshold is
an error of one step; a coefficient's bits stay in one token where they fit, and in the same place in all classes.

Shape letters: B pictures, H W pixels, V values of a block, M blocks, C classes, K coefficients, Q levels, S tokens of a
block, N tokens of a picture, L bits per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.errors import SpecError

BLOCK_TOKENS = 2
"""Patches along a block's side."""
NUM_ITERATIONS = 20
MOST_BLOCKS = 60_000
"""To which the code is fitted."""
NUM_PLAIN = 3
"""The strongest coefficients, brightness and colour, say nothing of how busy a block is."""
LEAST_ENERGY = 1e-4


class CodedPictures(NamedTuple):
    """`bits` bool [B, N, L], and `weights` [B, N, L], how much each matters: about 1 on average."""

    bits: Tensor
    weights: Tensor


@dataclass(frozen=True)
class TransformCode:
    """A fitted code.  All arrays are on one device."""

    patch_size: int
    block_tokens: int
    """Patches along a block's side."""
    mean_V: Tensor
    basis_VK: Tensor
    """Orthonormal columns."""
    edges_C: Tensor
    """Of the classes, one fewer than these: logarithms of energy."""
    thresholds_CKQ: Tensor
    """Infinite where a coefficient has fewer levels."""
    levels_CKQ: Tensor
    coefficient_CSL: Tensor
    """Which coefficient each bit of a block belongs to; number K is the class itself."""
    shift_CSL: Tensor
    """And its place in that coefficient's Gray code."""
    saved_CSL: Tensor
    """Mean squared error of a coefficient that the bit saves."""

    @classmethod
    def fit(
        cls,
        frames_BCHW: Tensor,
        *,
        patch_size: int,
        bits_per_token: int,
        block_tokens: int = BLOCK_TOKENS,
        num_classes: int = 1,
        most_bits: int = 6,
    ) -> TransformCode:
        """The code of pictures like these, planar floats; `most_bits` is the most that one coefficient gets.

        Raises SpecError where the pictures are too few or cannot be cut into blocks."""
        block, num_tokens = patch_size * block_tokens, block_tokens**2
        if any(side % block for side in frames_BCHW.shape[-2:]):
            raise SpecError(f"pictures of {tuple(frames_BCHW.shape[-2:])} px cannot be cut into blocks of {block} px.")
        blocks_MV = _spread(_cut(frames_BCHW, block), MOST_BLOCKS)
        class_bits = (num_classes - 1).bit_length()
        needed = 2 * max(blocks_MV.shape[1], num_classes * 2**most_bits)
        if len(blocks_MV) < needed:
            raise SpecError(
                f"a transform code of {block} px blocks needs at least {needed:,} blocks to be fitted to; there are "
                f"{len(blocks_MV):,}. Give more pictures."
            )
        mean_V = blocks_MV.mean(0)
        centred_MV = blocks_MV - mean_V
        _, vectors = torch.linalg.eigh(centred_MV.T @ centred_MV / len(centred_MV))
        num_bits = num_tokens * bits_per_token - class_bits
        basis_VK = vectors.flip(1)[:, :num_bits].contiguous()
        coefficients_MK = centred_MV @ basis_VK
        energy_M = _energy(coefficients_MK)
        edges_C = torch.quantile(energy_M, torch.arange(1, num_classes, device=energy_M.device) / num_classes)
        class_M = torch.bucketize(energy_M, edges_C)
        books = [
            [_Quantizers(samples_M, most_bits) for samples_M in coefficients_MK[class_M == number].T.contiguous()]
            for number in range(num_classes)
        ]
        allocated = [_allocate(each, num_bits) for each in books]
        coefficient_CSL, shift_CSL = _deal(allocated, class_bits, num_tokens, bits_per_token)
        num_coefficients = basis_VK.shape[1]
        thresholds_CKQ = basis_VK.new_full((num_classes, num_coefficients, 2**most_bits - 1), torch.inf)
        levels_CKQ = basis_VK.new_zeros(num_classes, num_coefficients, 2**most_bits)
        saved: dict[tuple[int, int, int], float] = {}
        for number, (each, bits) in enumerate(zip(books, allocated, strict=True)):
            for coefficient, count in enumerate(bits):
                levels_CKQ[number, coefficient, : 2**count] = each[coefficient].levels(count)
                thresholds_CKQ[number, coefficient, : 2**count - 1] = _thresholds(each[coefficient].levels(count))
                saved |= {(number, coefficient, s): each[coefficient].saved(count - 1 - s) for s in range(count)}
        # With the wrong class everything is wrong.
        saved |= {
            (number, num_coefficients, s): each[0].saved(0) / 2 ** (class_bits - 1 - s)
            for number, each in enumerate(books)
            for s in range(class_bits)
        }
        places = torch.stack([coefficient_CSL, shift_CSL], -1).tolist()
        saved_CSL = torch.tensor(
            [[[saved[number, k, s] for k, s in token] for token in of_class] for number, of_class in enumerate(places)]
        )
        device = basis_VK.device
        return cls(
            patch_size, block_tokens, mean_V, basis_VK, edges_C, thresholds_CKQ, levels_CKQ,
            coefficient_CSL.to(device), shift_CSL.to(device), saved_CSL.to(device),
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, frames_BCHW: Tensor) -> CodedPictures:
        """The tokens of planar float pictures; a bit's weight is the root of the squared error that it saves."""
        coefficients_MK = (_cut(frames_BCHW, self._block) - self.mean_V) @ self.basis_VK
        class_M = torch.bucketize(_energy(coefficients_MK), self.edges_C)
        place_MK = (coefficients_MK[..., None] > self.thresholds_CKQ[class_M]).sum(-1)
        place_MK = torch.cat([place_MK, class_M[:, None]], 1)
        gray_MK = place_MK ^ (place_MK >> 1)
        of_bit_MP = gray_MK.gather(1, self.coefficient_CSL[class_M].flatten(1))
        bits_MP = (of_bit_MP >> self.shift_CSL[class_M].flatten(1)) & 1
        root_CSL = self.saved_CSL.clamp_min(0).sqrt()
        weights_MP = (root_CSL / root_CSL.mean())[class_M].flatten(1)
        return CodedPictures(self._to_grid(bits_MP.bool(), frames_BCHW), self._to_grid(weights_MP, frames_BCHW))

    @torch.no_grad()
    def decode(self, bits_BNL: Tensor, height: int, width: int) -> Tensor:
        """Planar float pictures [B, 3, height, width] of bits."""
        rows, columns = height // self._block, width // self._block
        side = self.block_tokens
        bits_MP = bits_BNL.reshape(len(bits_BNL), rows, side, columns, side, -1).transpose(2, 3).flatten(3)
        bits_MP = bits_MP.flatten(0, 2).long()
        # The bits of the class lie in the same place in all classes.
        says_class_P = self.coefficient_CSL[0].flatten() == self.basis_VK.shape[1]
        class_M = _from_gray((bits_MP[:, says_class_P] << self.shift_CSL[0].flatten()[says_class_P]).sum(1))
        class_M = class_M.clamp_max(len(self.levels_CKQ) - 1)
        gray_MK = bits_MP.new_zeros(len(bits_MP), self.basis_VK.shape[1] + 1)
        gray_MK.scatter_add_(1, self.coefficient_CSL[class_M].flatten(1), bits_MP << self.shift_CSL[class_M].flatten(1))
        place_MK = _from_gray(gray_MK[:, :-1])
        coefficients_MK = self.levels_CKQ[class_M].gather(2, place_MK[..., None]).squeeze(-1)
        blocks_MV = coefficients_MK @ self.basis_VK.T + self.mean_V
        cut = blocks_MV.reshape(len(bits_BNL), rows, columns, 3, self._block, self._block)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(bits_BNL), 3, height, width)

    @property
    def _block(self) -> int:
        return self.patch_size * self.block_tokens

    def _to_grid(self, values_MP: Tensor, frames_BCHW: Tensor) -> Tensor:
        rows, columns = (size // self._block for size in frames_BCHW.shape[-2:])
        side = self.block_tokens
        blocks = values_MP.reshape(len(frames_BCHW), rows, columns, side, side, -1)
        return blocks.transpose(2, 3).flatten(1, 4)


class _Quantizers:
    """The Lloyd-Max quantizers of one coefficient with 0 to `most_bits` bits, fitted when asked for."""

    def __init__(self, samples_M: Tensor, most_bits: int) -> None:
        self._samples_M, self._most_bits = samples_M, most_bits
        self._levels: list[Tensor] = []
        self._errors: list[float] = []

    def levels(self, bits: int) -> Tensor:
        while len(self._levels) <= bits:
            levels = _lloyd_max(self._samples_M, 2 ** len(self._levels))
            made_M = levels[torch.bucketize(self._samples_M, _thresholds(levels))]
            self._levels.append(levels)
            self._errors.append(float((self._samples_M - made_M).square().mean()))
        return self._levels[bits]

    def saved(self, bits: int) -> float:
        """Error that one bit more than `bits` saves; none is to be had beyond the most."""
        if bits >= self._most_bits:
            return -1.0
        self.levels(bits + 1)
        return self._errors[bits] - self._errors[bits + 1]


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


def _deal(allocated: list[list[int]], class_bits: int, num_tokens: int, bits_per_token: int) -> tuple[Tensor, Tensor]:
    """Which bit of which coefficient each place of a block's tokens holds, in each class.

    From the middle class outwards, each keeps what it shares with its neighbour where that has it."""
    num_coefficients, middle = len(allocated[0]), len(allocated) // 2
    of_class = {(num_coefficients, shift): (shift % num_tokens, shift // num_tokens) for shift in range(class_bits)}
    places: dict[int, dict[tuple[int, int], tuple[int, int]]] = {}
    for number in sorted(range(len(allocated)), key=lambda number: abs(number - middle)):
        wanted = [
            (coefficient, shift)
            for coefficient in sorted(range(num_coefficients), key=lambda each: -allocated[number][each])
            for shift in reversed(range(allocated[number][coefficient]))
        ]
        neighbour = places[min(places, key=lambda other: abs(other - number))] if places else {}
        kept = of_class | {bit: neighbour[bit] for bit in wanted if bit in neighbour}
        used = set(kept.values())
        free: list[list[int]] = [
            [place for place in range(bits_per_token) if (token, place) not in used] for token in range(num_tokens)
        ]
        home = {coefficient: token for (coefficient, _), (token, _) in kept.items()}
        for coefficient, shift in wanted:
            if (coefficient, shift) in kept:
                continue
            rest = allocated[number][coefficient]
            token = home.get(coefficient, -1)
            if token < 0 or not free[token]:
                # The first token with room for the whole coefficient, else the one with the most.
                roomiest = max(range(num_tokens), key=lambda each: len(free[each]))
                token = next((each for each in range(num_tokens) if len(free[each]) >= rest), roomiest)
            home[coefficient] = token
            kept[coefficient, shift] = (token, free[token].pop(0))
        places[number] = kept
    coefficient_CSL = torch.zeros(len(allocated), num_tokens, bits_per_token, dtype=torch.long)
    shift_CSL = torch.zeros_like(coefficient_CSL)
    for number, held in places.items():
        for (coefficient, shift), (token, place) in held.items():
            coefficient_CSL[number, token, place] = coefficient
            shift_CSL[number, token, place] = shift
    return coefficient_CSL, shift_CSL


def _energy(coefficients_MK: Tensor) -> Tensor:
    """Logarithm of the energy of a block's detail."""
    return (coefficients_MK[:, NUM_PLAIN:].square().sum(1) + LEAST_ENERGY).log()


def _from_gray(gray: Tensor) -> Tensor:
    number = gray.clone()
    for shift in range(1, 8):
        number ^= gray >> shift
    return number


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
