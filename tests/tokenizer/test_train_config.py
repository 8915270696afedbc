"""Settings of a training run: mistakes are one line, and nothing is lost on the way through JSON."""

from __future__ import annotations

import json

import pytest

from schemas.errors import SpecError
from tokenizer.train_config import RECIPES, train_config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimiser": {}}, r"unknown key 'optimiser'. Did you mean 'optimizer'\?"),
        ({"losses": {"lpip_weight": 1}}, r"unknown key 'losses.lpip_weight'. Did you mean 'lpips_weight'\?"),
        ({"losses": {"quantizer": {"gama": 1}}}, r"'losses.quantizer.gama'. Did you mean 'gamma'\?"),
        ({"recipe": "small"}, r"no recipe 'small'; .*Did you mean 'small-cpu'\?"),
        ({"optimizer": {"steps": 0}}, "optimizer.steps is 0; it must be at least 1"),
        ({"optimizer": {"steps": True}}, "optimizer.steps is True; it must be a whole number"),
        ({"losses": {"reconstruction": "l2"}}, "losses.reconstruction is 'l2'; valid: l1, mse"),
        ({"sampling": {"crop_scale": [0.9, 0.2]}}, r"crop_scale is \[0.9, 0.2\]"),
        ({"losses": {"own_bits_from": 1.5}}, "losses.own_bits_from is 1.5; it must be from 0 to 1"),
        ({"sampling": {"colour_detail": -0.1}}, "sampling.colour_detail is -0.1; it must be from 0 to 1"),
        ({"recipe": "paper"}, "lpips_folder names no weights.*recipe no-lpips"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(values, words):
    with pytest.raises(SpecError, match=words) as refusal:
        train_config({"recipe": "no-lpips", **values})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_survive_json(recipe):
    config = train_config({"recipe": recipe, "losses": {"lpips_folder": "weights"}})
    assert train_config(json.loads(json.dumps(config.to_json_dict()))) == config


def test_the_papers_recipe_has_the_papers_numbers():
    config = train_config({"losses": {"lpips_folder": "weights"}})
    losses, optimizer = config.losses, config.optimizer
    weights = (losses.reconstruction_weight, losses.lpips_weight, losses.adversarial_weight, losses.entropy_weight)
    assert (losses.reconstruction, weights) == ("l1", (1.0, 0.1, 0.1, 0.1))
    assert (losses.r1_weight, losses.r1_every, losses.entropy_start, losses.entropy_ramp_steps) == (10, 16, 3, 2000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.99, 1e-8, 1e-4)
    assert (optimizer.learning_rate, optimizer.per_sample, optimizer.ema) == (4e-7, True, 0.999)
    assert (optimizer.warmup_steps, optimizer.warmup_from, optimizer.cosine_to) == (5000, 0.1, 0.5)
