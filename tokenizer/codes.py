"""Bits <-> packed bytes <-> indices <-> groups, exact for every L from 1 to 64.

A token's value is its index: channel 0 is the highest of its L bits.  Packed, the values of a row follow each
other least significant bit first without gaps, and zero bits fill the row's last byte.  All of it is integer
arithmetic; sums in floating point go wrong from 25 bits in fp32 and from 9 in bf16.

Every function takes a NumPy array or a torch tensor and returns the same kind, a tensor on its own device.
Wrong shapes, dtypes and values out of range raise SpecError.

Shape letters: B rows, N tokens, L bits per token, G groups, O bytes.  "..." is any leading shape."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import SpecError

Array = TypeVar("Array", npt.NDArray[Any], Tensor)
IndexType = Literal["int64", "int32"]

MAX_INDEX_BITS = 62
"""Indices are signed 64-bit integers, and 1 << L must be one too."""
MAX_BITS = 64
BLOCK_ROWS = 128
"""Rows that `unpack_indices` handles at a time: 128 of 1,024 int64 indices stay in a core's cache."""


def packed_size(num_tokens: int, bits_per_token: int) -> int:
    """Bytes of a row of packed tokens."""
    return math.ceil(num_tokens * bits_per_token / 8)


def pack_bits(bits_BNL: Array) -> Array:
    """Pack bool bits [B, N, L] into uint8 [B, ceil(N*L / 8)]."""
    _require_bool(bits_BNL)
    if bits_BNL.ndim != 3 or not 1 <= bits_BNL.shape[2] <= MAX_BITS:
        raise SpecError(f"bits have shape {tuple(bits_BNL.shape)}; expected [rows, tokens, 1 to {MAX_BITS} bits].")
    num_rows, num_bits = bits_BNL.shape[0], bits_BNL.shape[1] * bits_BNL.shape[2]
    if isinstance(bits_BNL, np.ndarray):
        return np.packbits(bits_BNL[..., ::-1].reshape(num_rows, num_bits), axis=1, bitorder="little")
    padded_BM = F.pad(bits_BNL.flip(-1).reshape(num_rows, num_bits), (0, -num_bits % 8))
    octets_BO8 = padded_BM.reshape(num_rows, padded_BM.shape[1] // 8, 8).to(torch.uint8)
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits_BNL.device)
    packed_BO: Tensor = (octets_BO8 << shifts_8).sum(-1, dtype=torch.uint8)
    return packed_BO


def unpack_bits(packed_BO: Array, num_tokens: int, bits_per_token: int) -> Array:
    """Bool bits [B, num_tokens, L] of rows that `pack_bits` packed."""
    _require_packed(packed_BO, num_tokens, bits_per_token, MAX_BITS)
    num_bits = num_tokens * bits_per_token
    shape = (len(packed_BO), num_tokens, bits_per_token)
    if isinstance(packed_BO, np.ndarray):
        flat_BM = np.unpackbits(packed_BO, axis=1, count=num_bits, bitorder="little")
        # Contiguous, for torch takes no array with a negative stride.
        return np.ascontiguousarray(flat_BM.view(np.bool_).reshape(shape)[..., ::-1])
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=packed_BO.device)
    octets_BO8 = (packed_BO.unsqueeze(-1) >> shifts_8) & 1
    return octets_BO8.flatten(1)[:, :num_bits].bool().reshape(shape).flip(-1)


def bits_to_indices(bits: Array) -> Array:
    """Indices int64 [...] of bool bits [..., L], L up to 62."""
    _require_bool(bits)
    if bits.ndim < 1 or not 1 <= bits.shape[-1] <= MAX_INDEX_BITS:
        raise SpecError(f"bits have shape {tuple(bits.shape)}; the last axis holds 1 to {MAX_INDEX_BITS} bits.")
    if isinstance(bits, np.ndarray):
        return np.asarray((bits.astype(np.int64) << np.arange(bits.shape[-1])[::-1]).sum(-1))
    return (bits.long() << torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)).sum(-1)


