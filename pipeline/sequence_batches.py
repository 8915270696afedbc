"""Batches of sequences of ids: one for each row, or packed.

With packing every rank follows all lanes, by the lengths of their sequences alone, and makes ids only for its own
packs.  So all ranks know when an epoch ends, and their states are equal, without a word between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.order import drop_hashes
from pipeline.packing import Cursor, Pack, Piece, collate, read_cursors, write_cursors
from pipeline.row_blocks import RowBlock
from pipeline.sample_stream import SampleStream
from pipeline.sequence import SequenceFormat, TokenSequence
from pipeline.token_views import TokenView

Tokenize = Callable[[str], Sequence[int]]
"""Turns a caption into ids of the language model's vocabulary."""

_READ_POSITIONS = 256

Numbers = npt.NDArray[np.int64]


def sequence_columns(sequence_format: SequenceFormat, tokenize: Tokenize | None) -> list[str]:
    """The columns that sequences are made from."""
    columns = ["caption"] if tokenize is not None and "text" in sequence_format.order else []
    if sequence_format.label_offset is not None and "label" in sequence_format.order:
        columns.append("label")
    return columns


def make_sequences(
    block: RowBlock,
    sequence_format: SequenceFormat,
    view: TokenView,
    texts: Sequence[Sequence[int]],
    labels: Sequence[int | None],
    dropped_B: npt.NDArray[np.bool_] | None,
) -> list[TokenSequence]:
    """The sequence of each row of a block."""
    sequences: dict[int, TokenSequence] = {}
    for frames in np.unique(block.frames_B).tolist():
        rows = np.flatnonzero(block.frames_B == frames).tolist()
        packed_BO = np.ascontiguousarray(block.packed_BO[rows, : view.row_bytes(frames)])
        made = sequence_format.sequences(
            view.decode(packed_BO, frames),
            texts=[texts[row] for row in rows],
            labels=[labels[row] for row in rows],
            dropped=None if dropped_B is None else dropped_B[rows],
        )
        sequences.update(zip(rows, made, strict=True))
    return [sequences[row] for row in range(len(block.frames_B))]


