"""The masked model does not see what is masked, and its samples are a function of seed, number and label."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CheckpointError, SpecError
from tests.tiny_generators import random_tokens, tiny_generator
from tokenizer.codes import bits_to_groups
from tokenizer.generator_checkpoint import build_generator, read_generator, save_generator
from tokenizer.generator_config import GeneratorConfig
from tokenizer.generator_train import random_masks
from tokenizer.unmasking import KeptTokens, SamplingOptions, masked_share, sample_tokens

CLASSES = ("dress", "hat", "shoes")

sizes = st.sampled_from([(1, 1), (6, 3), (18, 9), (7, 7), (64, 8)])
grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


def masks_of(model, batch, share, seed=0):
    config = model.config
    return random_masks(
        torch.full((batch,), share), config.grid, config.num_groups, torch.Generator().manual_seed(seed)
    )


@settings(max_examples=15)
@given(sizes, grids, st.floats(0, 1), st.integers(0, 99))
def test_what_is_masked_makes_no_difference_and_what_is_not_does(bits_and_group, grid, share, seed):
    bits_per_token, group_size = bits_and_group
    model = tiny_generator(bits_per_token=bits_per_token, group_size=group_size, grid=grid)
    bits, masked = random_tokens(model, 2, seed), masks_of(model, 2, share, seed)
    labels = torch.tensor([0, model.config.no_label])
    logits = model(bits, masked, labels)
    assert logits.shape == (2, *grid, bits_per_token // group_size, 1 << group_size)
    hidden = masked.repeat_interleave(group_size, -1)
    assert torch.equal(model(bits ^ hidden, masked, labels), logits)
    if not masked.all():
        assert not torch.equal(model(bits ^ ~hidden, masked, labels), logits)


def test_every_token_sees_every_other_and_the_label():
    model = tiny_generator(grid=(2, 3))
    bits, masked = random_tokens(model, 1), torch.zeros(1, 2, 3, 2, dtype=torch.bool)
    before = model(bits, masked, torch.tensor([0]))
    for place in range(6):
        changed = bits.clone().view(1, 6, -1)
        changed[0, place, 5] ^= True
        after = model(changed.view(bits.shape), masked, torch.tensor([0]))
        assert (after != before).flatten(3).any(-1).all()
    assert (model(bits, masked, torch.tensor([1])) != before).flatten(3).any(-1).all()


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), grids, st.integers(1, 3))
def test_a_mask_has_the_share_that_is_asked_for(shares, grid, groups):
    masked = random_masks(torch.tensor(shares, dtype=torch.float64), grid, groups, torch.Generator().manual_seed(0))
    units = grid[0] * grid[1] * groups
    assert masked.flatten(1).sum(1).tolist() == [max(1, -int(-share * units // 1)) for share in shares]


def test_masks_begin_whole_and_end_empty():
    shares = masked_share(torch.linspace(0, 1, 5))
    assert shares[0] == 1 and abs(float(shares[-1])) < 1e-15 and bool((shares.diff() < 0).all())
    assert float(shares[2]) == pytest.approx(2**-0.5)


OPTIONS = SamplingOptions(steps=5, guidance=1.5, noise=2.0)


def test_samples_are_a_function_of_their_arguments():
    model = tiny_generator(classes=CLASSES)
    torch.manual_seed(1)
    labels = [0, 1, 2, model.config.no_label]
    drawn = sample_tokens(model, labels, 7, OPTIONS)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(sample_tokens(model, labels, 7, OPTIONS), drawn)
    torch.manual_seed(1)
    sample_tokens(model, labels, 7, OPTIONS)
    assert torch.equal(torch.get_rng_state(), state), "the generator of torch is left alone"
    assert not torch.equal(sample_tokens(model, labels, 8, OPTIONS), drawn)
    assert drawn.shape == (4, *model.config.grid, model.config.bits_per_token) and drawn.dtype == torch.bool


def test_a_batch_is_its_samples_one_by_one():
    model = tiny_generator(classes=CLASSES, width=48, layers=2)
    labels = [2, 0, 1, 3, 2]
    whole = sample_tokens(model, labels, 3, OPTIONS)
    for number, label in enumerate(labels):
        assert torch.equal(sample_tokens(model, [label], 3, OPTIONS, first=number)[0], whole[number])
    assert not torch.equal(whole[0], whole[4]), "the same label twice gives two samples"
    assert sample_tokens(model, [], 3).shape == (0, *whole.shape[1:])


def test_samples_that_are_computed_together_are_the_same_but_for_rounding():
    """In fp64, where the last digit decides nothing: what a GPU does with a batch."""
    model = tiny_generator(classes=CLASSES, layers=2).double()
    labels = [2, 0, 1, 3, 2]
    alone = sample_tokens(model, labels, 3, OPTIONS)
    kept = KeptTokens(alone[0], torch.tensor([[True, False, True], [False, False, True]]))
    assert torch.equal(sample_tokens(model, labels, 3, OPTIONS, at_once=3), alone)
    around = sample_tokens(model, labels, 4, OPTIONS, around=kept)
    assert torch.equal(sample_tokens(model, labels, 4, OPTIONS, around=kept, at_once=5), around)


@settings(max_examples=15)
@given(st.data(), st.integers(1, 40), st.sampled_from(["constant", "linear", "cosine"]))
def test_what_is_kept_is_kept_and_the_rest_is_drawn(data, steps, schedule):
    model = tiny_generator()
    grid = model.config.grid
    bits = random_tokens(model, 1)[0]
    flags = data.draw(st.lists(st.booleans(), min_size=6, max_size=6))
    kept = torch.tensor(flags).view(grid)
    options = SamplingOptions(steps=steps, guidance_schedule=schedule)
    drawn = sample_tokens(model, [0, 0], 1, options, around=KeptTokens(bits, kept))
    assert torch.equal(drawn[:, kept], bits[kept].expand(2, -1, -1))
    # What is drawn does not depend on what stood there.
    other = KeptTokens(bits ^ ~kept.unsqueeze(-1), kept)
    assert torch.equal(sample_tokens(model, [0, 0], 1, options, around=other), drawn)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_without_temperature_and_noise_a_sample_is_the_likeliest(guidance):
    """One step: each symbol is the maximum of its guided distribution, whatever the seed."""
    model = tiny_generator()
    nothing = torch.zeros(1, *model.config.grid, model.config.bits_per_token, dtype=torch.bool)
    masked = torch.ones(1, *model.config.grid, model.config.num_groups, dtype=torch.bool)
    with_label, without = (model(nothing, masked, torch.tensor([label])) for label in (1, model.config.no_label))
    likeliest = (with_label + guidance * (with_label - without)).argmax(-1)
    assert guidance == 0 or not torch.equal(likeliest, with_label.argmax(-1))
    for seed in range(3):
        options = SamplingOptions(steps=1, guidance=guidance, temperature=0.0, noise=0.0)
        drawn = sample_tokens(model, [1], seed, options)
        assert torch.equal(bits_to_groups(drawn, model.config.group_size), likeliest)


def test_one_step_draws_from_the_distribution_of_the_model():
    """Chi-squared of the symbols of 4,000 samples of one token against the softmax: 7 degrees of freedom."""
    model = tiny_generator(bits_per_token=3, group_size=3, grid=(1, 1))
    drawn = sample_tokens(model, [0] * 4000, 0, SamplingOptions(steps=1, guidance=0.0))
    counts = (drawn.flatten(1).long() * torch.tensor([4, 2, 1])).sum(-1).bincount(minlength=8)
    logits = model(
        torch.zeros(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.tensor([0])
    )
    expected = logits.flatten().softmax(0) * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # one in a thousand


def test_guidance_grows_by_its_schedule():
    at = {
        name: [SamplingOptions(steps=5, guidance=2.0, guidance_schedule=name).guidance_at(step) for step in range(5)]
        for name in ("constant", "linear", "cosine")
    }
    assert at["constant"] == [2.0] * 5 and at["linear"] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert at["cosine"] == pytest.approx([0.0, 0.29289, 1.0, 1.70711, 2.0], abs=1e-4)
    assert SamplingOptions(steps=1).guidance_at(0) == 2.0


def test_a_generator_comes_back_from_its_folder(tmp_path):
    model = tiny_generator(classes=CLASSES, tokenizer_sha256="ab" * 32)
    save_generator(model, tmp_path, card="what it is")
    loaded = build_generator(read_generator(tmp_path))
    assert loaded.config.classes == CLASSES and loaded.config.trained and not loaded.training
    assert loaded.config.tokenizer_sha256 == "ab" * 32
    half = {name: value.half().float() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, half[name]) for name, value in loaded.state_dict().items())


def test_what_is_no_generator_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no generator 'generator-smal'; .*Did you mean 'generator-small'"):
        read_generator("untrained:generator-smal")
    save_generator(tiny_generator(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model": "prior"}, "no config of a generator"),
        ({"width": 32}, "the weights do not fit the config"),
        ({"layerz": 3}, r"unknown key 'layerz'.*'layers'"),
        ({"classes": ["hat", "hat"]}, "classes names 'hat' twice"),
        ({"classes": [3]}, "a name is text"),
        ({"group_size": 5}, "not a multiple of group_size"),
        ({"grid": [0, 4]}, "grid is 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            build_generator(read_generator(tmp_path))
    with pytest.raises(CheckpointError):
        read_generator(tmp_path / "absent")


def test_a_wrong_class_names_the_nearest():
    config = GeneratorConfig(classes=CLASSES)
    assert [config.label(name) for name in CLASSES] == [0, 1, 2] and config.no_label == 3
    with pytest.raises(SpecError, match=r"no class 'shoe'. Did you mean 'shoes'\? The classes are dress, hat, shoes"):
        config.label("shoe")
    with pytest.raises(SpecError, match=r"no class 'hat': these weights know none"):
        GeneratorConfig().label("hat")


def test_arguments_that_cannot_be_are_refused():
    model = tiny_generator()
    bits = random_tokens(model, 1)
    masked = torch.zeros(1, 2, 3, 2, dtype=torch.bool)
    with pytest.raises(SpecError, match=r"bits are torch.bool of shape \[1, 3, 2, 6\]; expected .*\[1, 2, 3, 6\]"):
        model(bits.view(1, 3, 2, 6), masked, torch.tensor([0]))
    with pytest.raises(SpecError, match=r"masks are torch.float32"):
        model(bits, masked.float(), torch.tensor([0]))
    with pytest.raises(SpecError, match=r"label is 9; it must be a whole number from 0 to 3"):
        sample_tokens(model, [9], 0)
    with pytest.raises(SpecError, match="kept tokens are"):
        sample_tokens(model, [0], 0, around=KeptTokens(bits[0], masked[0]))
    for wrong, message in (({"steps": 0}, "steps is 0"), ({"noise": -1.0}, "noise is -1.0; it must be at least 0")):
        with pytest.raises(SpecError, match=message):
            SamplingOptions(**wrong)
