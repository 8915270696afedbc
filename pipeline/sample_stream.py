"""The endless stream of samples that a loader cuts into batches: epoch after epoch of a dataset, or of a mixture.

A position is the number of a sample since the beginning of epoch 0.  What lies at a position is a function of seed and
manifest; this only decides which windows are in memory, and reads the next one ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset import TokenDataset
from pipeline.mixture import Mixture
from pipeline.order import WindowPlan, stream_key
from pipeline.row_blocks import Buffers, RowBlock, Window, join_blocks, take_block

Numbers = npt.NDArray[np.int64]


class SampleStream(Protocol):
    """Samples by position."""

    @property
    def epoch_samples(self) -> int | None:
        """Samples of one epoch; None where it never ends."""

    def read(self, positions_B: Numbers) -> tuple[RowBlock, Numbers]:
        """The samples at ascending positions, at least one, and of each the number of its source.  Raises BsqError."""

    def forget_before(self, position: int) -> None:
        """Nothing before `position` will be asked for again."""

    def close(self) -> None:
        """Stop reading ahead, and let go of the memory."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a stream is read."""

    shuffle: bool
    window_rows: int
    columns: tuple[str, ...]
    read_ahead: bool
    """Read the next window in a thread."""
    endless: bool
    """The next epoch follows at once, so its first window is read ahead too."""
    buffers: Buffers


class DatasetStream:
    """The samples of one dataset."""

    def __init__(self, dataset: TokenDataset, seed: int, options: StreamOptions) -> None:
        self._dataset = dataset
        self._seed = seed
        self._options = options
        self._plans: dict[int, WindowPlan] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._pool = ThreadPoolExecutor(1, "token-windows") if options.read_ahead else None

    @property
    def epoch_samples(self) -> int:
        return len(self._dataset)

    def read(self, positions_B: Numbers) -> tuple[RowBlock, Numbers]:
        blocks = []
        start = 0
        while start < len(positions_B):
            epoch, place = divmod(int(positions_B[start]), len(self._dataset))
            window = self._window(epoch, self._plan(epoch).window_at(place))
            first = epoch * len(self._dataset)
            stop = int(np.searchsorted(positions_B, first + window.stop))
            blocks.append(window.pick(positions_B[start:stop] - first))
            start = stop
        return join_blocks(blocks), np.zeros(len(positions_B), np.int64)

    def forget_before(self, position: int) -> None:
        epoch, place = divmod(position, len(self._dataset))
        number = self._plan(epoch).window_at(place)
        if len(self._windows) <= 1 or min(self._windows) >= (epoch, number):
            return
        for key in [key for key in self._windows if key < (epoch, number)]:
            self._release(self._windows.pop(key))
        for old in [old for old in self._plans if old < epoch]:
            del self._plans[old]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for future in self._windows.values():
            self._release(future)
        self._windows.clear()

    def _release(self, future: Future[Window]) -> None:
        if not future.cancel() and future.done() and not future.exception():
            buffer = future.result().buffer
            if buffer is not None:
                self._options.buffers.give(buffer)

    def _plan(self, epoch: int) -> WindowPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            options = self._options
            plan = self._dataset.plan_epoch(self._seed, epoch, shuffle=options.shuffle, window_rows=options.window_rows)
            self._plans[epoch] = plan
        return plan

    def _window(self, epoch: int, number: int) -> Window:
        key = (epoch, number)
        future = self._windows.get(key) or self._request(key)
        if self._pool is not None:
            is_last = number + 1 == self._plan(epoch).num_windows
            following = (epoch + 1, 0) if is_last else (epoch, number + 1)
            # A window before this one may still be in use; never more than one is read ahead.
            if max(self._windows) == key and (self._options.endless or not is_last):
                self._request(following)
        return future.result()

    def _request(self, key: tuple[int, int]) -> Future[Window]:
        if self._pool is not None:
            future = self._pool.submit(self._read_window, key)
        else:
            future = Future()
            future.set_result(self._read_window(key))
        self._windows[key] = future
        return future

    def _read_window(self, key: tuple[int, int]) -> Window:
        epoch, number = key
        options = self._options
        return self._dataset.read_window(
            self._plan(epoch),
            number,
            self._seed,
            epoch,
            shuffle=options.shuffle,
            columns=options.columns,
            buffers=options.buffers,
        )


class MixtureStream:
    """The samples of a mixture, each source in epochs of its own."""

    def __init__(self, mixture: Mixture[TokenDataset], seed: int, options: StreamOptions) -> None:
        self._mixture = mixture
        # A source's epochs end at other places than those of the mixture.
        endless = replace(options, endless=True)
        # Sources of one length would be shuffled alike by one seed.
        self._streams = [
            DatasetStream(dataset, int(stream_key(seed, number)), endless)
            for number, dataset in enumerate(mixture.datasets)
        ]

    @property
    def epoch_samples(self) -> int | None:
        return self._mixture.num_samples

    def read(self, positions_B: Numbers) -> tuple[RowBlock, Numbers]:
        first = int(positions_B[0])
        sources, places = self._mixture.schedule(first, int(positions_B[-1]) + 1 - first)
        source_B, place_B = sources[positions_B - first].astype(np.int64), places[positions_B - first]
        blocks, orders = [], []
        for number, stream in enumerate(self._streams):
            mine = np.flatnonzero(source_B == number)
            if len(mine):
                blocks.append(stream.read(place_B[mine])[0])
                orders.append(mine)
        return take_block(join_blocks(blocks), np.argsort(np.concatenate(orders))), source_B

    def forget_before(self, position: int) -> None:
        before = self._mixture.counts(np.array([position]))[:, 0].tolist()
        for stream, place in zip(self._streams, before, strict=True):
            stream.forget_before(place)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