def sequence_batch(
    block: RowBlock,
    sequence_format: SequenceFormat,
    tokenize: Tokenize | None,
    view: TokenView,
    dropped_B: npt.NDArray[np.bool_] | None,
) -> dict[str, Any]:
    """Sequences of a block as arrays: ids int64 [B, N] padded to the longest, loss_mask bool [B, N], lengths [B]."""
    texts, labels = _texts(block, sequence_format, tokenize), _labels(block, sequence_format)
    sequences = make_sequences(block, sequence_format, view, texts, labels, dropped_B)
    lengths_B = np.array([len(sequence) for sequence in sequences], np.int64)
    ids_BN = np.full((len(sequences), int(lengths_B.max())), sequence_format.pad, np.int64)
    mask_BN = np.zeros(ids_BN.shape, np.bool_)
    for row, sequence in enumerate(sequences):
        ids_BN[row, : len(sequence)] = sequence.ids
        mask_BN[row, : len(sequence)] = sequence.loss_mask
    return {"ids": ids_BN, "loss_mask": mask_BN, "lengths": lengths_B}


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of a sample whose turn has not come."""

    length: int
    text: Sequence[int]
    label: int | None
    dropped: bool


class PackedStream:
    """Packs made of a stream of samples.  Sample `position` is number `position // lanes` of lane `position % lanes`,
    and the lanes give a pack each in turn."""

    def __init__(
        self,
        stream: SampleStream,
        sequence_format: SequenceFormat,
        pack: Pack,
        tokenize: Tokenize | None,
        view: TokenView,
        seed: int,
        state: Mapping[str, Any],
    ) -> None:
        """`state` is what `state_dict` gave, or `first_state`.  Raises SpecError when it is damaged."""
        self._stream = stream
        self._format = sequence_format
        self._pack = pack
        self._tokenize = tokenize
        self._view = view
        self._seed = seed
        self._cursors = read_cursors(dict(state))
        self._turn = int(state.get("turn", 0)) % pack.lanes
        self._records: dict[int, _Record] = {}
        self._following = self.hindmost

    @property
    def hindmost(self) -> int:
        """The first position that is not wholly packed."""
        return min(cursor.oldest * self._pack.lanes + lane for lane, cursor in enumerate(self._cursors))

    def state_dict(self) -> dict[str, Any]:
        """How far each lane is, small."""
        return write_cursors(self._cursors) | {"turn": self._turn}

    def next_batch(self, num_packs: int, wanted: range) -> dict[str, Any]:
        """Advance by `num_packs` packs; the batch holds those whose numbers are `wanted`."""
        chosen: list[tuple[int, tuple[Piece, ...]]] = []
        for number in range(num_packs):
            lane, self._turn = self._turn, (self._turn + 1) % self._pack.lanes
            pieces, self._cursors[lane] = self._pack.next_pieces(self._cursors[lane], self._lengths(lane))
            if number in wanted:
                chosen.append((lane, pieces))
        batch = self._assemble(chosen) if chosen else {}
        hindmost = self.hindmost
        for position in [position for position in self._records if position < hindmost]:
            del self._records[position]
        self._stream.forget_before(hindmost)
        return batch

    def _lengths(self, lane: int) -> Callable[[int], int]:
        return lambda sequence: self._record(self._position(lane, sequence)).length

    def _position(self, lane: int, sequence: int) -> int:
        return sequence * self._pack.lanes + lane

    def _record(self, position: int) -> _Record:
        while position >= self._following:
            positions = np.arange(self._following, self._following + _READ_POSITIONS)
            block, _ = self._stream.read(positions)
            texts, labels = _texts(block, self._format, self._tokenize), _labels(block, self._format)
            dropped = self._format.dropped(drop_hashes(self._seed, positions)).tolist()
            for row, each in enumerate(positions.tolist()):
                text_length = len(self._format.null_text if dropped[row] else texts[row])
                length = self._format.length(int(block.frames_B[row]), self._view.grid, text_length)
                self._records[each] = _Record(length, texts[row], labels[row], dropped[row])
            self._following += _READ_POSITIONS
        return self._records[position]

    def _assemble(self, chosen: Sequence[tuple[int, tuple[Piece, ...]]]) -> dict[str, Any]:
        positions = sorted({self._position(lane, piece.sequence) for lane, pieces in chosen for piece in pieces})
        block, _ = self._stream.read(np.array(positions, np.int64))
        records = [self._records[position] for position in positions]
        sequences = make_sequences(
            block,
            self._format,
            self._view,
            [record.text for record in records],
            [record.label for record in records],
            np.array([record.dropped for record in records], np.bool_),
        )
        at = dict(zip(positions, sequences, strict=True))
        packs = []
        for lane, pieces in chosen:
            of_lane = {piece.sequence: at[self._position(lane, piece.sequence)] for piece in pieces}
            packs.append(self._pack.assemble(pieces, of_lane.__getitem__))
        return {name: torch.from_numpy(np.asarray(values)) for name, values in collate(packs).items()}


def first_state(first: int, lanes: int) -> dict[str, Any]:
    """The state of a `PackedStream` that begins at position `first`."""
    return write_cursors([Cursor(oldest=-((lane - first) // lanes)) for lane in range(lanes)]) | {"turn": 0}


def _texts(block: RowBlock, sequence_format: SequenceFormat, tokenize: Tokenize | None) -> list[Sequence[int]]:
    if tokenize is None or "caption" not in sequence_columns(sequence_format, tokenize):
        return [()] * len(block.frames_B)
    captions = block.columns["caption"].to_pylist()
    return [() if caption is None else tuple(map(int, tokenize(caption))) for caption in captions]


def _labels(block: RowBlock, sequence_format: SequenceFormat) -> list[int | None]:
    if "label" not in sequence_columns(sequence_format, None):
        return [None] * len(block.frames_B)
    labels: list[int | None] = block.columns["label"].to_pylist()
    return labels
