"""The moving average of a model's parameters, which is the model that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from schemas.errors import CheckpointError


class MovingAverage:
    """Averages parameters, never buffers: an integer buffer has no average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with a copy of the model's parameters in fp32."""
        self.decay = decay
        self.num_updates = 0
        self._values = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters as they are now.

        The decay grows as (1 + n) / (10 + n) up to its value, so that the random start is soon forgotten."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = [parameter.detach().float() for _, parameter in model.named_parameters()]
        torch._foreach_lerp_(list(self._values.values()), current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged parameters for a while; its own come back bit for bit."""
        parameters = dict(model.named_parameters())
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _copy(self._values, parameters)
        try:
            yield
        finally:
            _copy(own, parameters)

    def state(self) -> dict[str, Tensor]:
        """The averages by name of the parameter."""
        return dict(self._values)

    def load(self, values: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from `state()` after `num_updates`; raises CheckpointError where the names differ."""
        if values.keys() != self._values.keys():
            raise CheckpointError("The training state holds the moving average of another model.")
        _copy(values, self._values)
        self.num_updates = num_updates


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