def indices_to_bits(indices: Array, bits_per_token: int) -> Array:
    """Bool bits [..., L] of indices [...] of any integer type, each from 0 to 2^L - 1."""
    _require_indices(indices, bits_per_token)
    if isinstance(indices, np.ndarray):
        return ((indices.astype(np.int64)[..., None] >> np.arange(bits_per_token)[::-1]) & 1).astype(np.bool_)
    shifts_L = torch.arange(bits_per_token - 1, -1, -1, device=indices.device)
    return ((indices.long().unsqueeze(-1) >> shifts_L) & 1).bool()


def bits_to_groups(bits: Array, group_size: int) -> Array:
    """Indices int64 [..., G] of each `group_size` neighbouring bits of [..., L]; group 0 holds the highest bits."""
    if bits.ndim < 1 or group_size < 1 or bits.shape[-1] % group_size:
        raise SpecError(f"bits have shape {tuple(bits.shape)}; the last axis must be a multiple of {group_size}.")
    return bits_to_indices(bits.reshape(*bits.shape[:-1], bits.shape[-1] // group_size, group_size))


def groups_to_bits(groups: Array, group_size: int) -> Array:
    """Bool bits [..., L] of group indices [..., G]."""
    bits = indices_to_bits(groups, group_size)
    return bits.reshape(*groups.shape[:-1], groups.shape[-1] * group_size)


def pack_indices(indices_BN: Array, bits_per_token: int) -> Array:
    """Pack indices [B, N], L up to 62, into the same bytes as `pack_bits`."""
    return pack_bits(indices_to_bits(indices_BN, bits_per_token))


def unpack_indices(
    packed_BO: Array,
    num_tokens: int,
    bits_per_token: int,
    dtype: IndexType = "int64",
    out: npt.NDArray[Any] | None = None,
) -> Array:
    """Indices [B, num_tokens] of packed rows, L up to 62; `dtype` int32 serves up to 31 bits in half the memory.

    `out`, a contiguous array of that shape and type, may be filled and returned for NumPy rows: memory that was in use
    before takes them quicker than fresh memory."""
    _require_packed(packed_BO, num_tokens, bits_per_token, MAX_INDEX_BITS)
    if dtype == "int32" and bits_per_token > 31:
        raise SpecError(f"{bits_per_token} bits do not fit int32 indices; ask for int64.")
    if isinstance(packed_BO, Tensor):
        return _unpack_indices_torch(packed_BO, num_tokens, bits_per_token).to(getattr(torch, dtype))
    if bits_per_token > 57:
        return bits_to_indices(unpack_bits(packed_BO, num_tokens, bits_per_token)).astype(dtype)
    return _unpack_words(packed_BO, num_tokens, bits_per_token, np.dtype(dtype), out)


def _unpack_words(
    packed_BO: npt.NDArray[np.uint8],
    num_tokens: int,
    bits: int,
    dtype: np.dtype[Any],
    out: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    # A period is the fewest tokens that end on a byte and span a whole word.  Token j of every period is then one
    # unaligned little-endian word per period: a strided view, one shift and one mask, whatever the width.
    word_bytes = 4 if bits <= 25 else 8
    period_tokens = 8 // math.gcd(bits, 8)
    period_bytes = period_tokens * bits // 8
    repeat = math.ceil(word_bytes / period_bytes)
    period_tokens, period_bytes = period_tokens * repeat, period_bytes * repeat

    num_periods = math.ceil(num_tokens / period_tokens)
    num_rows, row_bytes = packed_BO.shape
    if row_bytes != num_periods * period_bytes or not packed_BO.flags.c_contiguous:
        padded_BO = np.zeros((num_rows, num_periods * period_bytes), np.uint8)
        padded_BO[:, :row_bytes] = packed_BO
        packed_BO, row_bytes = padded_BO, padded_BO.shape[1]

    shape = (num_rows, num_periods, period_tokens)
    fits = out is not None and out.dtype == dtype and out.shape == (num_rows, num_periods * period_tokens)
    indices_BPJ = out.reshape(shape) if out is not None and fits else np.empty(shape, dtype)
    word = np.dtype(f"<u{word_bytes}")
    mask = word.type((1 << bits) - 1)
    values_BP = np.empty((min(num_rows, BLOCK_ROWS), num_periods), word)
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = packed_BO[first : first + BLOCK_ROWS]
        for token in range(period_tokens):
            # The last words of a period start earlier, so that none reads past the end of the row.
            offset = min(token * bits >> 3, period_bytes - word_bytes)
            shift = word.type(token * bits - 8 * offset)
            words_BP = np.ndarray((len(rows), num_periods), word, rows, offset, (row_bytes, period_bytes))
            np.right_shift(words_BP, shift, out=values_BP[: len(rows)])
            np.bitwise_and(values_BP, mask, out=values_BP)
            indices_BPJ[first : first + BLOCK_ROWS, :, token] = values_BP[: len(rows)]
    indices_BN = indices_BPJ.reshape(num_rows, num_periods * period_tokens)
    return indices_BN if indices_BN.shape[1] == num_tokens else np.ascontiguousarray(indices_BN[:, :num_tokens])


def _unpack_indices_torch(packed_BO: Tensor, num_tokens: int, bits: int) -> Tensor:
    # Token t starts at bit t*L, so it spans at most ceil((7 + L) / 8) bytes; each is shifted into place and added.
    # Bytes past the end of the row belong to no token: the clamp only keeps the gather inside it.
    starts_N = torch.arange(num_tokens, device=packed_BO.device) * bits
    first_byte_N, first_bit_N = starts_N >> 3, starts_N & 7
    indices_BN = torch.zeros(len(packed_BO), num_tokens, dtype=torch.int64, device=packed_BO.device)
    for byte in range(math.ceil((7 + bits) / 8)):
        octets_BN = packed_BO[:, (first_byte_N + byte).clamp(max=packed_BO.shape[1] - 1)].long()
        shift_N = 8 * byte - first_bit_N
        if byte == 0:
            indices_BN |= octets_BN >> -shift_N
        else:
            indices_BN |= torch.where(shift_N < bits, octets_BN << shift_N.clamp(max=bits), 0)
    return indices_BN & ((1 << bits) - 1)


def _require_bool(bits: npt.NDArray[Any] | Tensor) -> None:
    if bits.dtype not in (np.bool_, torch.bool):
        raise SpecError(f"bits are {bits.dtype}; expected bool.")


def _require_indices(indices: npt.NDArray[Any] | Tensor, bits_per_token: int) -> None:
    if not 1 <= bits_per_token <= MAX_INDEX_BITS:
        raise SpecError(f"bits_per_token is {bits_per_token}; indices have 1 to {MAX_INDEX_BITS} bits.")
    is_integer = (
        indices.dtype.kind in "iu"
        if isinstance(indices, np.ndarray)
        else not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    )
    if not is_integer:
        raise SpecError(f"indices are {indices.dtype}; expected integers.")
    # A comparison on a GPU would make the host wait for it; there the caller's indices are taken as they are.
    on_host = isinstance(indices, np.ndarray) or indices.device.type == "cpu"
    size = math.prod(indices.shape)
    if on_host and size and not 0 <= int(indices.min()) <= int(indices.max()) < 1 << bits_per_token:
        raise SpecError(
            f"indices run from {int(indices.min())} to {int(indices.max())}; {bits_per_token} bits hold 0 to "
            f"{(1 << bits_per_token) - 1:,}."
        )


def _require_packed(packed: npt.NDArray[Any] | Tensor, num_tokens: int, bits_per_token: int, most: int) -> None:
    if not 1 <= bits_per_token <= most:
        raise SpecError(f"bits_per_token is {bits_per_token}; it must be from 1 to {most}.")
    if num_tokens < 1:
        raise SpecError(f"num_tokens is {num_tokens}; it must be at least 1.")
    if packed.dtype not in (np.uint8, torch.uint8):
        raise SpecError(f"packed tokens are {packed.dtype}; expected uint8.")
    expected = packed_size(num_tokens, bits_per_token)
    if packed.ndim != 2 or packed.shape[1] != expected:
        raise SpecError(
            f"packed tokens have shape {tuple(packed.shape)}; {num_tokens:,} tokens of {bits_per_token} bits take "
            f"[rows, {expected:,}] bytes."
        )
