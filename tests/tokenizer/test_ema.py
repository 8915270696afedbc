"""The moving average: parameters only, quick at first, exact to restore."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from schemas.errors import CheckpointError
from tokenizer.ema import MovingAverage


def test_the_first_updates_follow_the_warm_up_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = MovingAverage(model, 0.999)
    expected = 0.0
    for number in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(number))
        average.update(model)
        decay = (1 + number) / (10 + number)  # 2/11, 3/12, 4/13
        expected = decay * expected + (1 - decay) * number
    assert average.state()["weight"].item() == pytest.approx(expected, rel=1e-6)
    for _ in range(20_000):
        average.update(model)
    assert average.state()["weight"].item() == pytest.approx(3.0, rel=1e-4)


def test_buffers_are_not_averaged():
    average = MovingAverage(nn.BatchNorm1d(3), 0.9)
    assert average.state().keys() == {"weight", "bias"}


def test_applied_gives_the_model_its_own_weights_back_bit_for_bit_even_after_an_error(generator):
    model = nn.Linear(3, 2)
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 3, generator=generator))
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied(model):
        assert torch.equal(model.weight, average.state()["weight"])
        raise RuntimeError
    assert torch.equal(model.weight, own)


def test_a_loaded_average_goes_on_as_if_never_saved(generator):
    model = nn.Linear(3, 2)
    average = MovingAverage(model, 0.99)
    average.update(model)
    state = {name: value.clone() for name, value in average.state().items()}
    other = MovingAverage(nn.Linear(3, 2), 0.99)
    other.load(state, average.num_updates)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model)
    other.update(model)
    assert torch.equal(average.state()["weight"], other.state()["weight"])
    with pytest.raises(CheckpointError, match="of another model"):
        MovingAverage(nn.Linear(3, 2, bias=False), 0.9).load(state, 1)
