from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny_training import CPU, settings
from tokenizer.optimizers import make_optimizers
from tokenizer.train_step import starting_model


def learnt(method: str, steps: int = 3):
    config = settings("small-cpu", optimizer={"method": method, "weight_decay": 0.01})
    model = starting_model(config, CPU)
    optimizers = make_optimizers(model, config.optimizer)
    optimizers.set_learning_rate(1e-3)
    for step in range(steps):
        update(model, optimizers, step)
    return model, optimizers, config


def update(model, optimizers, step):
    generator = torch.Generator().manual_seed(step)
    for each in model.parameters():
        each.grad = torch.randn(each.shape, generator=generator)
    optimizers.step()
    optimizers.zero_grad()


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_every_parameter_is_learnt_by_exactly_one_optimiser(method):
    model, optimizers, _ = learnt(method, steps=0)
    numbered = [id(each) for group in optimizers.param_groups for each in group["params"]]
    assert sorted(numbered) == sorted(id(each) for each in model.parameters())


def test_muon_moves_a_matrix_by_as_much_in_every_direction():
    before = {name: each.clone() for name, each in learnt("muon", steps=0)[0].named_parameters()}
    model, _, config = learnt("muon", steps=1)
    rate = 1e-3 * config.optimizer.muon_rate_factor
    for name, each in model.named_parameters():
        if ".blocks." in name and each.ndim == 2:
            moved = before[name] * (1 - rate * config.optimizer.weight_decay) - each
            values = torch.linalg.svdvals(moved) / (rate * 0.2 * max(each.shape) ** 0.5)
            # A square random matrix has directions that five steps of Newton-Schulz do not bring up to size.
            assert values.quantile(0.1) > 0.6 and values.max() < 1.4, name


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_moments_that_are_saved_and_loaded_make_the_same_updates(method):
    model, optimizers, config = learnt(method)
    other = starting_model(config, CPU)
    other.load_state_dict(model.state_dict())
    resumed = make_optimizers(other, config.optimizer)
    resumed.load_moments(copy.deepcopy(optimizers.moments()))
    resumed.set_learning_rate(1e-3)
    update(model, optimizers, 9)
    update(other, resumed, 9)
    for (name, value), again in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, again), name
