"""Checkpoints of generators, see `tokenizer/token_checkpoint.py`; their config holds the names of their classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from schemas.errors import CheckpointError, SpecError, printable
from tokenizer.checkpoint import UNTRAINED, CheckpointFiles, read_folder, read_url
from tokenizer.generator import MaskedTokenModel
from tokenizer.generator_config import GeneratorConfig, generator_preset
from tokenizer.token_checkpoint import load_weights, model_files, read_config, save_model


def read_generator(
    source: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> CheckpointFiles:
    """The files of a generator by folder, URL or `untrained:PRESET`; nothing of them is believed yet.

    Raises CheckpointError where there is none."""
    name = os.fspath(source)
    if name.startswith(UNTRAINED):
        try:
            config = generator_preset(name.removeprefix(UNTRAINED))
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        return model_files(MaskedTokenModel(config), config.to_json_dict(), name)
    if "://" in name or "::" in name:
        return read_url(name, storage_options or {})
    return read_folder(Path(name), printable(name))


def generator_config(files: CheckpointFiles) -> GeneratorConfig:
    """What the config of a generator's files says.  Raises CheckpointError where it cannot be used."""
    return read_config(files, GeneratorConfig.from_json_dict)


def build_generator(files: CheckpointFiles, *, device: str | torch.device = "cpu") -> MaskedTokenModel:
    """The generator of its files in fp32 and eval mode.  Raises CheckpointError where they do not fit."""
    return load_weights(MaskedTokenModel(generator_config(files), seed=None), files, device)


def save_generator(model: MaskedTokenModel, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
    """Write a trained generator into a local folder, in half precision; each file appears whole or not at all."""
    save_model(model, dataclasses.replace(model.config, trained=True).to_json_dict(), folder, card=card)
