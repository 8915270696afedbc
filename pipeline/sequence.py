"""Rows of tokens as sequences of ids for a language model: codes, special ids, text and label in one vocabulary.

Shape letters: B rows, T frames, H W the grid (rows and columns of tokens in a frame), G groups, N ids."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import rfc8785

from schemas.errors import SpecError, nearest_name

Part = Literal["label", "text", "image"]
Learnt = Literal["label", "text", "special", "codes"]
Size = Literal["frames", "height", "width"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What a language model reads."""

    ids: Ids
    """int64 [N]."""
    loss_mask: npt.NDArray[np.bool_]
    """bool [N]: whether predicting `ids[n]` counts; never for the first, which nothing comes before."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class SequenceFormat:
    """How a row becomes a sequence: `bos`, then label, text and image in `order`, then `eos`.

    The image is `boi`, the ids of `size_header`, the codes frame by frame and row by row, with `eol` after every row
    and `eof` after every frame, then `eoi`.  What is None or empty is left out.  Codes are the indices of the tokens,
    moved to their place in the vocabulary by `id_offset` or `id_map`."""

    id_offset: int | tuple[int, ...] = 0
    """Id of code 0; with groups one for each, or one for all."""
    id_map: tuple[int, ...] = ()
    """Instead of an offset: the id of every code, for codes that are scattered over a vocabulary."""
    group_bits: tuple[int, ...] = ()
    """Bits of the groups that a token is cut into, highest first, such as (9, 9): an id for each.  Empty: one id."""
    bos: int | None = None
    eos: int | None = None
    boi: int | None = None
    eoi: int | None = None
    eol: int | None = None
    eof: int | None = None
    size_header: tuple[int | Size, ...] = ()
    """Ids between `boi` and the codes; "frames", "height" and "width" stand for the ids of that number of tokens."""
    numbers: int | Mapping[int, Sequence[int]] | None = field(default=None, hash=False)
    """Ids of the numbers in the header: an offset (one id for each number), or the ids of every number in use."""
    label_offset: int | None = None
    """Id of label 0.  None: labels are no part of the sequence."""
    null_label: int | None = None
    """Id that stands for a label that is dropped or missing."""
    null_text: tuple[int, ...] = ()
    """Ids that stand for a text that is dropped."""
    drop: float = 0.0
    """Share of rows whose label and text are dropped, for classifier-free guidance."""
    order: tuple[Part, ...] = ("label", "text", "image")
    loss: tuple[Learnt, ...] = ("codes", "special")
    """Which ids count in the loss; `boi`, `size_header`, `eol`, `eof`, `eoi` and `eos` are special.  `bos` never."""
    pad: int = 0
    """Id that fills up what is too short; it never counts in the loss."""

    _layouts: dict[tuple[int, int, int], _Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises SpecError where the settings contradict each other."""
        for name in ("id_map", "group_bits", "size_header", "null_text", "order", "loss"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(each if isinstance(each, str) else int(each) for each in values))
        if not isinstance(self.id_offset, int):
            object.__setattr__(self, "id_offset", tuple(map(int, self.id_offset)))
        if isinstance(self.numbers, Mapping):
            numbers = {int(number): tuple(map(int, ids)) for number, ids in sorted(self.numbers.items())}
            object.__setattr__(self, "numbers", numbers)
        _require_names("order", self.order, get_args(Part))
        _require_names("loss", self.loss, get_args(Learnt))
        _require_names("size_header", [each for each in self.size_header if isinstance(each, str)], get_args(Size))
        if "image" not in self.order or len(set(self.order)) != len(self.order):
            raise SpecError(f"order={self.order}: name 'image' once, and 'label' and 'text' at most once.")
        if self.id_map and (self.group_bits or self.id_offset != 0):
            raise SpecError("id_map takes the place of id_offset and knows no groups; give one of them.")
        if isinstance(self.id_offset, tuple) and len(self.id_offset) != max(1, len(self.group_bits)):
            raise SpecError(
                f"id_offset has {len(self.id_offset)} numbers for {max(1, len(self.group_bits))} ids of a token."
            )
        if self.numbers is None and any(isinstance(each, str) for each in self.size_header):
            raise SpecError("size_header names sizes; give their ids as numbers=, such as {16: (24, 30)}.")
        if not 0 <= self.drop <= 1:
            raise SpecError(f"drop is {self.drop}; it is a share from 0 to 1.")
        if self.drop and self.label_offset is not None and self.null_label is None:
            raise SpecError("labels are dropped, but null_label does not say what stands in their place.")

    def sequence(
        self, indices: Ids, *, text: Sequence[int] = (), label: int | None = None, dropped: bool = False
    ) -> TokenSequence:
        """The sequence of one row, indices int64 [T, H, W]."""
        return self.sequences(indices[np.newaxis], texts=[text], labels=[label], dropped=np.array([dropped]))[0]

    def sequences(
        self,
        indices_BTHW: Ids,
        *,
        texts: Sequence[Sequence[int]] | None = None,
        labels: Sequence[int | None] | None = None,
        dropped: npt.NDArray[np.bool_] | None = None,
    ) -> list[TokenSequence]:
        """The sequences of rows with equally many frames; `dropped` [B] says whose label and text are left out.

        Those of equal length share memory.  Raises SpecError: a text without a place in `order`, a label that is
        missing, a size without an id."""
        num_rows = len(indices_BTHW)
        texts = [()] * num_rows if texts is None else texts
        labels = [None] * num_rows if labels is None else labels
        if dropped is not None:
            texts = [self.null_text if drop else text for text, drop in zip(texts, dropped, strict=True)]
            labels = [None if drop else label for label, drop in zip(labels, dropped, strict=True)]
        label_BN = self._label_ids(labels)
        lengths_B = np.array([len(text) for text in texts], np.int64)
        if lengths_B.any() and "text" not in self.order:
            raise SpecError("a row has text, but order has no place for it; add 'text'.")
        sequences: dict[int, TokenSequence] = {}
        for length in np.unique(lengths_B).tolist():
            rows = np.flatnonzero(lengths_B == length).tolist()
            indices = indices_BTHW if len(rows) == num_rows else indices_BTHW[rows]
            text_BN = np.array([texts[row] for row in rows], np.int64).reshape(len(rows), length)
            ids_BN, mask_N = self._join(label_BN[rows], text_BN, indices)
            sequences |= {row: TokenSequence(ids, mask_N) for row, ids in zip(rows, ids_BN, strict=True)}
        return [sequences[row] for row in range(num_rows)]

    def length(self, frames: int, grid: tuple[int, int], text_length: int = 0) -> int:
        """Ids of the sequence of a row of `frames` frames with a text of `text_length` ids."""
        around = sum(each is not None for each in (self.bos, self.eos))
        return around + self._num_labels + text_length + self._layout((frames, *grid)).size

    def dropped(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which rows lose label and text, given 64 evenly distributed bits for each."""
        return np.asarray((hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.drop)

    def check(self, bits: int) -> None:
        """Raise SpecError unless the format fits tokens of `bits` bits and no special id is also that of a code."""
        if self.group_bits and sum(self.group_bits) != bits:
            raise SpecError(f"group_bits {self.group_bits} make {sum(self.group_bits)} bits; the tokens have {bits}.")
        if self.id_map and len(self.id_map) != 1 << bits:
            raise SpecError(f"id_map has {len(self.id_map):,} ids; tokens of {bits} bits have {1 << bits:,} codes.")
        codes = set(self.id_map)
        for name, number in self._special_ids():
            if number in codes or any(number in span for span in self._code_spans(bits)):
                raise SpecError(f"{name}: {number} is also the id of a code; move the codes with id_offset.")

    def num_ids(self, bits: int, *, num_labels: int = 0) -> int:
        """The size of a vocabulary that holds codes, special ids and labels; text may need more."""
        ends = [span.stop for span in self._code_spans(bits)] + [number + 1 for _, number in self._special_ids()]
        ends += [number + 1 for number in (*self.id_map, *self.null_text, self.pad)]
        if self.label_offset is not None:
            ends.append(self.label_offset + num_labels)
        return max(ends)

    def to_json_dict(self) -> dict[str, Any]:
        """The settings that are not at their default; of `id_map` the SHA-256."""
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.startswith("_") or value == each.default:
                continue
            if each.name == "id_map":
                value = hashlib.sha256(np.array(value, "<i8").tobytes()).hexdigest()
            elif isinstance(value, Mapping):
                value = {str(number): list(ids) for number, ids in value.items()}
            values[each.name] = list(value) if isinstance(value, tuple) else value
        return values

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the settings: equal for formats that make equal sequences of equal rows."""
        return hashlib.sha256(rfc8785.dumps(self.to_json_dict())).hexdigest()

    @property
    def _num_groups(self) -> int:
        return max(1, len(self.group_bits))

    @property
    def _num_labels(self) -> int:
        return int(self.label_offset is not None and "label" in self.order)

    def _special_ids(self) -> Iterator[tuple[str, int]]:
        """Ids that stand for one thing, with the names of their settings."""
        for name in ("bos", "eos", "boi", "eoi", "eol", "eof", "null_label"):
            number = getattr(self, name)
            if number is not None:
                yield name, number
        yield from (("size_header", part) for part in self.size_header if isinstance(part, int))
        if isinstance(self.numbers, Mapping):
            yield from (("numbers", number) for ids in self.numbers.values() for number in ids)

    def _code_spans(self, bits: int) -> list[range]:
        if self.id_map:
            return []
        widths = self.group_bits or (bits,)
        offsets = self.id_offset if isinstance(self.id_offset, tuple) else (self.id_offset,) * len(widths)
        return [range(first, first + (1 << width)) for first, width in zip(offsets, widths, strict=True)]

    def _label_ids(self, labels: Sequence[int | None]) -> Ids:
        if not self._num_labels:
            return np.empty((len(labels), 0), np.int64)
        if self.null_label is None and None in labels:
            raise SpecError("a row has no label, and null_label does not say what stands in its place.")
        offset = self.label_offset
        assert offset is not None
        ids = [self.null_label if label is None else offset + label for label in labels]
        return np.array(ids, np.int64).reshape(len(ids), 1)

    def _write_codes(self, indices_BTHW: Ids, out_BTHWG: Ids) -> None:
        offsets = self.id_offset if isinstance(self.id_offset, tuple) else (self.id_offset,) * self._num_groups
        if self.id_map:
            out_BTHWG[..., 0] = self._id_table[indices_BTHW]
        elif not self.group_bits:
            np.add(indices_BTHW, offsets[0], out=out_BTHWG[..., 0], dtype=np.int64)
        # A group at a time, for loops over a last axis of two or three are slow.
        low = sum(self.group_bits)
        for group, width in enumerate(self.group_bits):
            low -= width
            codes_BTHW = out_BTHWG[..., group]
            np.bitwise_and(indices_BTHW >> low, (1 << width) - 1, out=codes_BTHW)
            codes_BTHW += offsets[group]

    @functools.cached_property
    def _id_table(self) -> Ids:
        return np.array(self.id_map, np.int64)

    def _write_images(self, indices_BTHW: Ids, out_BN: Ids) -> None:
        num_rows, frames, height, width = indices_BTHW.shape
        layout = self._layout((frames, height, width))
        out_BN[:] = layout.template
        # The codes go where the template has holes: the axes of a slice can be split without a copy.
        body = out_BN[:, layout.head : layout.head + frames * layout.frame]
        lines = body.reshape(num_rows, frames, layout.frame)[..., : height * layout.line]
        holes = lines.reshape(num_rows, frames, height, layout.line)[..., : width * self._num_groups]
        self._write_codes(indices_BTHW, holes.reshape(*indices_BTHW.shape, self._num_groups))

    def _layout(self, size: tuple[int, int, int]) -> _Layout:
        layout = self._layouts.get(size)
        if layout is None:
            layout = self._layouts[size] = self._make_layout(size)
        return layout

    def _make_layout(self, size: tuple[int, int, int]) -> _Layout:
        frames, height, width = size
        hole = [_HOLE] * (width * self._num_groups)
        line = hole + _present(self.eol)
        frame = line * height + _present(self.eof)
        head = _present(self.boi) + [each for part in self.size_header for each in self._header_ids(part, size)]
        template = np.array(head + frame * frames + _present(self.eoi), np.int64)
        return _Layout(template, len(template), len(head), len(frame), len(line))

    def _header_ids(self, part: int | Size, size: tuple[int, int, int]) -> Sequence[int]:
        if isinstance(part, int):
            return (part,)
        number = dict(zip(get_args(Size), size, strict=True))[part]
        if isinstance(self.numbers, int):
            return (self.numbers + number,)
        assert self.numbers is not None
        if number not in self.numbers:
            raise SpecError(f"size_header: numbers has no ids for {number}, the {part} of a row.")
        return self.numbers[number]

    def _join(self, label_BN: Ids, text_BN: Ids, indices_BTHW: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Sequences of equal length: ids [B, N] and their loss mask [N]."""
        num_rows, *size = indices_BTHW.shape
        layout = self._layout((size[0], size[1], size[2]))
        sizes = {"label": label_BN.shape[1], "text": text_BN.shape[1], "image": layout.size}
        bos, eos = _present(self.bos), _present(self.eos)
        num_ids = len(bos) + sum(sizes[part] for part in self.order) + len(eos)
        ids_BN, mask_N = np.empty((num_rows, num_ids), np.int64), np.empty(num_ids, np.bool_)
        ids_BN[:, : len(bos)] = bos
        ids_BN[:, num_ids - len(eos) :] = eos
        mask_N[num_ids - len(eos) :] = "special" in self.loss
        place = len(bos)
        for part in self.order:
            block = slice(place, place + sizes[part])
            place = block.stop
            if part == "image":
                self._write_images(indices_BTHW, ids_BN[:, block])
                mask_N[block] = np.where(layout.template == _HOLE, "codes" in self.loss, "special" in self.loss)
            else:
                ids_BN[:, block] = label_BN if part == "label" else text_BN
                mask_N[block] = part in self.loss
        mask_N[:1] = False
        return ids_BN, mask_N


_HOLE = -1
"""Where a template waits for a code."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The image part for one size, as ids with holes for the codes, and the lengths of its pieces."""

    template: Ids
    size: int
    head: int
    frame: int
    line: int


def _present(number: int | None) -> list[int]:
    return [] if number is None else [number]


def _require_names(setting: str, names: Sequence[Any], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise SpecError(
                f"{setting}: there is no {name!r}.{nearest_name(str(name), known)} Known: {', '.join(known)}."
            )
