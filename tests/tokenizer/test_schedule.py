"""Schedules, groups and clipping do what the config says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tokenizer.schedule import clip_gradients, gradient_norm, learning_rate_factor, parameter_groups, ramp

PAPER = {"warmup_steps": 5000, "warmup_from": 0.1, "total_steps": 1_000_000, "cosine_to": 0.5}


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.1), (2500, 0.55), (5000, 1.0), (502_500, 0.75), (1_000_000, 0.5), (2_000_000, 0.5)],
)
def test_the_papers_learning_rate(step, factor):
    assert learning_rate_factor(step, **PAPER) == pytest.approx(factor)


def test_the_learning_rate_has_no_jump():
    factors = [
        learning_rate_factor(step, warmup_steps=20, warmup_from=0.0, total_steps=200, cosine_to=0.0)
        for step in range(201)
    ]
    assert max(abs(b - a) for a, b in itertools.pairwise(factors)) <= 0.05 + 1e-9
    assert factors[0] == 0 and factors[200] == pytest.approx(0)


def test_the_entropy_ramp_falls_in_a_line():
    assert [ramp(step, start=3.0, steps=2000) for step in (0, 1000, 2000, 9999)] == [3.0, 2.0, 1.0, 1.0]
    assert ramp(0, start=3.0, steps=0) == 1.0


def test_norms_biases_and_embeddings_do_not_decay_unless_asked(tiny):
    decayed, kept = parameter_groups(tiny, 0.1)
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    assert all("norm" not in names[id(each)] and names[id(each)].endswith("weight") for each in decayed["params"])
    assert {names[id(each)].rpartition(".")[2] for each in kept["params"]} == {"bias", "weight", "position", "temporal"}
    assert all("norm" in names[id(each)] for each in kept["params"] if names[id(each)].endswith("weight"))
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    (everything,) = parameter_groups(tiny, 0.1, "all")
    assert len(everything["params"]) == len(names)


def test_clipping_scales_all_gradients_together_and_tells_the_norm_before():
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    unused = torch.nn.Parameter(torch.zeros(1))
    assert gradient_norm([first, second, unused]).item() == 5.0
    assert clip_gradients([first, second, unused], 1.0).item() == 5.0
    assert torch.allclose(first.grad, torch.tensor([0.6, 0.0])) and torch.allclose(second.grad, torch.tensor([0.8]))
    assert clip_gradients([first, second], 10.0).item() == pytest.approx(1.0)  # under the limit: untouched
    assert torch.allclose(second.grad, torch.tensor([0.8]))
    first.grad, second.grad = torch.tensor([math.inf, 0.0]), torch.tensor([1.0])
    assert clip_gradients([first, second], 1.0).item() == math.inf


def test_a_limit_of_zero_does_not_clip():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([7.0])
    assert clip_gradients([parameter], 0).item() == 7.0
    assert parameter.grad.item() == 7.0
