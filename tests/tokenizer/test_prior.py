"""The prior is a probability, looks at nothing that comes later, and is the same step by step."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CheckpointError, SpecError
from tests.tiny_priors import random_bits, tiny_prior
from tokenizer.checkpoint import weight_sha256
from tokenizer.codes import bits_to_groups, indices_to_bits
from tokenizer.prior_checkpoint import build_prior, prior_config, read_prior, save_prior
from tokenizer.prior_config import PriorConfig
from tokenizer.prior_steps import PriorSteps


def log_prob_by_steps(prior, bits):
    """The same as `log_prob`, one symbol after another."""
    num_clips, num_frames = bits.shape[:2]
    symbols_BMG = bits_to_groups(bits.flatten(1, 3), prior.config.group_size)
    steps = PriorSteps(prior, num_clips, num_frames)
    sums_BM = torch.zeros(symbols_BMG.shape[:2])
    before = None
    for token in range(symbols_BMG.shape[1]):
        for group in range(symbols_BMG.shape[2]):
            before_step = steps.step(before).log_softmax(-1)
            before = symbols_BMG[:, token, group]
            sums_BM[:, token] += before_step.gather(1, before[:, None])[:, 0]
    return sums_BM.view(bits.shape[:4])


sizes = st.fixed_dictionaries(
    {
        "grid": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "max_frames": st.integers(1, 4),
        "context_frames": st.integers(1, 5),
        "layers": st.integers(1, 2),
        "seed": st.integers(0, 9),
    }
)


@settings(max_examples=12)
@given(sizes, st.sampled_from([(1, 1), (6, 3), (18, 9), (7, 7), (64, 4)]), st.data())
def test_steps_give_the_probabilities_of_the_whole(given_sizes, bits_and_group, data):
    bits_per_token, group_size = bits_and_group
    prior = tiny_prior(bits_per_token=bits_per_token, group_size=group_size, sharpness=0.5, **given_sizes)
    bits = random_bits(prior, 2, data.draw(st.integers(1, given_sizes["max_frames"])))
    whole = prior.log_prob(bits)
    assert torch.allclose(whole, log_prob_by_steps(prior, bits), rtol=1e-4, atol=1e-4)
    assert whole.shape == bits.shape[:4]


@pytest.mark.parametrize("place", [0, 5, 17])
def test_no_probability_depends_on_what_comes_later(place):
    prior = tiny_prior(bits_per_token=6, group_size=2, layers=2)
    bits = random_bits(prior, 1, 3)
    before = prior.log_prob(bits).flatten()
    for bit in range(6):
        changed = bits.clone().view(1, -1, 6)
        changed[:, place, bit] ^= True
        after = prior.log_prob(changed.view(bits.shape)).flatten()
        assert torch.equal(after[:place], before[:place])
        assert after[place] != before[place]
        if place + 1 < len(before):
            assert not torch.equal(after[place + 1 :], before[place + 1 :])


def test_a_group_is_predicted_from_earlier_groups_alone():
    prior = tiny_prior(bits_per_token=6, group_size=2)
    steps = [PriorSteps(prior, 1, 1) for _ in range(2)]
    first = [each.step(None) for each in steps]
    assert torch.equal(*first)
    second = [each.step(torch.tensor([symbol])) for each, symbol in zip(steps, (0, 3), strict=True)]
    assert not torch.equal(*second)


def test_probabilities_of_all_tokens_sum_up_to_one():
    prior = tiny_prior(bits_per_token=6, group_size=2, grid=(1, 2), max_frames=1)
    tokens = indices_to_bits(torch.arange(64), 6)
    bits = torch.stack([tokens[41].expand(64, 6), tokens], 1).view(64, 1, 1, 2, 6)
    assert prior.log_prob(bits)[..., 1].double().exp().sum() == pytest.approx(1, abs=1e-5)


def test_the_beginning_of_a_clip_has_the_probabilities_of_the_clip():
    prior = tiny_prior(context_frames=1, layers=2)
    bits = random_bits(prior, 2, 3)
    assert torch.allclose(prior.log_prob(bits[:, :2]), prior.log_prob(bits)[:, :2], atol=1e-5)


def test_context_ends_where_it_is_said_to():
    prior = tiny_prior(context_frames=1, layers=1, grid=(2, 2), max_frames=3)
    bits = random_bits(prior, 1, 3)
    changed = bits.clone()
    changed[:, 0, 0, 0] ^= True
    same = prior.log_prob(bits).flatten() == prior.log_prob(changed).flatten()
    # Token 4 still has token 0 as its neighbour in time, and 5 to 7 see what predicted token 4, and token 1.
    assert not same[4] and bool(same[9:].all())


def test_a_prior_comes_back_from_its_folder(tmp_path):
    prior = tiny_prior(tokenizer_sha256="ab" * 32)
    save_prior(prior, tmp_path / "prior", card="what it is")
    files = read_prior(tmp_path / "prior")
    loaded = build_prior(files)
    assert loaded.config == prior_config(files) and loaded.config.trained
    assert loaded.config.tokenizer_sha256 == "ab" * 32
    half = {name: value.half() for name, value in prior.state_dict().items()}
    assert files.weight_sha256() == weight_sha256(half)
    assert all(torch.equal(value, half[name].float()) for name, value in loaded.state_dict().items())


def test_what_is_no_prior_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no prior 'prior-smal'.*untrained:prior-small"):
        read_prior("prior-smal")
    with pytest.raises(CheckpointError, match="no config of a prior"):
        prior_config(read_prior("untrained:prior-tiny")._replace(config_json=b"{}"))
    save_prior(tiny_prior(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 32}))
    with pytest.raises(CheckpointError, match="the weights do not fit the config"):
        build_prior(read_prior(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "layerz": 3}))
    with pytest.raises(CheckpointError, match=r"unknown key 'layerz'.*'layers'"):
        build_prior(read_prior(tmp_path))
    with pytest.raises(SpecError, match="group_size"):
        PriorConfig(bits_per_token=18, group_size=5)
    with pytest.raises(SpecError, match=r"expected bool \[batch, frames, 2, 3, 18\]"):
        tiny_prior().log_prob(torch.zeros(1, 1, 3, 2, 18, dtype=torch.bool))
    with pytest.raises(SpecError, match="a clip has 4 frames; this prior takes 1 to 3"):
        prior = tiny_prior()
        prior.log_prob(random_bits(prior, 1, 4))


def test_the_shipped_sizes_fit_the_package():
    assert len(read_prior("untrained:prior-small").model_safetensors) < 12_000_000
