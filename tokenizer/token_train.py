"""Training of models over tokens: settings, batches, one update, the run.

Shape letters: B batch, T frames, h w the grid, L bits per token."""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from tokenizer.ema import MovingAverage
from tokenizer.optimizers import make_optimizers
from tokenizer.ranks import average_gradients, compute_dtype, copy_from_first_rank
from tokenizer.schedule import clip_gradients, rate_factor
from tokenizer.train_config import (
    LearningPart,
    LoopPart,
    check_loop,
    require_at_least,
    require_same_settings,
)
from tokenizer.train_curve import draw_curve
from tokenizer.train_log import Observer
from tokenizer.train_loop import BatchSource, TrainLoop
from tokenizer.train_state import TrainState, load_optimizer, optimizer_tensors

FREE_SETTINGS = {
    "model.init_from", "optimizer.steps", "run.device", "run.log_every", "run.picture_every", "run.save_every",
    "run.validate_every", "run.keep_last",
}  # fmt: skip
"""What may differ between a run and its continuation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLearningPart(LearningPart):
    """How a model over tokens learns."""

    method: Literal["adamw", "muon"] = "muon"
    steps: int = 20_000
    batch: int = 32
    """Clips in a batch of one process."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    warmup_from: float = 0.0
    cosine_to: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrainConfig:
    """A whole run, except what the model is and where its tokens come from."""

    optimizer: TokenLearningPart = field(default_factory=TokenLearningPart)
    run: LoopPart = field(default_factory=LoopPart)

    def __post_init__(self) -> None:
        check_loop(self.optimizer, self.run)
        require_at_least({"optimizer.batch": (self.optimizer.batch, 1)})

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types."""
        return dataclasses.asdict(self)

    def require_same_run(self, saved: dict[str, Any], where: str) -> bool:
        """Raise SpecError where `saved`, in JSON types, is another run; return whether only its end has moved."""
        return require_same_settings(saved, self.to_json_dict(), FREE_SETTINGS, where)


@dataclass(frozen=True, slots=True)
class TokenKind:
    """What the tokens of the data are."""

    bits: int
    group_size: int
    grid: tuple[int, int]
    max_frames: int
    tokenizer_sha256: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Clips of tokens."""

    bits: Tensor
    """Bool [B, T, h, w, L]."""
    mask: Tensor | None = None
    """Bool [B, T], False for frames that only pad; None where there are none."""
    labels: Tensor | None = None
    """int64 [B], -1 for none; None where no labels are learnt."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TokenBatch:
        given = (self.bits, self.mask, self.labels)
        bits, mask, labels = (None if each is None else each.to(device, non_blocking=non_blocking) for each in given)
        assert bits is not None
        return TokenBatch(bits, mask, labels)

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        frames = self.bits.shape[0] * self.bits.shape[1] if self.mask is None else int(self.mask.sum())
        return frames * self.bits.shape[2] * self.bits.shape[3]


Model = TypeVar("Model", bound=nn.Module)


class TokenLearner(ABC, Generic[Model]):
    """A model over tokens, its moving average and its optimiser; what it learns is told by a subclass."""

    name: str
    """What the model is; also the folder of its newest weights."""

    def __init__(self, config: TokenTrainConfig, model: Model, device: torch.device) -> None:
        self.model = model.to(device).train()
        copy_from_first_rank(self.model)
        self.average = MovingAverage(self.model, config.optimizer.ema)
        self.optimizer = make_optimizers(self.model, config.optimizer)
        self._learning, self._device, self._dtype = config.optimizer, device, compute_dtype(config.run, device)

    @abstractmethod
    def losses(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Scalars by name; `loss` is what is made small."""

    @abstractmethod
    def measure(self, batch: TokenBatch) -> tuple[float, float]:
        """Bits that the tokens of a validation batch take, and how many tokens that is."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model as it is now."""

    def update(self, batch: TokenBatch, step: int) -> dict[str, Tensor]:
        """Learn from one batch; gradients that are not finite change nothing, and `skipped` is 1."""
        part = self._learning
        rate = part.learning_rate * rate_factor(part, step)
        self.optimizer.set_learning_rate(rate)
        with self.autocast():
            metrics = self.losses(batch)
        torch.autograd.backward(metrics["loss"])
        parameters = list(self.model.parameters())
        average_gradients(parameters)
        metrics["grad_norm"] = clip_gradients(parameters, part.clip_norm)
        finite = bool(metrics["grad_norm"].isfinite())
        if finite:
            self.optimizer.step()
            self.average.update(self.model)
        self.optimizer.zero_grad()
        metrics["skipped"] = torch.tensor(float(not finite))
        metrics["learning_rate"] = torch.tensor(rate)
        return {name: value.detach() for name, value in metrics.items()}

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the run."""
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(self._device.type, self._dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learns and what its optimiser remembers, by dotted name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.average.state().items()}
        return tensors | {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def load(self, state: TrainState) -> None:
        """Put back what `tensors` gave."""
        self.model.load_state_dict(state.part("model"))
        self.average.load(state.part("ema"), state.values["ema_updates"])
        load_optimizer(self.optimizer, state.part("optimizer"))


class TokenTrainer(TrainLoop[TokenBatch]):
    """One run of training a model over tokens.  Writes its newest weights, OUT/best/ and OUT/curve.svg."""

    def __init__(
        self,
        config: TokenTrainConfig,
        learner: TokenLearner[Any],
        batches: BatchSource[TokenBatch],
        out: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        validation: Mapping[str, Sequence[TokenBatch]] | None = None,
        observer: Observer = lambda report: None,
    ) -> None:
        """`validation`: batches by the name of their data."""
        super().__init__(config, learner, batches, out, device=torch.device(device), observer=observer)
        self.learner, self._validation = learner, validation or {}
        self.newest = learner.name

    def export(self, name: str) -> None:
        """Write the model."""
        self.learner.save(self.out / name)

    def draw(self, batch: TokenBatch) -> None:
        """The curve of bits per token, as SVG."""
        draw_curve(
            self.out / "log.jsonl", self.out / "curve.svg", "bits per token", batch.bits.shape[-1], ("loss", "val_bits")
        )

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], float]:
        """Bits that a token of each kind of validation data takes, and of all together, which ranks."""
        self.learner.model.eval()
        values: dict[str, float] = {}
        total_bits = total_tokens = 0.0
        for name, batches in self._validation.items():
            bits = tokens = 0.0
            for batch in batches:
                with self.learner.autocast():
                    batch_bits, batch_tokens = self.learner.measure(batch.to(self.device))
                bits, tokens = bits + batch_bits, tokens + batch_tokens
            values[f"val_bits_{name}"] = bits / tokens
            total_bits, total_tokens = total_bits + bits, total_tokens + tokens
        self.learner.model.train()
        if values:
            values["val_bits"] = total_bits / total_tokens
        return values, -values.get("val_bits", math.inf)
