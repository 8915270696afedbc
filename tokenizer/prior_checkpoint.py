"""Checkpoints of priors: a folder with config.json, model.safetensors in fp16 and an optional card.md.

They are laid out as those of tokenizers (`tokenizer/checkpoint.py`), and named by their weight hash in the same way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from schemas.errors import CheckpointError, SpecError, nearest_name, printable
from tokenizer.checkpoint import CONFIG_FILE, UNTRAINED, CheckpointFiles, read_folder, read_url
from tokenizer.prior import TokenPrior
from tokenizer.prior_config import PRESETS, PriorConfig, prior_preset
from tokenizer.token_checkpoint import load_weights, model_files, read_config, save_model

SHIPPED_PRIORS = Path(__file__).parent / "priors"
"""One folder for each prior that comes with the package."""
DEFAULT_PRIOR = "prior-small"


def read_prior(
    source: str | os.PathLike[str] = "default", *, storage_options: Mapping[str, Any] | None = None
) -> CheckpointFiles:
    """The files of a prior by shipped name, folder, URL or `untrained:PRESET`; nothing of them is believed yet.

    Raises CheckpointError where there is none."""
    name = os.fspath(source)
    shipped = shipped_priors()
    if name == "default":
        if DEFAULT_PRIOR not in shipped:
            raise CheckpointError(
                "No trained prior comes with this package. Train one with `bsq train-prior`, and name its folder."
            )
        name = DEFAULT_PRIOR
    if name.startswith(UNTRAINED):
        try:
            config = prior_preset(name.removeprefix(UNTRAINED))
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        return model_files(TokenPrior(config), config.to_json_dict(), name)
    if name in shipped:
        return read_folder(SHIPPED_PRIORS / name, name)
    if "://" in name or "::" in name:
        return read_url(name, storage_options or {})
    if isinstance(source, os.PathLike) or os.sep in name or Path(name).is_dir():
        return read_folder(Path(name), printable(name))
    valid = [*(["default", *shipped] if shipped else []), *(UNTRAINED + preset for preset in PRESETS)]
    raise CheckpointError(
        f"There is no prior {printable(name)!r}.{nearest_name(name, valid)} Give one of {', '.join(valid)}, or the "
        "path or URL of a prior's folder."
    )


def shipped_priors() -> list[str]:
    """Names of the priors that come with the package."""
    if not SHIPPED_PRIORS.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED_PRIORS.iterdir() if (folder / CONFIG_FILE).is_file())


def prior_config(files: CheckpointFiles) -> PriorConfig:
    """What the config of a prior's files says.  Raises CheckpointError where it cannot be used."""
    return read_config(files, PriorConfig.from_json_dict)


def build_prior(files: CheckpointFiles, *, device: str | torch.device = "cpu") -> TokenPrior:
    """The prior of its files in fp32 and eval mode.  Raises CheckpointError where weights and config do not fit."""
    return load_weights(TokenPrior(prior_config(files), seed=None), files, device)


def save_prior(prior: TokenPrior, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
    """Write a trained prior into a local folder, in half precision; each file appears whole or not at all."""
    save_model(prior, dataclasses.replace(prior.config, trained=True).to_json_dict(), folder, card=card)
