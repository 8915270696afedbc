"""Trains a generator on token datasets, as a training file says: what `bsq train-generator` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from jobs.token_training import (
    TokenBatches,
    open_datasets,
    run_training,
    token_kind,
    token_sources,
    validation_batches,
)
from pipeline.dataset import TokenDataset
from schemas.errors import SpecError
from schemas.trainspec import TokenSourceSpec, read_generator_train_spec
from tokenizer.generator_train import GeneratorLearner, generator_train_config
from tokenizer.token_train import TokenTrainer
from tokenizer.train_log import Observer

PICTURES = ("frames", "==", 1)


def train_generator(
    path: Path,
    *,
    resume: bool = False,
    out: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run a training file to its end and return the folder of the generator.

    Raises SpecError for a file that cannot be meant, and Interrupted after a signal, with everything saved."""
    spec = read_generator_train_spec(path)
    config = generator_train_config(spec.training(), spec.data.classes, str(path))

    def build(folder: Path, device: torch.device, observer: Observer) -> TokenTrainer:
        datasets = open_datasets(spec.data, storage_options)
        sources = token_sources(spec.data.train)
        for name, dataset in datasets.items():
            _require_pictures(name, sources[name], dataset)
        batches = TokenBatches(
            spec.data,
            datasets,
            batch=config.optimizer.batch,
            seed=config.run.seed,
            label_drop=config.model.label_drop,
        )
        return TokenTrainer(
            config,
            GeneratorLearner(config, token_kind(datasets), device),
            batches,
            folder,
            device=device,
            validation=validation_batches(spec.data, datasets, storage_options),
            observer=observer,
        )

    return run_training(path, spec, config, build, resume=resume, out=out, stream=stream)


def _require_pictures(name: str, source: TokenSourceSpec, dataset: TokenDataset) -> None:
    if dataset.info.max_frames > 1 and PICTURES not in source.filters:
        raise SpecError(
            f"data.train: {name!r} has clips of up to {dataset.info.max_frames} frames, and a generator learns from "
            'pictures. Take those alone: filters: [[frames, "==", 1]]'
        )
