"""The discriminator can be learnt, differentiated twice, and sees the variety of a batch."""

from __future__ import annotations

import pytest
import torch

from schemas.errors import SpecError
from tokenizer.discriminator import Blur, Discriminator, group_deviation
from tokenizer.losses import discriminator_loss


def test_it_learns_to_tell_rows_from_columns(generator):
    model = Discriminator(16, channels=16, max_channels=32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(40):
        stripes = torch.rand(8, 3, 16, 1, generator=generator).expand(8, 3, 16, 16) * 2 - 1
        loss = discriminator_loss(model(stripes), model(stripes.mT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 1.0 < losses[0]


def test_weights_have_unit_variance_and_activations_keep_theirs(generator):
    model = Discriminator(32, channels=32, max_channels=64)
    weights = torch.cat([each.flatten() for name, each in model.named_parameters() if name.endswith("weight")])
    assert weights.std().item() == pytest.approx(1, abs=0.02)
    features = model.from_rgb(torch.randn(8, 3, 32, 32, generator=generator))
    assert features.std().item() == pytest.approx(1, abs=0.25)
    assert 0.2 < model.blocks(features).std().item() < 3


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (Discriminator(8, channels=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.from_rgb.weight, again.from_rgb.weight)
    assert not torch.equal(first.from_rgb.weight, other.from_rgb.weight)


def test_blur_keeps_a_constant_and_removes_a_checkerboard():
    blur = Blur((1, 1))
    assert torch.allclose(blur(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1], torch.ones(1, 2, 5, 5))
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert blur(checkerboard[None, None])[..., 1:-1, 1:-1].abs().max() < 1e-6


def test_deviation_is_that_of_neighbours_in_groups_of_at_most_four():
    same = torch.ones(4, 1, 2, 2)
    mixed = torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None, None, None].expand(4, 1, 2, 2)
    deviation = group_deviation(torch.cat([same, mixed]))
    assert deviation.shape == (8, 1, 2, 2)
    assert deviation[:4].max() < 1e-3
    assert torch.allclose(deviation[4:], torch.ones(4, 1, 2, 2))  # of 0, 0, 2, 2
    assert group_deviation(torch.rand(7, 3, 2, 2)).shape == (7, 1, 2, 2)


@pytest.mark.parametrize("size", [4, 24, 100])
def test_a_size_that_cannot_be_halved_to_four_is_refused(size):
    with pytest.raises(SpecError, match=f"image_size is {size}; .*power of 2"):
        Discriminator(size)
