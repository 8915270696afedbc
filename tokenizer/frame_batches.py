"""Batches for training from pixels that are decoded already and stay in memory, the device's where there is one.

A batch is a function of (seed, how many were drawn before): runs resume exactly, and several processes draw together
what one would draw alone.

Shape letters: N pictures or clips, B batch, T frames, H W pixels, C the 3 colours, S side of a square."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import SpecError, printable
from tokenizer.colour_detail import NUM_DRAWS, sharpen_colours
from tokenizer.jpeg_frames import KEYS, decode_jpeg_frames
from tokenizer.train_config import OptimizerPart, SamplingPart

_KIND_DRAW, _ORDER_DRAW, _CROP_DRAW, _DETAIL_DRAW = range(4)
"""First number after the seed of a generator, so that no two uses share one."""


class Batches(Protocol):
    """What a trainer draws from, for ever; a batch holds images or clips, never both."""

    def next_batch(self) -> Tensor:
        """uint8 [B, T, S, S, 3], on the device or in pinned memory."""

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON types."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.  Raises SpecError where it belongs to other data."""


class HeldFrames:
    """Random crops, mirrored or not, of arrays that are held as uint8."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray[Any, Any] | Tensor],
        *,
        image_size: int,
        max_frames: int,
        sampling: SamplingPart,
        optimizer: OptimizerPart,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """`arrays` are uint8 [N, T, H, W, 3]: pictures where T is 1, else videos, of which `max_frames` neighbouring
        frames are taken.  Raises SpecError for what is not."""
        self._size, self._seed, self._sampling = image_size, seed, sampling
        self._rank, self._num_ranks = rank, num_ranks
        self._pools: list[Tensor] = []
        for number, array in enumerate(arrays):
            _require_frames(array, image_size, f"array {number}")
            # np.array copies: torch takes no memory that cannot be written, such as a mapped file.
            tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
            if max_frames > 1 or tensor.shape[1] == 1:
                self._pools.append(tensor.to(device))
            else:
                # An image tokenizer learns from the frames of videos too.
                self._pools.append(tensor.flatten(0, 1).unsqueeze(1).to(device))
        # Pictures first, so that batches do not depend on the order in which folders list files.
        self._pools.sort(key=lambda pool: pool.shape[1] > 1)
        if not self._pools:
            raise SpecError("There is nothing to train on; give at least one array of frames.")
        self._frames = [min(max_frames, pool.shape[1]) for pool in self._pools]
        self._batch = [optimizer.batch_images if frames == 1 else optimizer.batch_clips for frames in self._frames]
        self._shares = self._pool_shares()
        self._num_batches = 0
        self._drawn = [0] * len(self._pools)
        self._orders: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def next_batch(self) -> Tensor:
        kind = self._generator(_KIND_DRAW, self._num_batches).random()
        pool = int(np.searchsorted(np.cumsum(self._shares), kind * sum(self._shares), side="right"))
        size = self._batch[pool] * self._num_ranks
        draws = self._generator(_CROP_DRAW, pool, self._drawn[pool])
        low, high = self._sampling.crop_scale
        short = min(self._pools[pool].shape[2:4])
        side = round(short * (low + (high - low) * draws.random()))
        # Drawn for all processes, then each takes its slice.
        places = draws.random((size, 4))
        first = self._rank * self._batch[pool]
        crops = [
            self._crop(pool, self._item(pool, self._drawn[pool] + number), side, places[number])
            for number in range(first, first + self._batch[pool])
        ]
        details = self._generator(_DETAIL_DRAW, pool, self._drawn[pool]).random((size, NUM_DRAWS))
        self._drawn[pool] += size
        self._num_batches += 1
        resized = _resized(torch.stack(crops), self._size)
        return sharpen_colours(resized, details[first : first + len(crops)], self._sampling.colour_detail)

    def state(self) -> dict[str, Any]:
        return {"batches": self._num_batches, "drawn": list(self._drawn), "shapes": self._shapes()}

    def load(self, state: dict[str, Any]) -> None:
        if state.get("shapes") != self._shapes():
            raise SpecError(
                f"The run was begun with frames of shapes {state.get('shapes')}, these are {self._shapes()}. "
                "Give the same data, or start a new run with model.init_from."
            )
        self._num_batches, self._drawn = int(state["batches"]), [int(count) for count in state["drawn"]]

    def _shapes(self) -> list[list[int]]:
        return [list(pool.shape) for pool in self._pools]

    def _pool_shares(self) -> list[float]:
        """Probability of each pool: the kinds as configured, within a kind by the number of its items."""
        clips = [frames > 1 for frames in self._frames]
        share = self._sampling.clip_share if any(clips) and not all(clips) else float(all(clips))
        totals = {kind: sum(len(p) for p, is_clip in zip(self._pools, clips, strict=True) if is_clip == kind)
                  for kind in (False, True)}  # fmt: skip
        return [
            (share if is_clip else 1 - share) * len(pool) / totals[is_clip]
            for pool, is_clip in zip(self._pools, clips, strict=True)
        ]

    def _item(self, pool: int, position: int) -> int:
        """The item at a position of the endless order of a pool: one shuffle of all for each epoch."""
        epoch, offset = divmod(position, len(self._pools[pool]))
        if (pool, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != pool or key[1] >= epoch - 1}
            self._orders[pool, epoch] = self._generator(_ORDER_DRAW, pool, epoch).permutation(len(self._pools[pool]))
        return int(self._orders[pool, epoch][offset])

    def _crop(self, pool: int, item: int, side: int, place: np.ndarray[Any, Any]) -> Tensor:
        frames_THWC = self._pools[pool][item]
        num_frames, height, width = frames_THWC.shape[:3]
        start = int(place[0] * (num_frames - self._frames[pool] + 1))
        top, left = int(place[1] * (height - side + 1)), int(place[2] * (width - side + 1))
        crop = frames_THWC[start : start + self._frames[pool], top : top + side, left : left + side]
        return crop.flip(2) if self._sampling.flip and place[3] < 0.5 else crop

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers])


def read_arrays(path: str | os.PathLike[str]) -> list[np.ndarray[Any, Any]]:
    """The arrays of an .npz or .npy file, or of all those of a folder in the order of their names.

    An .npz file may hold frames as JPEG (`tokenizer.jpeg_frames`).  Raises SpecError for what cannot be read."""
    source = Path(path)
    files = sorted([*source.glob("*.npy"), *source.glob("*.npz")]) if source.is_dir() else [source]
    if not files:
        raise SpecError(
            f"{printable(str(source))}: there is no .npy or .npz file. Save frames with np.save as uint8 "
            "[N, T, H, W, 3]."
        )
    return [array for file in files for array in _read_file(file)]


def _read_file(file: Path) -> list[np.ndarray[Any, Any]]:
    shown = printable(str(file))
    try:
        if file.suffix != ".npz":
            return [np.load(file, mmap_mode="r", allow_pickle=False)]
        with np.load(file, allow_pickle=False) as stored:
            if set(stored.files) == KEYS:
                return [decode_jpeg_frames(stored, shown)]
            return [stored[name] for name in stored.files]
    except (OSError, ValueError, BadZipFile) as error:
        raise SpecError(f"{shown}: cannot be read as NumPy arrays ({error}).") from error


def centre_frames(array: np.ndarray[Any, Any] | Tensor, *, image_size: int, max_frames: int) -> Tensor:
    """What a model is measured on: the first frames, the middle square, at the model's size: uint8 [N, T, S, S, 3]."""
    _require_frames(array, image_size, "validation")
    frames = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    height, width = frames.shape[2:4]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resized(frames[:, :max_frames, top : top + side, left : left + side], image_size)


def _require_frames(array: np.ndarray[Any, Any] | Tensor, image_size: int, name: str) -> None:
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        raise SpecError(f"{name} is {dtype} {list(shape)}; frames are uint8 [items, frames, height, width, 3].")
    if min(shape[2:4]) < image_size:
        raise SpecError(
            f"{name} holds frames of {shape[2]} x {shape[3]} px, smaller than the tokenizer's {image_size} px. "
            "Decode them larger, or set model.image_size."
        )


def _resized(frames_BTHWC: Tensor, size: int) -> Tensor:
    if frames_BTHWC.shape[2] == size:
        return frames_BTHWC
    flat = frames_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(flat, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
    return resized.to(torch.uint8).permute(0, 2, 3, 1).reshape(*frames_BTHWC.shape[:2], size, size, 3)
