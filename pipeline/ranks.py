"""Which of the processes that train together this one is."""

from __future__ import annotations

import os

import torch

from schemas.errors import SpecError


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, or those of torch.distributed, or of the environment.  Raises SpecError."""
    if (rank is None) != (world_size is None):
        raise SpecError("give both rank and world_size, or neither.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            # torchrun sets both before the process group exists.
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise SpecError(f"rank is {rank} and world_size {world_size}; ranks go from 0 to world_size - 1.")
    return rank, world_size
