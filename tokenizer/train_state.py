"""The state of a training run on disk: one safetensors file, whole or absent, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.errors import CheckpointError, printable
from tokenizer.optimizers import Optimizers

FORMAT = 1
_NAME = re.compile(r"state-(\d{8,})\.safetensors")


class TrainState(NamedTuple):
    """Tensors by dotted name, and everything else as JSON types."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


def state_path(folder: Path, step: int) -> Path:
    """Where the state after `step` updates lies."""
    return folder / f"state-{step:08d}.safetensors"


def find_states(folder: Path) -> list[Path]:
    """All complete states, the oldest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def save_state(path: Path, state: TrainState, *, keep: int) -> None:
    """Write a state so that it appears whole or not at all, then remove all but the newest `keep`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"bsqtok": json.dumps({"format": FORMAT, **state.values})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    # A run that was killed while it wrote leaves its temporary file.
    for old in (*find_states(path.parent)[:-keep], *path.parent.glob(".state-*.tmp")):
        old.unlink(missing_ok=True)


def load_state(path: Path) -> TrainState:
    """Read a state; raises CheckpointError where it is damaged or of another version."""
    shown = printable(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("bsqtok", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown}: the training state cannot be read ({error}). Remove it to use the one before."
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{shown}: no training state of this version of bsqtok.")
    return TrainState(tensors, values)


def optimizer_tensors(optimizer: Optimizers) -> dict[str, Tensor]:
    """The moments of an optimiser as `NUMBER.NAME`, numbered as its parameters are."""
    moments = optimizer.moments()
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, each in moments.items() for name, value in each.items()
    }


def load_optimizer(optimizer: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, kind = name.partition(".")
        moments.setdefault(int(number), {})[kind] = value
    optimizer.load_moments(moments)


def random_tensors() -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_random(tensors: Mapping[str, Tensor]) -> None:
    """Put `random_tensors` back, as far as this machine has such devices."""
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
