"""The processes that train together, and the device and arithmetic of each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas.errors import SpecError
from tokenizer.train_config import LoopPart


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


@contextmanager
def joined_ranks(device: str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did, and give the device that this one trains on.

    Where a framework has joined them already, such as Ray Train, nothing is left to do."""
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    except RuntimeError as error:
        raise SpecError(f"run.device is {device!r}; torch knows no such device. Give auto, cuda or cpu.") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SpecError("run.device is 'cuda', but torch finds no GPU. Set it to auto or cpu.")
        torch.cuda.set_device(chosen)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if joins:
            dist.destroy_process_group()


def compute_dtype(run: LoopPart, device: torch.device) -> torch.dtype:
    """The arithmetic that `run.dtype` means on this device."""
    if run.dtype == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_it else torch.float32
    return torch.bfloat16 if run.dtype == "bfloat16" else torch.float32


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, in one message."""
    if num_ranks() == 1:
        return
    gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in parameters]
    flat = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for parameter, mean in zip(parameters, torch.split(flat, [each.numel() for each in gradients]), strict=True):
        parameter.grad = mean.view_as(parameter)


@torch.no_grad()
def copy_from_first_rank(module: nn.Module) -> None:
    """Give every process the weights of the first."""
    broadcast_from_first_rank(module.state_dict().values())


def broadcast_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite these in every process with those of the first."""
    if num_ranks() > 1:
        for each in tensors:
            dist.broadcast(each, 0)


def gathered(value: Any) -> list[Any]:
    """The values of all processes, one of each, in every process; a value is anything that can be pickled."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def joined_batch(batch: Tensor) -> Tensor:
    """The batches of all processes, of one shape, one after another along the first axis."""
    if num_ranks() == 1:
        return batch
    parts = [torch.empty_like(batch) for _ in range(num_ranks())]
    dist.all_gather(parts, batch.contiguous())
    return torch.cat(parts)
