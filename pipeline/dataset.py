"""A finished dataset as samples: by number, in batches, or found by key.

Samples are numbered from 0 in the order of the manifest.  Nothing is listed, and no token file is opened before one of
its rows is asked for.

Shape letters: B rows, T frames, H W the grid, L bits, G groups, O bytes."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.file_cache import FileCache
from pipeline.order import WindowPlan, latin_views, plan_windows, row_order, unit_costs, unit_order
from pipeline.row_blocks import Buffers, FixedRows, Outputs, RaggedRows, RowBlock, Window, column_values
from pipeline.row_filters import RowFilter, parse_filters, select_rows
from pipeline.storage import open_storage
from pipeline.token_files import Check, TokenFile, TokenFiles
from pipeline.token_index import DatasetInfo, read_file_column, read_token_index, sums_before
from pipeline.token_pages import PREFIX_BYTES, Octets
from pipeline.token_views import View, parse_view
from schemas.errors import SpecError, nearest_name
from schemas.tokenfile import token_schema

Views = Literal["latin", "all"] | int

WINDOW_BYTES = 128 << 20
"""Packed bytes at which a window ends, if it has not reached its rows before."""
DEFAULT_CACHE_BYTES = 64 << 30
_KEPT_UNITS = 16
_REQUESTS = 16
_NO_ROWS = np.zeros(0, np.int64)

Numbers = npt.NDArray[np.int64]
Kept = TypeVar("Kept")


class TokenDataset:
    """The samples of a dataset, map style: `len(ds)`, `ds[i]`, `ds.__getitems__([...])`, `ds.find(key)`.

    A sample is a clip in one of its views; an image is a clip of one frame.  `ds[i]` is a dictionary with the tokens
    under the name of the view (index, bits, groups or packed), without the batch axis, and with the `columns`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Sequence[str] | None = None,
        view: View = "index",
        views: Views = "latin",
        filters: Sequence[Sequence[Any]] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        expect_fingerprint: str | None = None,
        allow_partial: bool = False,
        generation: int | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        check: Check = "size",
    ) -> None:
        """`path`: folder or URL of the dataset, `generation` the newest finished one unless told.

        columns: further columns of each sample, such as key, caption, label.
        view: what tokens look like, see `pipeline.token_views`.
        views: "latin": every clip once an epoch, in another view each time, so that all are shown once in as many
            epochs as there are views; "all": every view is a sample; a number: that view alone.
        filters: conditions that must all hold, see `pipeline.row_filters`.
        cache_dir, cache_bytes: where copies of remote files and results of filters are kept, and how much of the
            former.  Local files are read in place.
        expect_fingerprint: 8 to 64 digits of the fingerprint that the dataset must have.
        allow_partial: also take a dataset that lacks shards or is not finished.
        check: "sha256" reads every file whole when it is opened and compares its checksum; else its size is.

        Raises SpecError for an option that cannot be, FingerprintDiffers, and BsqError for a dataset that is missing,
        incomplete or damaged."""
        url = os.fspath(path)
        storage = open_storage(url, storage_options)
        self._index = read_token_index(
            storage, generation=generation, allow_partial=allow_partial, expect_fingerprint=expect_fingerprint
        )
        info = self._index.info
        self.view = parse_view(view, info.bits, info.group_size, info.grid)
        self.columns = _checked_columns(columns or (), info)
        self.views = _checked_views(views, info.views)
        if check not in ("size", "sha256"):
            raise SpecError(f"check={check!r}: choose 'size' or 'sha256'.")
        cache = FileCache(os.fspath(cache_dir), cache_bytes) if cache_dir is not None and not storage.is_local else None
        self._files = TokenFiles(url, self._index, dict(storage_options or {}), check=check, cache=cache)
        self.filter: RowFilter | None = None
        self._stride = 1 if self.views == "all" else info.views
        """Rows that belong to one place of the dataset: the views of a clip, or one row."""
        self._selected: Numbers | None = None
        self._unit_samples: npt.NDArray[Any] = self._index.unit_rows
        if self._stride > 1:
            self._unit_samples = self._unit_samples // self._stride
        self._first_place = self._first_sample = sums_before(self._unit_samples)
        if filters:
            self.filter = parse_filters(filters, info.carried)
            passes = select_rows(
                self.filter, self._index, self._files, None if cache_dir is None else os.fspath(cache_dir)
            )
            # Views of one clip differ only in what nobody filters by; where they do not, all of them must pass.
            self._selected = np.flatnonzero(passes.reshape(-1, self._stride).all(1))
            self._first_sample = np.searchsorted(self._selected, self._first_place)
            self._unit_samples = np.diff(self._first_sample)
        self._epoch = 0
        self._reset()

    def _reset(self) -> None:
        self._units: OrderedDict[int, FixedRows | RaggedRows] = OrderedDict()
        self._tables: OrderedDict[int, dict[str, pa.Array]] = OrderedDict()
        self._lock = threading.Lock()
        self._outputs = Outputs(4)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_units", "_tables", "_lock", "_outputs")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def info(self) -> DatasetInfo:
        """What the dataset is."""
        return self._index.info

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which samples there are, short: the state of a loader must agree in it."""
        info = self.info
        return {
            "fingerprint": info.fingerprint[:12],
            "manifest": info.manifest_sha256[:12],
            "views": self.views,
            "filters": self.filter.sha256[:12] if self.filter else None,
        }

    def set_epoch(self, epoch: int) -> None:
        """With views="latin", choose which view `ds[i]` shows; a `TokenLoader` does so by itself."""
        self._epoch = epoch

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """One sample: tokens [T, H, W, ...] and columns.  Raises IndexError, and BsqError for a damaged file."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples, which is far quicker than one at a time."""
        block = self.read_block(samples, self._epoch)
        if not block.columns:
            return [{self.view.name: row} for row in self._tokens_by_frames(block)]
        columns = {name: column_values(values) for name, values in block.columns.items()}
        columns = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in columns.items()}
        tokens = self._tokens_by_frames(block)
        return [
            {self.view.name: row, **{name: values[number] for name, values in columns.items()}}
            for number, row in enumerate(tokens)
        ]

    def unpack(self, packed_BO: torch.Tensor, view: View = "index") -> torch.Tensor:
        """Tokens of a batch of packed rows, on the device that it is on: what `view` would have given.

        All rows as they are padded: with as many frames as the longest row of the dataset, or of the mixture."""
        info = self.info
        shown = parse_view(view, info.bits, info.group_size, info.grid)
        frames = info.max_frames
        if packed_BO.shape[1] != shown.row_bytes(frames):
            frames = 8 * packed_BO.shape[1] // (info.grid[0] * info.grid[1] * info.bits)
        return shown.decode(packed_BO, frames)

    def find(self, key: str) -> list[int]:
        """The samples with that key, ascending: every clip (and, with views="all", every view) of every shard.

        Empty where there is none, or where the filters leave none.  Raises BsqError."""
        first, last = self._key_ranges()
        candidates = pc.and_(pc.less_equal(first, key), pc.greater_equal(last, key))
        found: list[int] = []
        for number in pc.indices_nonzero(pc.fill_null(candidates, False)).to_pylist():
            units = range(int(self._index.first_unit[number]), int(self._index.first_unit[number + 1]))
            for unit in units:
                local = unit - units.start
                statistics = self._files[number].statistics(local, "key")
                if statistics is not None and statistics.has_min_max and not statistics.min <= key <= statistics.max:
                    continue
                keys = self._files[number].read_columns(local, ["key"])["key"]
                rows = pc.indices_nonzero(pc.equal(keys, key)).to_numpy().astype(np.int64)
                found += (self._first_place[unit] + np.unique(rows // self._stride)).tolist()
        if self._selected is None:
            return found
        places = np.searchsorted(self._selected, found)
        inside = places < len(self._selected)
        inside[inside] &= self._selected[places[inside]] == np.array(found, np.int64)[inside]
        return [int(place) for place in places[inside]]

    # What a loader uses

    @property
    def has_one_size(self) -> bool:
        """Whether every row has equally many frames."""
        return self.info.min_frames == self.info.max_frames

    def plan_epoch(self, seed: int, epoch: int, *, shuffle: bool, window_rows: int) -> WindowPlan:
        """The windows of an epoch: a pure function of the arguments and the manifest."""
        index = self._index
        units = unit_order(seed, epoch, index.num_units) if shuffle else np.arange(index.num_units)
        row_bytes = np.repeat(index.row_bytes.astype(np.int32), np.diff(index.first_unit))
        return plan_windows(
            units, self._unit_samples, unit_costs(index.unit_rows, row_bytes, window_rows, WINDOW_BYTES)
        )

    def read_window(
        self,
        plan: WindowPlan,
        number: int,
        seed: int,
        epoch: int,
        *,
        shuffle: bool,
        columns: Sequence[str],
        buffers: Buffers,
    ) -> Window:
        """Read a window of the plan of that epoch, with columns; remote units are requested side by side.

        Raises BsqError when a file is missing or damaged."""
        units = plan.units[plan.first_unit[number] : plan.first_unit[number + 1]]
        samples = np.concatenate([np.arange(self._first_sample[u], self._first_sample[u + 1]) for u in units])
        first_row = sums_before(self._index.unit_rows[units])
        in_unit = self._rows_in_unit(samples, np.repeat(units, self._unit_samples[units]), epoch)
        rows = in_unit + np.repeat(first_row[:-1], self._unit_samples[units])
        if shuffle:
            order = row_order(seed, epoch, samples)
            samples, rows = samples[order], rows[order]
        buffer = None
        if self.has_one_size:
            buffer = buffers.take(int(first_row[-1]) * (self.view.row_bytes(self.info.max_frames) + PREFIX_BYTES))
        content, values = self._read_units(units, first_row, columns, buffer)
        return Window(int(plan.first_sample[number]), samples, rows, content, values, buffer)

    def read_block(
        self, samples: Sequence[int] | Numbers, epoch: int, columns: Sequence[str] | None = None
    ) -> RowBlock:
        """Any samples, in the order given.  Raises IndexError, and BsqError for a damaged file."""
        samples_B = np.asarray(samples, np.int64).reshape(-1)
        num_samples = len(self)
        outside = (samples_B < -num_samples) | (samples_B >= num_samples)
        if outside.any():
            raise IndexError(f"there is no sample {samples_B[outside][0]}; the dataset has {num_samples:,}")
        samples_B = np.where(samples_B < 0, samples_B + num_samples, samples_B)
        units_B = np.searchsorted(self._first_sample, samples_B, side="right") - 1
        rows_B = self._rows_in_unit(samples_B, units_B, epoch)
        packed_BO, frames_B = self._pick(units_B, rows_B)
        return RowBlock(packed_BO, frames_B, samples_B, self._pick_columns(units_B, rows_B, self.columns))

    # Inside

    def _rows_in_unit(self, samples_N: Numbers, units_N: Numbers, epoch: int) -> Numbers:
        places_N = samples_N if self._selected is None else self._selected[samples_N]
        rows_N = (places_N - self._first_place[units_N]) * self._stride
        if self.views == "latin" and self._stride > 1:
            rows_N += latin_views(epoch, places_N, self._stride)
        elif isinstance(self.views, int):
            rows_N += self.views
        return np.asarray(rows_N, np.int64)

    def _read_units(
        self, units: Numbers, first_row: Numbers, columns: Sequence[str], buffer: Octets | None = None
    ) -> tuple[FixedRows | RaggedRows, dict[str, pa.Array]]:
        """The rows of several units, one after the other, and their columns."""
        files = [self._index.file_of(int(unit)) for unit in units]
        local = [int(unit - self._index.first_unit[file]) for unit, file in zip(units, files, strict=True)]
        fixed_RS = np.empty((0, 0), np.uint8)
        if self.has_one_size:
            stride = self.view.row_bytes(self.info.max_frames) + PREFIX_BYTES
            shape = (int(first_row[-1]), stride)
            fixed_RS = np.empty(shape, np.uint8) if buffer is None else buffer.reshape(shape)

        def read(place: int) -> tuple[RaggedRows | None, dict[str, pa.Array]]:
            file, unit = self._files[files[place]], local[place]
            values = _table_columns(file, unit, columns)
            if self.has_one_size:
                file.read_fixed(unit, fixed_RS[first_row[place] : first_row[place + 1]])
                return None, values
            return self._read_ragged(file, unit), values

        if self._files.is_local or len(units) == 1:
            parts = [read(place) for place in range(len(units))]
        else:
            with ThreadPoolExecutor(min(_REQUESTS, len(units))) as pool:
                parts = list(pool.map(read, range(len(units))))
        joined = {name: pa.concat_arrays([values[name] for _, values in parts]) for name in columns}
        if self.has_one_size:
            return FixedRows(fixed_RS, self.info.max_frames), joined
        ragged = [rows for rows, _ in parts if rows is not None]
        return _join_ragged(ragged), joined

    def _read_ragged(self, file: TokenFile, unit: int) -> RaggedRows:
        frames_R = file.read_columns(unit, ["frames"])["frames"].to_numpy().astype(np.int64)
        info = self.info
        if len(frames_R) and not info.min_frames <= frames_R.min() <= frames_R.max() <= info.max_frames:
            raise file.damaged("its rows have other numbers of frames than recorded")
        size_R = (frames_R * (info.grid[0] * info.grid[1] * info.bits) + 7) // 8
        chunk, start_R = file.read_ragged(unit, size_R)
        return RaggedRows(
            [chunk], np.zeros(len(size_R), np.int64), start_R, size_R, frames_R, self.view.row_bytes(info.max_frames)
        )

    def _pick(self, units_B: Numbers, rows_B: Numbers) -> tuple[Octets, Numbers]:
        """Rows of any units: read one by one where that is possible, else out of units that are kept for a while."""
        max_frames = self.info.max_frames
        row_bytes = self.view.row_bytes(max_frames)
        stride = row_bytes + PREFIX_BYTES
        frames_B = np.full(len(units_B), max_frames, np.int64)
        packed_BS = np.zeros((len(units_B), stride), np.uint8)
        order = np.argsort(units_B, kind="stable")
        rows = rows_B[order]
        flat = packed_BS.reshape(-1).data
        buffers = [flat[place * stride : (place + 1) * stride] for place in order.tolist()]
        starts = np.flatnonzero(np.diff(units_B[order], prepend=-1))
        groups = zip(units_B[order[starts]].tolist(), itertools.pairwise([*starts.tolist(), len(order)]), strict=True)
        for unit, (start, stop) in groups:
            if self.has_one_size:
                file, local = self._locate(unit)
                if file.read_rows(local, rows[start:stop], buffers[start:stop]):
                    continue
            places = order[start:stop]
            packed_BS[places, PREFIX_BYTES:], frames_B[places] = self._unit(unit).pick(rows[start:stop])
            packed_BS[places, :PREFIX_BYTES] = np.frombuffer(row_bytes.to_bytes(PREFIX_BYTES, "little"), np.uint8)
        wrong = np.flatnonzero(packed_BS[:, :PREFIX_BYTES].copy().view("<u4")[:, 0] != row_bytes)
        for place in wrong.tolist():
            # A row that does not begin as recorded: reading its unit tells what is wrong.
            packed_BS[place, PREFIX_BYTES:] = self._unit(int(units_B[place])).pick(rows_B[place : place + 1])[0][0]
        return np.ascontiguousarray(packed_BS[:, PREFIX_BYTES:]), frames_B

    def _pick_columns(self, units_B: Numbers, rows_B: Numbers, columns: Sequence[str]) -> dict[str, pa.Array]:
        if not columns:
            return {}
        units = np.unique(units_B)
        tables = [self._table(int(unit)) for unit in units]
        first = sums_before(self._index.unit_rows[units])[np.searchsorted(units, units_B)]
        if not tables:
            schema = token_schema(self.info.carried)
            return {name: pa.array([], schema.field(name).type) for name in columns}
        return {
            name: pa.concat_arrays([table[name] for table in tables]).take(pa.array(first + rows_B)) for name in columns
        }

    def _locate(self, unit: int) -> tuple[TokenFile, int]:
        file = self._index.file_of(unit)
        return self._files[file], unit - int(self._index.first_unit[file])

    def _unit(self, unit: int) -> FixedRows | RaggedRows:
        rows = self._kept(self._units, unit)
        if rows is None:
            bounds = np.array([0, self._index.unit_rows[unit]])
            rows, _ = self._read_units(np.array([unit]), bounds, ())
            self._keep(self._units, unit, rows)
        return rows

    def _table(self, unit: int) -> dict[str, pa.Array]:
        values = self._kept(self._tables, unit)
        if values is None:
            file, local = self._locate(unit)
            values = _table_columns(file, local, self.columns)
            self._keep(self._tables, unit, values)
        return values

    def _kept(self, units: OrderedDict[int, Kept], unit: int) -> Kept | None:
        with self._lock:
            if unit in units:
                units.move_to_end(unit)
            return units.get(unit)

    def _keep(self, units: OrderedDict[int, Kept], unit: int, content: Kept) -> None:
        with self._lock:
            units[unit] = content
            while len(units) > _KEPT_UNITS:
                units.popitem(last=False)

    def _tokens_by_frames(self, block: RowBlock) -> list[torch.Tensor]:
        """The tokens of each row without padding."""
        if self.has_one_size:
            shown = self.view.decode(block.packed_BO, self.info.max_frames, self._outputs)
            return list(torch.from_numpy(shown).unbind())
        tokens: list[torch.Tensor] = [torch.empty(0)] * len(block.frames_B)
        for frames in np.unique(block.frames_B).tolist():
            rows = np.flatnonzero(block.frames_B == frames)
            packed = np.ascontiguousarray(block.packed_BO[rows, : self.view.row_bytes(frames)])
            for row, each in zip(rows.tolist(), torch.from_numpy(self.view.decode(packed, frames)), strict=True):
                tokens[row] = each
        return tokens

    def _key_ranges(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        storage = self._files.storage
        return read_file_column(storage, self._index, "min_key"), read_file_column(storage, self._index, "max_key")


def _table_columns(file: TokenFile, unit: int, columns: Iterable[str]) -> dict[str, pa.Array]:
    names = list(columns)
    if not names:
        return {}
    table = file.read_columns(unit, names)
    missing = set(names) - set(table.schema.names)
    if missing:
        raise file.damaged(f"it has no column {min(missing)!r}")
    return {name: _one_array(table[name]) for name in names}


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    # Wide offsets: the texts of a window may pass 2 GiB.
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _join_ragged(parts: Sequence[RaggedRows]) -> RaggedRows:
    return RaggedRows(
        [part.chunks[0] for part in parts],
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        np.concatenate([_NO_ROWS, *(part.start_R for part in parts)]),
        np.concatenate([_NO_ROWS, *(part.size_R for part in parts)]),
        np.concatenate([_NO_ROWS, *(part.frames_R for part in parts)]),
        parts[0].max_bytes,
    )


def _checked_columns(columns: Sequence[str], info: DatasetInfo) -> tuple[str, ...]:
    known = [name for name in token_schema(info.carried).names if name != "tokens"]
    if isinstance(columns, str):
        raise SpecError(f"columns={columns!r}: give a list, such as [{columns!r}].")
    for name in columns:
        if name not in known:
            raise SpecError(
                f"columns: the dataset has no {name!r}.{nearest_name(str(name), known)} It has {', '.join(known)}."
            )
    return tuple(dict.fromkeys(columns))


def _checked_views(views: Views, num_views: int) -> Views:
    if views in ("latin", "all"):
        return views
    if isinstance(views, int) and not isinstance(views, bool) and 0 <= views < num_views:
        return views
    raise SpecError(f"views={views!r}: choose 'latin', 'all', or the number of a view from 0 to {num_views - 1}.")
