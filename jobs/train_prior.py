"""Trains a prior on token datasets, as a training file says: what `bsq train-prior` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from jobs.train import TrainDisplay, tensorboard_observers
from pipeline.dataset import TokenDataset
from pipeline.loader import TokenLoader
from pipeline.mixture import Mixture
from schemas.errors import SpecError
from schemas.trainspec import TokenDataSpec, TokenSourceSpec, TokenTrainSpec, read_token_train_spec
from tokenizer.ranks import joined_ranks, num_ranks, rank
from tokenizer.token_train import PriorTrainConfig, PriorTrainer, TokenBatch, TokenKind, prior_train_config
from tokenizer.train_log import Observer, TrainReport
from tokenizer.train_loop import stopping_on_signals

VALIDATION_BATCH = 16
"""Clips that are measured together."""


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
    folder = out or spec.out
    if not folder or "://" in folder:
        raise SpecError(f"{path}: out is {folder!r}; name a local folder for the run, there or with --out.")
    with joined_ranks(config.run.device) as device, TrainDisplay(stream) as display:
        observe: Observer = display.observe if rank() == 0 else lambda report: None
        _train_here(spec, config, Path(folder), device, observe, resume, storage_options)
    return Path(folder) / "prior"


def _train_here(
    spec: TokenTrainSpec,
    config: PriorTrainConfig,
    folder: Path,
    device: torch.device,
    observe: Observer,
    resume: bool,
    storage_options: Mapping[str, Any] | None,
) -> None:
    def tell(line: str) -> None:
        observe(TrainReport(0, config.optimizer.steps, line=line))

    observers = [observe, *tensorboard_observers(folder, tell)]

    def observe_all(report: TrainReport) -> None:
        for each in observers:
            each(report)

    datasets = open_datasets(spec.data, storage_options)
    trainer = PriorTrainer(
        config,
        token_kind(datasets),
        TokenBatches(spec.data, datasets, batch=config.optimizer.batch, seed=config.run.seed),
        folder,
        device=device,
        validation=validation_batches(spec.data, datasets, storage_options),
        observer=observe_all,
    )
    trainer.begin(resume=resume)
    with stopping_on_signals(trainer):
        trainer.run()


def open_datasets(spec: TokenDataSpec, storage_options: Mapping[str, Any] | None) -> dict[str, TokenDataset]:
    """The datasets to learn from, by name; another view of each clip in each epoch.  Raises BsqError."""
    return {
        name: TokenDataset(
            source.path, view="bits", filters=source.filters or None, storage_options=dict(storage_options or {})
        )
        for name, source in _sources(spec.train).items()
    }


def token_kind(datasets: Mapping[str, TokenDataset]) -> TokenKind:
    """What the tokens of all datasets are.  Raises SpecError where they differ."""
    infos = {name: dataset.info for name, dataset in datasets.items()}
    first_name, first = next(iter(infos.items()))
    for name, info in infos.items():
        if (info.weight_sha256, info.grid) != (first.weight_sha256, first.grid):
            raise SpecError(
                f"{name!r} and {first_name!r} have tokens of different tokenizers or grids; a prior is for one kind."
            )
    return TokenKind(
        first.bits, first.group_size, first.grid, max(info.max_frames for info in infos.values()), first.weight_sha256
    )


class TokenBatches:
    """Batches of this process, drawn from a mixture of datasets for ever."""

    def __init__(self, spec: TokenDataSpec, datasets: Mapping[str, TokenDataset], *, batch: int, seed: int) -> None:
        weights = {name: source.weight for name, source in _sources(spec.train).items()}
        only = next(iter(datasets.values()))
        mixture = Mixture({name: (dataset, weights[name]) for name, dataset in datasets.items()}, stop="all")
        self._loader = TokenLoader(
            only if len(datasets) == 1 else mixture,
            batch * num_ranks(),
            seed=seed,
            window=spec.window,
            tail="carry",
            repeat=True,
            rank=rank(),
            world_size=num_ranks(),
        )
        self._batches = iter(self._loader)

    def next_batch(self) -> TokenBatch:
        """The next clips of this process; those of different lengths are padded."""
        batch = next(self._batches)
        return TokenBatch(batch["bits"], batch.get("mask"))

    def state(self) -> dict[str, Any]:
        """Where the loader is."""
        return self._loader.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.  Raises SpecError naming what differs."""
        self._loader.load_state_dict(state)
        self._batches = iter(self._loader)


def validation_batches(
    spec: TokenDataSpec, datasets: Mapping[str, TokenDataset], storage_options: Mapping[str, Any] | None
) -> dict[str, list[TokenBatch]]:
    """Batches to measure on, by name; clips of one length together.  Raises SpecError for tokens of another kind."""
    found: dict[str, list[TokenBatch]] = {}
    for name, source in _sources(spec.validation).items():
        dataset = TokenDataset(
            source.path, view="bits", views=0, filters=source.filters or None, storage_options=storage_options
        )
        token_kind({**datasets, name: dataset})
        count = min(spec.validation_clips, len(dataset))
        numbers = np.linspace(0, len(dataset) - 1, count).round().astype(int)
        clips = [sample["bits"] for sample in dataset.__getitems__(numbers.tolist())]
        found[name] = [
            TokenBatch(torch.stack(several))
            for frames in sorted({len(clip) for clip in clips})
            for several in _chunks([clip for clip in clips if len(clip) == frames])
        ]
    return found


def _chunks(clips: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [clips[first : first + VALIDATION_BATCH] for first in range(0, len(clips), VALIDATION_BATCH)]


def _sources(named: Mapping[str, TokenSourceSpec | str]) -> dict[str, TokenSourceSpec]:
    return {name: TokenSourceSpec(path=source) if isinstance(source, str) else source for name, source in named.items()}
