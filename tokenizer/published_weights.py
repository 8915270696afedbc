"""Weights of published feature networks, from a local file only.

Nothing is ever fetched, and nothing that a file holds is executed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from schemas.errors import CheckpointError, printable
from tokenizer.reference_pickle import StoredTensor, TorchFile

COUNTER = "num_batches_tracked"
"""Of batch norms; only training looks at it, and not every file has it."""

Network = TypeVar("Network", bound=nn.Module)


def read_published(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that torch.save wrote (torch 1.6 or later), by name.

    Raises CheckpointError, naming `what` the weights are, where the file is missing or holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(path)
    shown = printable(str(source))
    if not source.is_file():
        raise CheckpointError(
            f"{shown}: {what} are to be read from this file, which is not there, and nothing is fetched. "
            "docs/evaluation.md says where they are published."
        )
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shown}: no readable safetensors file ({error}).") from error
    with TorchFile(source) as file:
        if not isinstance(file.root, dict) or not file.root:
            raise CheckpointError(f"{shown}: no state dict, so these are not {what}.")
        return {
            str(name): file.tensor(stored, str(name))
            for name, stored in file.root.items()
            if isinstance(stored, StoredTensor)
        }


def fill_published(
    network: Network, weights: Mapping[str, Tensor], path: str | os.PathLike[str], what: str, *, unused: tuple[str, ...]
) -> Network:
    """A network on the meta device with its weights, in eval mode and without gradients.

    `unused` are prefixes of tensors that the file has besides.  Raises CheckpointError for a tensor that is missing,
    not expected or of another shape."""
    expected = {name: tuple(each.shape) for name, each in network.state_dict().items() if not name.endswith(COUNTER)}
    found = {name: each for name, each in weights.items() if not name.startswith(unused) and not name.endswith(COUNTER)}
    for name in (*expected, *found):
        if name in found and name in expected and tuple(found[name].shape) == expected[name]:
            continue
        wrong = "is not there" if name not in found else "is not part of them"
        if name in found and name in expected:
            wrong = f"has shape {list(found[name].shape)} instead of {list(expected[name])}"
        raise CheckpointError(f"{printable(str(path))}: tensor {printable(name)!r} {wrong}. These are not {what}.")
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(COUNTER)}
    network.load_state_dict({**{name: each.float() for name, each in found.items()}, **counters}, assign=True)
    return network.requires_grad_(False).eval()
