"""Rows of a dataset in memory: the row groups of a window, and the rows that are picked out of them.

Shape letters: R rows of a window, B rows picked, S bytes of a stored row with its prefix, O bytes of its tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.token_pages import PREFIX_BYTES, Octets

Numbers = npt.NDArray[np.int64]


@dataclass(slots=True)
class RowBlock:
    """Rows that were picked, in order."""

    packed_BO: Octets
    """Tokens, contiguous; rows with fewer frames than the most end in zeros."""
    frames_B: Numbers
    samples_B: Numbers
    """Numbers of the samples in their dataset."""
    columns: dict[str, pa.Array] = field(default_factory=dict)


@dataclass(slots=True)
class FixedRows:
    """Rows of one size, at one stride."""

    rows_RS: Octets
    frames: int

    def __len__(self) -> int:
        return len(self.rows_RS)

    def pick(self, rows_B: Numbers) -> tuple[Octets, Numbers]:
        """Tokens uint8 [B, O] and frames of rows by number."""
        stride = self.rows_RS.shape[1]
        row_bytes = stride - PREFIX_BYTES
        # One item a row, so that NumPy copies rows and not bytes.
        items_R = np.ndarray((len(self.rows_RS),), f"V{row_bytes}", self.rows_RS, PREFIX_BYTES, (stride,))
        packed_BO = items_R[rows_B].view(np.uint8).reshape(len(rows_B), row_bytes)
        return packed_BO, np.full(len(rows_B), self.frames, np.int64)


@dataclass(slots=True)
class RaggedRows:
    """Rows of several sizes, each in one of several runs of bytes."""

    chunks: list[Octets]
    chunk_R: Numbers
    start_R: Numbers
    size_R: Numbers
    frames_R: Numbers
    max_bytes: int
    """Bytes of a row of the most frames."""

    def __len__(self) -> int:
        return len(self.start_R)

    def pick(self, rows_B: Numbers) -> tuple[Octets, Numbers]:
        """Tokens uint8 [B, O], padded with zeros, and frames of rows by number."""
        packed_BO = np.zeros((len(rows_B), self.max_bytes), np.uint8)
        places = zip(
            self.chunk_R[rows_B].tolist(), self.start_R[rows_B].tolist(), self.size_R[rows_B].tolist(), strict=True
        )
        for row, (chunk, start, size) in enumerate(places):
            packed_BO[row, :size] = self.chunks[chunk][start : start + size]
        return packed_BO, self.frames_R[rows_B]


class Buffers:
    """Memory of windows that are done with, for those that come: fresh pages cost more than reading."""

    def __init__(self) -> None:
        self._free: list[Octets] = []

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        # Another process needs memory of its own.
        return Buffers, ()

    def take(self, num_bytes: int) -> Octets:
        """Uninitialised bytes."""
        while self._free:
            buffer = self._free.pop()
            if len(buffer) >= num_bytes:
                return buffer[:num_bytes]
        # Windows differ in size by a row group or so.
        return np.empty(num_bytes + num_bytes // 16, np.uint8)[:num_bytes]

    def give(self, buffer: Octets) -> None:
        """Take back what `take` gave; nobody may hold a view of it."""
        self._free.append(buffer if buffer.base is None else buffer.base)


class Outputs:
    """Memory for batches, used again once nobody holds the batch: a fresh page costs more than filling it."""

    def __init__(self, most: int) -> None:
        """At most `most` arrays are kept."""
        self._arrays: list[Octets] = []
        self._most = most

    def __reduce__(self) -> tuple[type[Outputs], tuple[int]]:
        return Outputs, (self._most,)

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        """An uninitialised array that nobody else uses."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        for number in range(len(self._arrays)):
            # Tensors and views of an array hold it, so its references tell whether any is left.
            if len(self._arrays[number]) == num_bytes and _references(self._arrays, number) == _UNUSED:
                return self._arrays[number].view(dtype).reshape(shape)
        array = np.empty(num_bytes, np.uint8)
        if _MAY_COUNT:
            self._arrays = [array, *self._arrays[: self._most - 1]]
        return array.view(dtype).reshape(shape)


def _references(arrays: list[Octets], number: int) -> int:
    return sys.getrefcount(arrays[number])


_UNUSED = _references([np.empty(0, np.uint8)], 0)
"""References to an array that only a list holds, as this interpreter counts them."""
_MAY_COUNT = getattr(sys, "_is_gil_enabled", lambda: True)() and sys.implementation.name == "cpython"


@dataclass(slots=True)
class Window:
    """Row groups that were read together, and the order in which their samples come."""

    first: int
    """Number of the window's first sample within the epoch."""
    samples_N: Numbers
    """Samples in their order."""
    rows_N: Numbers
    """The row of each of them."""
    rows: FixedRows | RaggedRows
    columns: dict[str, pa.Array]
    """Of all rows."""
    buffer: Octets | None = None
    """The memory that holds `rows`, if it came from `Buffers`."""

    @property
    def stop(self) -> int:
        """Number of the sample after the last, within the epoch."""
        return self.first + len(self.samples_N)

    def pick(self, places_B: Numbers) -> RowBlock:
        """The samples at places of the epoch, all of them in this window."""
        local_B = places_B - self.first
        rows_B = self.rows_N[local_B]
        packed_BO, frames_B = self.rows.pick(rows_B)
        columns = {name: values.take(pa.array(rows_B)) for name, values in self.columns.items()}
        return RowBlock(packed_BO, frames_B, self.samples_N[local_B], columns)


def join_blocks(blocks: Sequence[RowBlock]) -> RowBlock:
    """Blocks one after the other; those of datasets with fewer frames are padded with zeros."""
    if len(blocks) == 1:
        return blocks[0]
    widest = max(block.packed_BO.shape[1] for block in blocks)
    packed_BO = np.zeros((sum(len(block.frames_B) for block in blocks), widest), np.uint8)
    row = 0
    for block in blocks:
        packed_BO[row : row + len(block.packed_BO), : block.packed_BO.shape[1]] = block.packed_BO
        row += len(block.packed_BO)
    return RowBlock(
        packed_BO,
        np.concatenate([block.frames_B for block in blocks]),
        np.concatenate([block.samples_B for block in blocks]),
        {name: pa.concat_arrays([block.columns[name] for block in blocks]) for name in blocks[0].columns},
    )


def take_block(block: RowBlock, order_B: Numbers) -> RowBlock:
    """The rows of a block in another order."""
    return RowBlock(
        block.packed_BO[order_B],
        block.frames_B[order_B],
        block.samples_B[order_B],
        {name: values.take(pa.array(order_B)) for name, values in block.columns.items()},
    )


def column_values(values: pa.Array, *, null: int = -1) -> Any:
    """A column of a batch: a NumPy array where every value is a number, else a list.

    Integers become int64, a missing one `null`; float64 keeps NaN for a missing one; boxes become int64 [B, 4]."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return np.asarray(values.to_numpy(zero_copy_only=False), np.bool_)
    if pa.types.is_integer(kind):
        filled = pc.fill_null(values.cast(pa.int64()), null)
        return np.array(filled.to_numpy(zero_copy_only=False), np.int64)
    if pa.types.is_floating(kind):
        return np.array(values.to_numpy(zero_copy_only=False), np.float64)
    if pa.types.is_list(kind) and pa.types.is_integer(kind.value_type):
        return np.array(values.to_pylist(), np.int64).reshape(len(values), -1)
    return values.to_pylist()
