"""What training a prior and training a generator have in common: datasets, batches, and the run around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from jobs.train import TrainDisplay, tensorboard_observers
from pipeline.dataset import TokenDataset, Views
from pipeline.loader import TokenLoader
from pipeline.mixture import Mixture
from schemas.errors import SpecError
from schemas.trainspec import LabelledTokenDataSpec, TokenDataSpec, TokenSourceSpec, TokenTrainSpec
from tokenizer.ranks import joined_ranks, num_ranks, rank
from tokenizer.token_train import TokenBatch, TokenKind, TokenTrainConfig, TokenTrainer
from tokenizer.train_log import Observer, TrainReport
from tokenizer.train_loop import stopping_on_signals

NO_LABEL = -1
VALIDATION_BATCH = 16
"""Clips that are measured together."""

BuildTrainer = Callable[[Path, torch.device, Observer], TokenTrainer]
"""Makes the trainer of a run's folder, on a device, that reports to an observer."""


def run_training(
    path: Path,
    spec: TokenTrainSpec,
    config: TokenTrainConfig,
    build: BuildTrainer,
    *,
    resume: bool = False,
    out: str | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run a training file to its end and return the folder of the weights to use: of the best validation, or the
    newest where nothing was measured.

    Raises SpecError where no folder is named, and Interrupted after a signal, with everything saved."""
    folder = out or spec.out
    if not folder or "://" in folder:
        raise SpecError(f"{path}: out is {folder!r}; name a local folder for the run, there or with --out.")
    with joined_ranks(config.run.device) as device, TrainDisplay(stream) as display:
        observe: Observer = display.observe if rank() == 0 else lambda report: None

        def tell(line: str) -> None:
            observe(TrainReport(0, config.optimizer.steps, line=line))

        observers = [observe, *tensorboard_observers(Path(folder), tell)]

        def observe_all(report: TrainReport) -> None:
            for each in observers:
                each(report)

        trainer = build(Path(folder), device, observe_all)
        trainer.begin(resume=resume)
        with stopping_on_signals(trainer):
            trainer.run()
    best = Path(folder) / "best"
    return best if best.is_dir() else Path(folder) / trainer.newest


def open_datasets(spec: TokenDataSpec, storage_options: Mapping[str, Any] | None) -> dict[str, TokenDataset]:
    """The datasets to learn from, by name; another view of each clip in each epoch.  Raises BsqError."""
    return {name: _open(source, "latin", spec, storage_options) for name, source in token_sources(spec.train).items()}


def _open(
    source: TokenSourceSpec, views: Views, spec: TokenDataSpec, storage_options: Mapping[str, Any] | None
) -> TokenDataset:
    return TokenDataset(
        source.path,
        columns=["label"] if classes_of(spec) else None,
        view="bits",
        views=views,
        filters=source.filters or None,
        storage_options=dict(storage_options or {}),
    )


def classes_of(spec: TokenDataSpec) -> tuple[str, ...]:
    """Names of the labels that are learnt, none where labels are not looked at."""
    return spec.classes if isinstance(spec, LabelledTokenDataSpec) else ()


def token_kind(datasets: Mapping[str, TokenDataset]) -> TokenKind:
    """What the tokens of all datasets are.  Raises SpecError where they differ."""
    infos = {name: dataset.info for name, dataset in datasets.items()}
    first_name, first = next(iter(infos.items()))
    for name, info in infos.items():
        if (info.weight_sha256, info.grid) != (first.weight_sha256, first.grid):
            raise SpecError(
                f"{name!r} and {first_name!r} have tokens of different tokenizers or grids; a model is for one kind."
            )
    return TokenKind(
        first.bits, first.group_size, first.grid, max(info.max_frames for info in infos.values()), first.weight_sha256
    )


class TokenBatches:
    """Batches of this process, drawn from a mixture of datasets for ever."""

    def __init__(
        self,
        spec: TokenDataSpec,
        datasets: Mapping[str, TokenDataset],
        *,
        batch: int,
        seed: int,
        label_drop: float = 0.0,
    ) -> None:
        """`label_drop`: share of clips whose label is not shown, where the spec names classes."""
        self._classes = classes_of(spec)
        weights = {name: source.weight for name, source in token_sources(spec.train).items()}
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
            label_drop=label_drop if self._classes else 0.0,
            null_label=NO_LABEL,
        )
        self._batches = iter(self._loader)

    def next_batch(self) -> TokenBatch:
        """The next clips of this process; those of different lengths are padded.

        Raises SpecError for a label without a class."""
        batch = next(self._batches)
        return TokenBatch(batch["bits"], batch.get("mask"), checked_labels(batch.get("label"), self._classes))

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
    for name, source in token_sources(spec.validation).items():
        dataset = _open(source, 0, spec, storage_options)
        token_kind({**datasets, name: dataset})
        count = min(spec.validation_clips, len(dataset))
        numbers = np.linspace(0, len(dataset) - 1, count).round().astype(int)
        samples = dataset.__getitems__(numbers.tolist())
        found[name] = [
            _validation_batch(several, classes_of(spec))
            for frames in sorted({len(sample["bits"]) for sample in samples})
            for several in _chunks([sample for sample in samples if len(sample["bits"]) == frames])
        ]
    return found


def _validation_batch(samples: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> TokenBatch:
    labels = None
    if classes:
        given = [sample["label"] for sample in samples]
        labels = torch.tensor([NO_LABEL if label is None else int(label) for label in given])
    return TokenBatch(torch.stack([sample["bits"] for sample in samples]), labels=checked_labels(labels, classes))


def checked_labels(labels_B: torch.Tensor | None, classes: Sequence[str]) -> torch.Tensor | None:
    """The labels.  Raises SpecError for one without a class."""
    if (
        labels_B is not None
        and len(labels_B)
        and not NO_LABEL <= int(labels_B.min()) <= int(labels_B.max()) < len(classes)
    ):
        wrong = next(label for label in labels_B.tolist() if not NO_LABEL <= label < len(classes))
        raise SpecError(
            f"a row has label {wrong}, but data.classes names {len(classes)} classes, for labels from 0. Name all of "
            "them, or leave such rows out with filters."
        )
    return labels_B


def _chunks(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [samples[first : first + VALIDATION_BATCH] for first in range(0, len(samples), VALIDATION_BATCH)]


def token_sources(named: Mapping[str, TokenSourceSpec | str]) -> dict[str, TokenSourceSpec]:
    return {name: TokenSourceSpec(path=source) if isinstance(source, str) else source for name, source in named.items()}
