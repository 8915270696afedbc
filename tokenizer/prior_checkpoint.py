"""Checkpoints of priors: a folder with config.json, model.safetensors in fp16 and an optional card.md.

They are laid out as those of tokenizers (`tokenizer/checkpoint.py`), and named by their weight hash in the same way."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from schemas.errors import CheckpointError, SpecError, nearest_name, printable
from tokenizer.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    UNTRAINED,
    CheckpointFiles,
    model_bytes,
    read_folder,
    read_url,
    read_weights,
    write_whole,
)
from tokenizer.prior import TokenPrior
from tokenizer.prior_config import PRESETS, PriorConfig, prior_preset

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
        return CheckpointFiles(_config_bytes(config), model_bytes(TokenPrior(config).state_dict(), torch.float16), name)
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
    try:
        return PriorConfig.from_json_dict(json.loads(files.config_json))
    except (ValueError, RecursionError, SpecError) as error:
        raise CheckpointError(f"{files.where}/{CONFIG_FILE}: {error}") from error


def build_prior(files: CheckpointFiles, *, device: str | torch.device = "cpu") -> TokenPrior:
    """The prior of its files in fp32 and eval mode.  Raises CheckpointError where weights and config do not fit."""
    config = prior_config(files)
    expected = {name: tuple(value.shape) for name, value in TokenPrior(config, seed=None).state_dict().items()}
    prior = TokenPrior(config, seed=None)
    prior.load_state_dict(read_weights(files, expected), strict=True, assign=True)
    return prior.to(device).eval().requires_grad_(False)


def save_prior(prior: TokenPrior, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
    """Write a trained prior into a local folder, in half precision; each file appears whole or not at all."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # The config last: a folder without it is not taken for a checkpoint.
    (path / CONFIG_FILE).unlink(missing_ok=True)
    write_whole(path / MODEL_FILE, model_bytes(prior.state_dict(), torch.float16))
    if card is not None:
        write_whole(path / CARD_FILE, card.encode())
    write_whole(path / CONFIG_FILE, _config_bytes(dataclasses.replace(prior.config, trained=True)))


def _config_bytes(config: PriorConfig) -> bytes:
    return (json.dumps(config.to_json_dict(), indent=2) + "\n").encode()
