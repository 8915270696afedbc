"""Packs sequences of different lengths into rows of one length, lane by lane.

A lane is a stream of sequences of its own, numbered from 0.  It is packed first-fit with a short look ahead: a pack
begins with the oldest sequence that waits and takes of the next few those that still fit.  So what a lane has packed is
told by three small integers (`Cursor`), nothing waits in a buffer when a pack is complete, and going on means reading
the stream again from `Cursor.oldest`."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.sequence import Ids, TokenSequence
from schemas.errors import SpecError

MAX_LANES = 64
MAX_LOOK_AHEAD = 14
"""Two bytes of the state for each lane."""


class Cursor(NamedTuple):
    """What of a lane is packed: all sequences before `oldest`, and some after it."""

    oldest: int = 0
    """Number of the first sequence that is not wholly packed."""
    taken: int = 0
    """Bit i: sequence `oldest + 1 + i` is packed already."""
    offset: int = 0
    """Ids of sequence `oldest` that are packed already; above 0 only while a long one is split."""


BEGINNING = Cursor()


class Piece(NamedTuple):
    """Ids `first` to `last - 1` of a sequence of the lane; all of them unless a long one is split."""

    sequence: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Packed:
    """One pack.  Its unused end is a segment like the others, so that every id belongs to one."""

    ids: Ids
    """int64 [seq_len]."""
    loss_mask: npt.NDArray[np.bool_]
    """bool [seq_len]: whether predicting an id counts; never for the first of a segment, nor for padding."""
    position_ids: Ids
    """int64 [seq_len], from 0 in each segment."""
    cu_seqlens: npt.NDArray[np.int32]
    """int32 [segments + 1], from 0 to seq_len: where segments begin, as FlashAttention's variable-length calls want."""
    pieces: tuple[Piece, ...]
    """What it holds, in order; padding is not among them."""

    @property
    def num_used(self) -> int:
        """Ids that are not padding."""
        return sum(piece.last - piece.first for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """How sequences are packed into rows of `seq_len` ids."""

    seq_len: int
    lanes: int = 16
    """Streams that are packed apart.  The order of packs depends on it, so keep it when the number of ranks changes;
    ranks that divide it need no sequences but those of their own lanes."""
    split: bool = False
    """Cut sequences longer than `seq_len` into pieces of that length and a rest.  Otherwise they are refused."""
    look_ahead: int = MAX_LOOK_AHEAD
    """How many sequences after the oldest may be packed before it is their turn: more of them leave fewer gaps."""
    pad: int = 0
    """Id that fills the end of a pack."""

    def __post_init__(self) -> None:
        """Raises SpecError."""
        limits = {"seq_len": (1, 1 << 31), "lanes": (1, MAX_LANES), "look_ahead": (0, MAX_LOOK_AHEAD)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be from {least} to {most:,}.")

    def next_pieces(self, cursor: Cursor, length_of: Callable[[int], int | None]) -> tuple[tuple[Piece, ...], Cursor]:
        """What the next pack of a lane holds, and the cursor behind it; nothing at the end of the stream.

        `length_of(number)` is the length of a sequence of the lane, None past the last; it is asked for numbers from
        `cursor.oldest` on, none further than `look_ahead` behind the oldest one that is left.  Raises SpecError: a
        sequence is longer than `seq_len` and must not be split."""
        oldest, taken, offset = cursor
        room = self.seq_len
        pieces: list[Piece] = []
        # Each turn of the loop packs the oldest sequence, or ends the pack.
        while room and (length := length_of(oldest)) is not None:
            left = length - offset
            if left > self.seq_len and not self.split:
                raise SpecError(
                    f"a sequence has {length:,} ids, more than seq_len={self.seq_len:,}. Raise seq_len, leave such "
                    f"rows out with a filter, or allow them to be cut with split=True."
                )
            if left > room:
                if not pieces:
                    pieces.append(Piece(oldest, offset, offset + room))
                    offset, room = offset + room, 0
                break
            if left:
                pieces.append(Piece(oldest, offset, length))
            room -= left
            oldest, offset = oldest + 1, 0
            while taken & 1:
                oldest, taken = oldest + 1, taken >> 1
            taken >>= 1
        # `oldest` no longer fits: what of those behind it does?
        for ahead in range(self.look_ahead if pieces else 0):
            if not room or (length := length_of(oldest + 1 + ahead)) is None:
                break
            if not taken >> ahead & 1 and length <= room:
                if length:
                    pieces.append(Piece(oldest + 1 + ahead, 0, length))
                taken |= 1 << ahead
                room -= length
        return tuple(pieces), Cursor(oldest, taken, offset)

    def assemble(self, pieces: Sequence[Piece], sequence_of: Callable[[int], TokenSequence]) -> Packed:
        """The pack that holds `pieces`."""
        ids = np.full(self.seq_len, self.pad, np.int64)
        loss_mask = np.zeros(self.seq_len, np.bool_)
        position_ids = np.empty(self.seq_len, np.int64)
        bounds = np.cumsum([0, *(piece.last - piece.first for piece in pieces)])
        if bounds[-1] < self.seq_len:
            bounds = np.append(bounds, self.seq_len)
        for piece, start in zip(pieces, bounds, strict=False):
            stop = start + piece.last - piece.first
            sequence = sequence_of(piece.sequence)
            ids[start:stop] = sequence.ids[piece.first : piece.last]
            loss_mask[start:stop] = sequence.loss_mask[piece.first : piece.last]
            loss_mask[start] = False
        for start, stop in itertools.pairwise(bounds):
            position_ids[start:stop] = np.arange(stop - start)
        return Packed(ids, loss_mask, position_ids, bounds.astype(np.int32), tuple(pieces))

    def packs(self, sequences: Iterable[TokenSequence], cursor: Cursor = BEGINNING) -> Iterator[tuple[Packed, Cursor]]:
        """Pack the stream of one lane; with each pack comes the cursor from which to go on behind it.

        `sequences` begins with number `cursor.oldest`; at most `look_ahead` + 1 more than a pack holds are read and
        kept.  Raises SpecError as `next_pieces` does."""
        remaining = iter(sequences)
        waiting: dict[int, TokenSequence] = {}
        following = cursor.oldest

        def length_of(number: int) -> int | None:
            nonlocal following
            while following <= number:
                sequence = next(remaining, None)
                if sequence is None:
                    return None
                waiting[following] = sequence
                following += 1
            return len(waiting[number])

        while True:
            pieces, cursor = self.next_pieces(cursor, length_of)
            if not pieces:
                return
            yield self.assemble(pieces, waiting.__getitem__), cursor
            for number in [number for number in waiting if number < cursor.oldest]:
                del waiting[number]

    def to_json_dict(self) -> dict[str, Any]:
        """What decides how a lane is packed."""
        return {name: getattr(self, name) for name in ("seq_len", "lanes", "split", "look_ahead", "pad")}


def collate(packs: Sequence[Packed]) -> dict[str, npt.NDArray[Any]]:
    """Packs as one batch: `ids`, `loss_mask`, `position_ids` [B, seq_len], and the segments of all of them in a row.

    `cu_seqlens` int32 [segments + 1] runs from 0 to B * seq_len; `max_seqlen` (int32, no axes) is the longest one.
    `used` int64 [B] counts the ids that are not padding."""
    starts = [pack.cu_seqlens[:-1] + number * len(pack.ids) for number, pack in enumerate(packs)]
    total = sum(len(pack.ids) for pack in packs)
    cu_seqlens = np.concatenate([*starts, [total]]).astype(np.int32)
    return {
        "ids": np.stack([pack.ids for pack in packs]),
        "loss_mask": np.stack([pack.loss_mask for pack in packs]),
        "position_ids": np.stack([pack.position_ids for pack in packs]),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": np.diff(cu_seqlens).max(),
        "used": np.array([pack.num_used for pack in packs], np.int64),
    }


def write_cursors(cursors: Sequence[Cursor]) -> dict[str, Any]:
    """The cursors of all lanes for JSON, under `max_cursor_bytes`.

    Base64 of the number of lanes' differences from the hindmost, masks and offsets as variable-length integers (seven
    bits a byte, lowest first)."""
    base = min(cursor.oldest for cursor in cursors)
    octets = bytearray()
    for cursor in cursors:
        for number in (cursor.oldest - base, cursor.taken, cursor.offset):
            while number > 127:
                octets.append(number & 127 | 128)
                number >>= 7
            octets.append(number)
    return {"oldest": base, "lanes": base64.b64encode(octets).decode("ascii")}


def max_cursor_bytes(lanes: int) -> int:
    """What the cursors of so many lanes take in JSON while these are less than 2^21 sequences apart."""
    return 4 * -(-7 * lanes // 3) + 70


def read_cursors(state: dict[str, Any]) -> list[Cursor]:
    """The cursors that `write_cursors` wrote.  Raises SpecError when they are damaged."""
    try:
        base, octets = int(state["oldest"]), base64.b64decode(state["lanes"], validate=True)
        numbers, number, shift = [], 0, 0
        for octet in octets:
            number |= (octet & 127) << shift
            shift += 7
            if octet < 128:
                numbers.append(number)
                number, shift = 0, 0
        if shift or len(numbers) % 3:
            raise ValueError("it ends early")
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"the packing state is damaged ({error}); load the state of another checkpoint.") from error
    return [
        Cursor(base + ahead, taken, offset)
        for ahead, taken, offset in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    ]
