"""Checkpoints of models over tokens: a folder with config.json, model.safetensors in fp16 and an optional card.md.

They are laid out as those of tokenizers (`tokenizer/checkpoint.py`), and named by their weight hash in the same way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from schemas.errors import CheckpointError, SpecError
from tokenizer.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    CheckpointFiles,
    model_bytes,
    read_weights,
    write_whole,
)

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def read_config(files: CheckpointFiles, parse: Callable[[object], Config]) -> Config:
    """What the config of a model's files says.  Raises CheckpointError where it cannot be used."""
    try:
        return parse(json.loads(files.config_json))
    except (ValueError, RecursionError, SpecError) as error:
        raise CheckpointError(f"{files.where}/{CONFIG_FILE}: {error}") from error


def load_weights(model: Model, files: CheckpointFiles, device: str | torch.device) -> Model:
    """`model`, built on the meta device, with the weights of its files in fp32 and eval mode.

    Raises CheckpointError where they do not fit."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(read_weights(files, expected), strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def save_model(
    model: nn.Module, config: Mapping[str, Any], folder: str | os.PathLike[str], *, card: str | None = None
) -> None:
    """Write a model into a local folder, in half precision; each file appears whole or not at all."""
    files = model_files(model, config, os.fspath(folder))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # The config last: a folder without it is not taken for a checkpoint.
    (path / CONFIG_FILE).unlink(missing_ok=True)
    write_whole(path / MODEL_FILE, files.model_safetensors)
    if card is not None:
        write_whole(path / CARD_FILE, card.encode())
    write_whole(path / CONFIG_FILE, files.config_json)


def model_files(model: nn.Module, config: Mapping[str, Any], where: str) -> CheckpointFiles:
    """The files of a model, with its config in JSON types."""
    text = json.dumps(config, indent=2) + "\n"
    return CheckpointFiles(text.encode(), model_bytes(model.state_dict(), torch.float16), where)
