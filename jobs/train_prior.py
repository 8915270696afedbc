"""Trains a prior on token datasets, as a training file says: what `bsq train-prior` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from jobs.token_training import TokenBatches, open_datasets, run_training, token_kind, validation_batches
from schemas.trainspec import read_token_train_spec
from tokenizer.prior_train import PriorLearner, prior_train_config
from tokenizer.token_train import TokenTrainer
from tokenizer.train_log import Observer


def train_prior(
    path: Path,
    *,
    resume: bool = False,
    out: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run a training file to its end and return the folder of the prior.

    Raises SpecError for a file that cannot be meant, and Interrupted after a signal, with everything saved."""
    spec = read_token_train_spec(path)
    config = prior_train_config(spec.training(), str(path))

    def build(folder: Path, device: torch.device, observer: Observer) -> TokenTrainer:
        datasets = open_datasets(spec.data, storage_options)
        return TokenTrainer(
            config,
            PriorLearner(config, token_kind(datasets), device),
            TokenBatches(spec.data, datasets, batch=config.optimizer.batch, seed=config.run.seed),
            folder,
            device=device,
            validation=validation_batches(spec.data, datasets, storage_options),
            observer=observer,
        )

    return run_training(path, spec, config, build, resume=resume, out=out, stream=stream)
