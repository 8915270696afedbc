"""Packed rows as the arrays that a model takes: indices, bits, groups, or the packed bytes themselves.

Shape letters: B rows, T frames, H W the grid, L bits, G groups, O bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.row_blocks import Outputs
from schemas.errors import SpecError, nearest_name
from tokenizer.codes import MAX_INDEX_BITS, bits_to_indices, packed_size, unpack_bits, unpack_indices

ViewName = Literal["index", "bits", "packed", "groups"]
View = ViewName | tuple[Literal["groups"], Sequence[int]]

Array = TypeVar("Array", npt.NDArray[Any], Tensor)


@dataclass(frozen=True, slots=True)
class TokenView:
    """How tokens are shown."""

    name: ViewName
    """The name of the array in a batch."""
    bits: int
    grid: tuple[int, int]
    group_bits: tuple[int, ...] = ()
    """Bits of each group, the highest bits of the index first."""

    def decode(self, packed_BO: Array, frames: int, outputs: Outputs | None = None) -> Array:
        """Rows of `frames` frames, packed uint8 [B, O], as this view shows them; tensors stay on their device.

        index: int64 [B, T, H, W].  bits: bool [B, T, H, W, L], channel 0 first.  groups: int64 [B, T, H, W, G], the
        highest bits first.  packed: the bytes as they are.  Indices of NumPy rows are laid into memory of `outputs`."""
        if self.name == "packed":
            return packed_BO
        height, width = self.grid
        shape = (len(packed_BO), frames, height, width)
        num_tokens = frames * height * width
        if self.name == "index":
            out = None if outputs is None else outputs.take((len(packed_BO), num_tokens), np.int64)
            return unpack_indices(packed_BO, num_tokens, self.bits, out=out).reshape(shape)
        if self.name == "groups":
            return self._groups(packed_BO, num_tokens).reshape(*shape, len(self.group_bits))
        return unpack_bits(packed_BO, num_tokens, self.bits).reshape(*shape, self.bits)

    def row_bytes(self, frames: int) -> int:
        """Packed bytes of a row of `frames` frames."""
        return packed_size(frames * self.grid[0] * self.grid[1], self.bits)

    def _groups(self, packed_BO: Array, num_tokens: int) -> Array:
        widths = self.group_bits
        if len(set(widths)) == 1:
            # Groups of one size are tokens of that size, the lowest bits first.
            groups_BNG = unpack_indices(packed_BO, num_tokens * len(widths), widths[0]).reshape(
                len(packed_BO), num_tokens, len(widths)
            )
            if isinstance(groups_BNG, Tensor):
                return groups_BNG.flip(-1)
            return np.ascontiguousarray(groups_BNG[..., ::-1])
        bits_BNL = unpack_bits(packed_BO, num_tokens, self.bits)
        ends = np.cumsum(widths).tolist()
        parts = [bits_to_indices(bits_BNL[..., end - width : end]) for end, width in zip(ends, widths, strict=True)]
        if isinstance(packed_BO, Tensor):
            import torch

            return torch.stack(parts, -1)
        return np.stack(parts, -1)


def parse_view(view: Any, bits: int, group_size: int, grid: tuple[int, int]) -> TokenView:
    """The view that the user named; "groups" alone means those of the tokenizer.  Raises SpecError."""
    name: Any = view
    widths: tuple[int, ...] = ()
    if not isinstance(view, str) and isinstance(view, Sequence) and len(view) == 2 and view[0] == "groups":
        # What is no list of numbers is refused below, as it stands.
        with contextlib.suppress(TypeError, ValueError):
            widths = tuple(int(width) for width in view[1])
            name = "groups"
    elif view == "groups":
        widths = (group_size,) * (bits // group_size)
    if name not in get_args(ViewName):
        raise SpecError(
            f"view={view!r}: choose from 'index', 'bits', 'packed' and ('groups', (9, 9))."
            f"{nearest_name(str(view), get_args(ViewName))}"
        )
    if name == "index" and bits > MAX_INDEX_BITS:
        raise SpecError(f"view='index': tokens of {bits} bits do not fit int64. Use 'bits', 'packed' or groups.")
    if name == "groups" and (sum(widths) != bits or not all(1 <= width <= MAX_INDEX_BITS for width in widths)):
        raise SpecError(f"view=('groups', {widths}): these make {sum(widths)} bits; the tokens have {bits}.")
    return TokenView(name, bits, grid, widths)
