"""What changes with the step, and what an optimiser is given: learning rate, ramps, parameter groups, gradients.

Schedules are functions of the step alone, so that a resumed run needs nothing but its number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizer.train_config import LearningPart

Decay = Literal["matrices", "all"]

EMBEDDINGS = ("position", "temporal")
"""Last part of the names of parameters that are embeddings, not matrices of a product."""


def learning_rate_factor(
    step: int, *, warmup_steps: int, warmup_from: float, total_steps: int, cosine_to: float
) -> float:
    """The learning rate of update `step` (from 0) as a share of its peak.

    Linear from `warmup_from` to 1 over the first `warmup_steps`, then half a cosine to `cosine_to` at `total_steps`,
    where it stays."""
    if step < warmup_steps:
        return warmup_from + (1 - warmup_from) * step / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return cosine_to + (1 - cosine_to) * (1 + math.cos(math.pi * share)) / 2


def rate_factor(learning: LearningPart, step: int) -> float:
    """`learning_rate_factor` as a run's settings have it."""
    return learning_rate_factor(
        step,
        warmup_steps=learning.warmup_steps,
        warmup_from=learning.warmup_from,
        total_steps=learning.steps,
        cosine_to=learning.cosine_to,
    )


def ramp(step: int, *, start: float, steps: int) -> float:
    """A factor that falls (or rises) in a line from `start` at step 0 to 1 at step `steps`, and stays there."""
    return start + (1 - start) * min(1.0, step / steps) if steps > 0 else 1.0


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
    """Groups for AdamW of the parameters that learn, in the order of `named_parameters`.

    With "matrices" only the weights of linear and convolution layers decay; norms, biases, factors per channel and
    embeddings do not.  With "all" everything does, as in the reference."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in EMBEDDINGS
        (decayed if decay == "all" or is_matrix else kept).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}]
    return [*groups, {"params": kept, "weight_decay": 0.0}] if kept else groups


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of the gradients of all parameters together, fp32."""
    norms = [torch.linalg.vector_norm(each.grad, dtype=torch.float32) for each in parameters if each.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together to a norm of at most `max_norm`, 0 for no limit; returns the norm before that."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    if max_norm > 0:
        # A tensor throughout: nothing waits for the device.
        scale = (max_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
        for each in parameters:
            if each.grad is not None:
                each.grad.mul_(scale.to(each.grad))
    return norm
