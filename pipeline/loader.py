"""Streams batches for training: exact, resumable at any step, the same for any number of ranks and workers.

The samples of all epochs form one endless stream, whose order is a function of seed and manifest.  The loader cuts it
into global batches; rank r of R takes the samples r, r + R, r + 2R, ... of each.  So where a loader is takes two
integers (and, with packing, three for each lane), equal on all ranks.

Shape letters: B rows of this rank, T frames, H W the grid, L bits, G groups, O bytes, N ids."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.background import run_ahead
from pipeline.dataset import TokenDataset
from pipeline.loader_state import STATE_VERSION, Position, read_position, shorten
from pipeline.mixture import Mixture
from pipeline.order import ORDER_VERSION, drop_hashes
from pipeline.packing import Pack, max_cursor_bytes, read_cursors
from pipeline.ranks import find_rank
from pipeline.row_blocks import Buffers, Outputs, RowBlock, column_values
from pipeline.sample_stream import DatasetStream, MixtureStream, SampleStream, StreamOptions
from pipeline.sequence import SequenceFormat
from pipeline.sequence_batches import PackedStream, Tokenize, first_state, sequence_batch, sequence_columns
from pipeline.token_views import parse_view
from pipeline.worker_passes import WorkerPasses
from schemas.errors import BsqError, SpecError, nearest_name

Tail = Literal["drop", "pad", "carry"]
Batch = dict[str, Any]

DEFAULT_WINDOW = 32_768

Numbers = npt.NDArray[np.int64]


class TokenLoader(IterableDataset[Batch]):
    """Batches of a dataset or a mixture, in shuffled order.

    Iterating goes on from where the loader is: after a `break`, after `load_state_dict`, and with the next epoch when
    one has ended.  A batch is a dictionary of tensors:

    - tokens under the name of the dataset's view: `index` int64 [B, T, H, W], `bits` bool [B, T, H, W, L], `groups`
      int64 [B, T, H, W, G] or `packed` uint8 [B, O];
    - with a format instead: `ids` int64 [B, N] and `loss_mask` bool [B, N], and `lengths` int64 [B] or, packed,
      `position_ids` int64 [B, N], `cu_seqlens` int32 and `max_seqlen` (see `pipeline.packing.collate`);
    - `sample` int64 [B], numbers for `dataset[...]`, and for a mixture `source` int64 [B] (neither when packed);
    - where frames vary, `frames` int64 [B] and `mask` bool [B, T]; T is the most of the dataset, or of the mixture;
    - with tail="pad", `valid` bool [B]: False for samples that only fill the last batch;
    - `dropped` bool [B] where labels or texts are dropped;
    - the dataset's columns: integers int64, a missing label `null_label`; texts as lists;
    - `state`: what `load_state_dict` takes to go on behind this batch."""

    def __init__(
        self,
        source: TokenDataset | Mixture[TokenDataset],
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        window: int = DEFAULT_WINDOW,
        format: SequenceFormat | None = None,
        pack: Pack | None = None,
        tail: Tail | None = None,
        repeat: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
        *,
        tokenize: Tokenize | None = None,
        label_drop: float = 0.0,
        null_label: int = -1,
    ) -> None:
        """`global_batch_size`: samples (or packs) of one step on all ranks together; where ranks do not divide it,
        their shares differ by one.

        window: rows that are shuffled among each other, rounded up to whole row groups, and at most about 128 MiB of
            tokens; memory holds up to three windows.
        format, pack, tokenize: make sequences of ids (`tokenize` turns a caption into ids), and pack them.
        tail: what becomes of the samples that fill no whole batch at the end of an epoch.  "drop": left out;
            "pad": in a last batch, filled up and marked by `valid`; "carry": first of the next epoch's.  With packing
            only the last.
        repeat: go on with the next epoch without end.
        rank, world_size: those of torch.distributed unless told, or of the environment that torchrun sets.
        prefetch: batches that a thread prepares ahead; 0 for no thread.
        pin_memory: put batches into page-locked memory, where there is a GPU and no worker: in a DataLoader that is
            its own pin_memory.
        label_drop, null_label: share of samples whose label becomes `null_label` and whose caption becomes None.

        Raises SpecError."""
        self._mixture = source if isinstance(source, Mixture) else None
        self.datasets = (source,) if isinstance(source, TokenDataset) else source.datasets
        self.rank, self.world_size = find_rank(rank, world_size)
        if tail is None:
            tail = "drop" if pack is None else "carry"
        if tail not in get_args(Tail):
            raise SpecError(
                f"tail={tail!r}: choose from {', '.join(get_args(Tail))}.{nearest_name(str(tail), get_args(Tail))}"
            )
        if global_batch_size < self.world_size:
            raise SpecError(
                f"global_batch_size is {global_batch_size}; give at least one for each of {self.world_size} ranks."
            )
        for name, value, least in (("window", window, 1), ("prefetch", prefetch, 0)):
            if value < least:
                raise SpecError(f"{name} is {value}; it must be at least {least}.")
        if not 0 <= label_drop <= 1:
            raise SpecError(f"label_drop is {label_drop}; it is a share from 0 to 1.")
        if pack is not None and format is None:
            raise SpecError("pack needs a format: what is packed are sequences of ids.")
        if pack is not None and tail != "carry":
            raise SpecError(f"tail={tail!r}: packs run from one epoch into the next, which is tail='carry'.")
        if format is not None and label_drop:
            raise SpecError(
                "label_drop is for batches without a format; a format has its own, SequenceFormat(drop=...)."
            )
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._shuffle, self._window_rows = shuffle, window
        self._format, self._pack, self._tokenize = format, pack, tokenize
        self._tail: Tail = tail
        self._repeat, self._prefetch, self._pin_memory = repeat, prefetch, pin_memory
        self._label_drop, self._null_label = label_drop, null_label
        self._columns = self._check_columns()
        self._max_frames = max(dataset.info.max_frames for dataset in self.datasets)
        self._ragged = min(dataset.info.min_frames for dataset in self.datasets) != self._max_frames
        self._view = self._check_views()
        self._epoch_samples = len(self.datasets[0]) if self._mixture is None else self._mixture.num_samples
        if self._epoch_samples is not None:
            if not self._epoch_samples:
                raise SpecError("the dataset has no samples. Check its filters.")
            if tail == "drop" and self._epoch_samples < global_batch_size:
                raise SpecError(
                    f"an epoch has {self._epoch_samples:,} samples, fewer than global_batch_size="
                    f"{global_batch_size:,}, so nothing is left. Choose tail='pad' or 'carry'."
                )
        self._settings = self._make_settings()
        self._position = self._beginning_of(0)
        self._passes = WorkerPasses(self._position)
        self._skip: int | None = None
        self._iteration = 0
        self._buffers = Buffers()
        # Those that wait, the one that is made, the one that is used, and the one before it.
        self._outputs = Outputs(prefetch + 3)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, for `load_state_dict`: under 1 kB of JSON, the same on every rank.

        Batches that were prepared but not delivered do not count.  Raises BsqError in a process whose workers iterate
        the loader: it cannot see how far they are, take `batch["state"]`."""
        if get_worker_info() is None:
            if self._passes.were_begun():
                raise BsqError(
                    "this loader is iterated by the workers of a DataLoader, and only they know how far it is. Save "
                    "batch['state'] of the last batch, or use torchdata's StatefulDataLoader."
                )
            return self._state_after(self._position)
        self._enter_pass()
        state = self._state_after(self._position)
        return state if self._skip is None else state | {"skip": self._skip}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind what had been delivered when `state` was taken, on any number of ranks and workers.

        Raises SpecError naming what differs: another dataset, seed, batch size, format."""
        position = read_position(state, self._settings)
        if (position.lanes is not None) != (self._pack is not None):
            raise SpecError("the state is damaged: its packing is missing. Load that of another checkpoint.")
        if self._pack is not None and position.lanes is not None:
            cursors = read_cursors(position.lanes)
            if len(cursors) != self._pack.lanes:
                raise SpecError(f"the state is damaged: it has {len(cursors)} lanes. Load that of another checkpoint.")
        self._position = position
        self._iteration += 1
        if get_worker_info() is None:
            self._passes.set_position(position)
        else:
            self._skip = state.get("skip")
            self._passes.load_in_worker(position)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the middle of that very epoch, stay.

        A plain DataLoader with workers begins the next epoch each time that it is iterated, so there this is only
        needed to begin elsewhere."""
        if epoch < 0:
            raise SpecError(f"epoch is {epoch}; epochs are numbered from 0.")
        if get_worker_info() is None and (epoch != self._position.epoch or self._passes.were_begun()):
            self._position = self._beginning_of(epoch)
            self._iteration += 1
            self._passes.set_position(self._position)

    @property
    def epoch(self) -> int:
        """The epoch that the loader is in."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """Batches of this epoch that were delivered."""
        return self._position.step

    def __len__(self) -> int:
        """Batches of the current epoch, the same on every rank.  Raises TypeError where that is not known."""
        steps = self._steps_in(self._position.epoch)
        if steps is None or self._repeat:
            raise TypeError("a loader that repeats, packs, or mixes without end has no length")
        return steps

    # Iterating

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        if get_worker_info() is not None:
            self._passes.next_pass()
        return self._deliver(self._iteration)

    def _deliver(self, iteration: int) -> Generator[Batch, None, None]:
        worker = get_worker_info()
        stride = 1 if worker is None else worker.num_workers
        if worker is not None:
            self._enter_pass()
        batches = self._batches(self._position, self._skip or 0, stride)
        if self._prefetch:
            batches = run_ahead(batches, self._prefetch)
        try:
            for batch, position in batches:
                if self._iteration != iteration:
                    raise BsqError("the loader was iterated again, or moved, while this iteration went on. Use one.")
                if batch is None:
                    self._end_pass(position)
                    return
                self._position = position
                self._skip = None if worker is None else stride - 1
                yield self._pinned(batch)
        finally:
            batches.close()

    def _end_pass(self, following: Position) -> None:
        """The epoch is over, and the next one begins at `following`."""
        if get_worker_info() is None:
            self._position = following
        else:
            # A worker stays where it is: a state that is taken now must not begin an epoch that its siblings end.
            self._passes.end(following)

    def _enter_pass(self) -> None:
        """In a worker: find out which epoch this pass over the DataLoader is."""
        worker = get_worker_info()
        assert worker is not None
        entered = self._passes.enter(self._position, self._beginning_of)
        if entered is not None:
            self._position = entered
            self._skip = worker.id

    def _batches(
        self, position: Position, skip: int, stride: int
    ) -> Generator[tuple[Batch | None, Position], None, None]:
        """Batches from `position` on and where each leaves the loader: after `skip` of them every `stride`-th.

        At the end of an epoch that is not repeated: None, and where the next one begins."""
        stream = self._open_stream()
        packs: PackedStream | None = None
        if self._pack is not None and self._format is not None and position.lanes is not None:
            packs = PackedStream(
                stream, self._format, self._pack, self._tokenize, self._view, self.seed, position.lanes
            )
        try:
            while True:
                if self._is_over(position, packs):
                    position = Position(position.epoch + 1, 0, position.lanes)
                    if not self._repeat:
                        yield None, position
                        return
                    continue
                after = Position(position.epoch, position.step + 1)
                if packs is not None:
                    wanted = range(self.rank, self.global_batch_size, self.world_size) if not skip else range(0)
                    batch = packs.next_batch(self.global_batch_size, wanted)
                    after = Position(after.epoch, after.step, packs.state_dict())
                elif not skip:
                    batch = self._build(stream, position)
                position = after
                if skip:
                    skip -= 1
                    continue
                batch["state"] = self._state_after(position)
                yield batch, position
                skip = stride - 1
        finally:
            stream.close()

    def _build(self, stream: SampleStream, position: Position) -> Batch:
        """This rank's share of the batch at `position`."""
        start = self._first_of(position.epoch) + position.step * self.global_batch_size
        positions = np.arange(start + self.rank, start + self.global_batch_size, self.world_size)
        valid = np.ones(len(positions), np.bool_)
        if self._tail == "pad" and self._epoch_samples is not None:
            last = (position.epoch + 1) * self._epoch_samples - 1
            valid = positions <= last
            positions = np.minimum(positions, last)
        stream.forget_before(start if self._tail != "pad" else min(start, int(positions[0])))
        block, sources = stream.read(positions)
        batch: Batch = {}
        dropped = None
        if self._format is not None:
            dropped = self._format.dropped(drop_hashes(self.seed, positions)) if self._format.drop else None
            batch = sequence_batch(block, self._format, self._tokenize, self._view, dropped)
        else:
            batch[self._view.name] = self._view.decode(self._widened(block), self._max_frames, self._outputs)
            if self._label_drop:
                shares = (drop_hashes(self.seed, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53
                dropped = shares < self._label_drop
        batch["sample"] = block.samples_B
        if self._mixture is not None:
            batch["source"] = sources
        if self._ragged:
            batch["frames"] = block.frames_B
            batch["mask"] = np.arange(self._max_frames) < block.frames_B[:, np.newaxis]
        if self._tail == "pad":
            batch["valid"] = valid
        for name in self._columns:
            batch[name] = column_values(block.columns[name], null=self._null_label if name == "label" else -1)
        if dropped is not None:
            batch["dropped"] = dropped
            if self._label_drop:
                _drop(batch, dropped, self._null_label)
        return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}

    def _widened(self, block: RowBlock) -> npt.NDArray[np.uint8]:
        row_bytes = self._view.row_bytes(self._max_frames)
        missing = row_bytes - block.packed_BO.shape[1]
        return np.pad(block.packed_BO, ((0, 0), (0, missing))) if missing else block.packed_BO

    def _open_stream(self) -> SampleStream:
        columns = list(self._columns)
        if self._format is not None:
            columns += [name for name in sequence_columns(self._format, self._tokenize) if name not in columns]
        options = StreamOptions(
            shuffle=self._shuffle,
            window_rows=self._window_rows,
            columns=tuple(columns),
            read_ahead=self._prefetch > 0,
            endless=self._repeat or self._tail == "carry",
            buffers=self._buffers,
        )
        if self._mixture is not None:
            return MixtureStream(self._mixture, self.seed, options)
        return DatasetStream(self.datasets[0], self.seed, options)

    def _pinned(self, batch: Batch) -> Batch:
        # A worker may have been forked, and then CUDA cannot be used; what it sends is copied once more anyway.
        if not self._pin_memory or get_worker_info() is not None or not torch.cuda.is_available():
            return batch
        return {name: v.pin_memory() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}

    # Arithmetic of epochs

    def _steps_in(self, epoch: int) -> int | None:
        if self._epoch_samples is None or self._pack is not None:
            return None
        samples, batch = self._epoch_samples, self.global_batch_size
        if self._tail == "carry":
            return (epoch + 1) * samples // batch - epoch * samples // batch
        return samples // batch if self._tail == "drop" else -(-samples // batch)

    def _first_of(self, epoch: int) -> int:
        """Position of the first sample in an epoch's first batch."""
        if self._epoch_samples is None:
            return 0
        first = epoch * self._epoch_samples
        return first - first % self.global_batch_size if self._tail == "carry" else first

    def _is_over(self, position: Position, packs: PackedStream | None) -> bool:
        if packs is not None:
            end = self._epoch_samples
            return end is not None and packs.hindmost >= (position.epoch + 1) * end
        steps = self._steps_in(position.epoch)
        return steps is not None and position.step >= steps

    def _beginning_of(self, epoch: int) -> Position:
        if self._pack is None:
            return Position(epoch, 0)
        return Position(epoch, 0, first_state(epoch * (self._epoch_samples or 0), self._pack.lanes))

    # What must stay the same

    def _make_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self._shuffle,
            "window": self._window_rows,
            "tail": self._tail,
        }
        if self._mixture is None:
            settings["dataset"] = self.datasets[0].identity
        else:
            weights = self._mixture.weights
            settings["stop"] = self._mixture.stop
            settings["sources"] = {
                name: {"weight": weight} | dataset.identity
                for name, weight, dataset in zip(self._mixture.names, weights, self.datasets, strict=True)
            }
        if self._format is not None:
            settings["format"] = self._format.fingerprint[:12]
        if self._pack is not None:
            settings["pack"] = self._pack.to_json_dict()
        if self._label_drop:
            settings["label_drop"] = self._label_drop
        return dict(shorten(settings, max_cursor_bytes(self._pack.lanes) if self._pack is not None else 0))

    def _state_after(self, position: Position) -> dict[str, Any]:
        return {"version": STATE_VERSION, **self._settings, **position.to_json_dict()}

    def _check_columns(self) -> tuple[str, ...]:
        columns = self.datasets[0].columns
        for dataset in self.datasets[1:]:
            if set(dataset.columns) != set(columns):
                raise SpecError(
                    f"the datasets of a mixture must be opened with the same columns, not "
                    f"{', '.join(columns) or 'none'} and {', '.join(dataset.columns) or 'none'}."
                )
        if self._label_drop and not {"label", "caption"} & set(columns):
            raise SpecError(
                "label_drop: open the dataset with columns=['label'] or ['caption'], or there is none to drop."
            )
        if self._format is not None:
            for dataset in self.datasets:
                for name in sequence_columns(self._format, self._tokenize):
                    if name not in dataset.info.carried:
                        raise SpecError(
                            f"the format needs the column {name!r}, which {dataset.info.url} does not carry."
                        )
        return columns

    def _check_views(self) -> Any:
        view = self.datasets[0].view
        for dataset in self.datasets[1:]:
            if dataset.view != view:
                raise SpecError("the datasets of a mixture must be opened with the same view, and have the same grid.")
        if self._format is not None:
            info = self.datasets[0].info
            self._format.check(info.bits)
            return parse_view("index", info.bits, info.group_size, info.grid)
        return view


def _drop(batch: Batch, dropped: npt.NDArray[np.bool_], null_label: int) -> None:
    if "label" in batch:
        batch["label"][dropped] = null_label
    if "caption" in batch:
        batch["caption"] = [None if drop else text for text, drop in zip(batch["caption"], dropped, strict=True)]
