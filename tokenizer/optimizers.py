"""Which optimiser learns which parameters.

AdamW learns everything, or Muon (Jordan et al. 2024) the matrices of the transformers' blocks and AdamW the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from schemas.errors import SpecError
from tokenizer.schedule import parameter_groups
from tokenizer.train_config import LearningPart

RATE_FACTOR = "rate_factor"
"""Entry of a parameter group: its learning rate as a multiple of the schedule's."""


class Optimizers:
    """One or more of torch's optimisers over different parameters, stepped and saved as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    def set_learning_rate(self, rate: float) -> None:
        """Give every group `rate`, times its factor where it has one."""
        for group in self.param_groups:
            group["lr"] = rate * group.get(RATE_FACTOR, 1.0)

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def moments(self) -> dict[int, dict[str, Any]]:
        """What is remembered of each parameter, by its number over all parts."""
        joined: dict[int, dict[str, Any]] = {}
        for first, part in zip(self._first_numbers(), self._parts, strict=True):
            joined |= {first + number: values for number, values in part.state_dict()["state"].items()}
        return joined

    def load_moments(self, moments: Mapping[int, Mapping[str, Any]]) -> None:
        """Put `moments` back; settings stay those of this run."""
        firsts = [*self._first_numbers(), sum(len(group["params"]) for group in self.param_groups)]
        for number, part in enumerate(self._parts):
            first, end = firsts[number], firsts[number + 1]
            state = {each - first: values for each, values in moments.items() if first <= each < end}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})

    def _first_numbers(self) -> Sequence[int]:
        sizes = [sum(len(group["params"]) for group in part.param_groups) for part in self._parts]
        return [sum(sizes[:number]) for number in range(len(sizes))]


def make_optimizers(module: nn.Module, settings: LearningPart, *, may_use_muon: bool = True) -> Optimizers:
    """The optimisers of one network.  Raises SpecError for Muon with a torch that has none."""
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    groups = parameter_groups(module, settings.weight_decay, settings.decay)
    if settings.method == "adamw" or not may_use_muon:
        return Optimizers(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings.eps))
    if not hasattr(torch.optim, "Muon"):
        raise SpecError(
            f"optimizer.method is 'muon', which torch {torch.__version__} does not have. Install torch 2.9 or newer, "
            "or set it to adamw."
        )
    learning = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
    hidden = [each for name, each in learning if ".blocks." in f".{name}" and each.ndim == 2]
    chosen = {id(each) for each in hidden}
    rest = [{**group, "params": [each for each in group["params"] if id(each) not in chosen]} for group in groups]
    muon = torch.optim.Muon(
        hidden,
        lr=rate,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for group in muon.param_groups:
        group[RATE_FACTOR] = settings.muon_rate_factor
    adamw = torch.optim.AdamW([group for group in rest if group["params"]], lr=rate, betas=betas, eps=settings.eps)
    return Optimizers(muon, adamw)
