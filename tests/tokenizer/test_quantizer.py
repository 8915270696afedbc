from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SpecError
from tokenizer.codes import bits_to_indices, indices_to_bits
from tokenizer.config import QuantizerLossConfig
from tokenizer.losses import quantizer_loss
from tokenizer.quantizer import BinarySphericalQuantizer

SCALAR_TOLERANCE = 2e-5


def sphere(quantizer, *values):
    return quantizer.project(torch.tensor(values, dtype=torch.float32))


class TestGolden:
    def test_losses(self, golden):
        expected = golden.expected
        losses = golden.model.quantizer(expected["latents"]).losses
        total, codebook_entropy = quantizer_loss(losses, golden.model.quantizer.loss_config)
        for ours, theirs in (
            (losses.sample_entropy, "persample_entropy"),
            (codebook_entropy, "codebook_entropy"),
            (losses.commit, "commit_loss"),
            (total, "quant_loss_total"),
            (losses.mean_assignment, "avg_prob"),
        ):
            torch.testing.assert_close(ours, expected[theirs], rtol=1e-5, atol=SCALAR_TOLERANCE)

        distance = with_losses(golden.model.quantizer, beta=1.0)(expected["latents"]).losses.commit
        torch.testing.assert_close(distance, expected["commit_distance"], rtol=1e-5, atol=SCALAR_TOLERANCE)
        # The reference trains with a beta of 0.25 whatever its config says.
        as_is = total_loss(with_losses(golden.model.quantizer, beta=0.25), expected["latents"])
        torch.testing.assert_close(as_is, expected["quant_loss_total_as_is"], rtol=1e-5, atol=SCALAR_TOLERANCE)

    def test_gradients(self, golden):
        expected = golden.expected
        if "grad_quant_loss" in expected:
            theirs = expected["grad_quant_loss"]
            ours = gradient(golden.model.quantizer, expected["latents"], torch.zeros_like(expected["probe"]))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
        for name, quantizer in (
            ("grad_latents", golden.model.quantizer),
            ("grad_latents_as_is", with_losses(golden.model.quantizer, beta=0.25)),
        ):
            if name in expected:
                ours = gradient(quantizer, expected["latents"], expected["probe"])
                torch.testing.assert_close(ours, expected[name], rtol=0, atol=1e-6)


class TestError:
    @pytest.mark.parametrize("num_bits", [2, 3, 9, 18, 36, 64])
    def test_distance_to_the_code_is_bounded_everywhere(self, num_bits):
        """Paper section 3.1: |u - code| <= sqrt(2 - 2 / sqrt(L)), reached where one channel is alone."""
        quantizer = BinarySphericalQuantizer(num_bits, group_size=1)
        generator = torch.Generator().manual_seed(num_bits)
        axes = torch.eye(num_bits)
        corners = torch.where(torch.rand(64, num_bits, generator=generator) > 0.5, 1.0, -1.0)
        vectors = torch.cat(
            [
                axes,
                -axes,
                axes + 1e-20,
                axes - 1e-20,
                corners,
                torch.randn(4096, num_bits, generator=generator),
                torch.randn(4096, num_bits, generator=generator) ** 5,
                1e18 * axes,
                1e-9 * axes,
            ]
        )
        latents = quantizer.project(vectors)
        codes = quantizer.to_codes(quantizer.to_bits(latents))
        distances = (latents - codes).norm(dim=-1)
        bound = math.sqrt(2 - 2 / math.sqrt(num_bits))
        assert bound < math.sqrt(2)
        assert distances.max() <= bound + 1e-6
        torch.testing.assert_close(distances[:num_bits], torch.full((num_bits,), bound), rtol=0, atol=1e-6)
        ties = 2 * num_bits * 2
        torch.testing.assert_close(distances[ties : ties + 64], torch.zeros(64), rtol=0, atol=1e-6)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=64))
    def test_distance_is_bounded_for_any_vector(self, values):
        quantizer = BinarySphericalQuantizer(len(values), group_size=1)
        latent = sphere(quantizer, *values)
        if latent.norm() > 0.999:
            code = quantizer.to_codes(quantizer.to_bits(latent))
            assert (latent - code).norm() <= math.sqrt(2 - 2 / math.sqrt(len(values))) + 1e-5

    def test_the_code_is_the_nearest_of_the_codebook(self, generator):
        quantizer = BinarySphericalQuantizer(8, group_size=4)
        codebook_KL = quantizer.to_codes(indices_to_bits(torch.arange(256), 8))
        latents_BL = quantizer.project(torch.randn(500, 8, generator=generator))
        nearest = torch.cdist(latents_BL, codebook_KL).argmin(1)
        assert torch.equal(bits_to_indices(quantizer.to_bits(latents_BL)), nearest)


class TestBits:
    def test_zero_minus_zero_and_nan_give_a_zero_bit(self):
        quantizer = BinarySphericalQuantizer(4, group_size=2)
        bits = quantizer.to_bits(torch.tensor([0.0, -0.0, float("nan"), 1e-45]))
        assert bits.tolist() == [False, False, False, True]

    def test_codes_have_the_value_of_their_bits(self, generator):
        for unit in (True, False):
            quantizer = BinarySphericalQuantizer(18, post_q_l2_norm=unit)
            latents = quantizer.project(1e4 * torch.randn(3, 7, 18, generator=generator)).requires_grad_()
            made = quantizer(latents)
            magnitude = torch.tensor(18**-0.5 if unit else 1.0)
            assert torch.equal(made.codes, torch.where(made.bits, magnitude, -magnitude))

    def test_everything_stays_in_fp32_under_autocast(self, generator):
        quantizer = BinarySphericalQuantizer(18)
        latents = quantizer.project(torch.randn(2, 5, 18, generator=generator))
        with torch.autocast("cpu", torch.bfloat16):
            inside = quantizer(latents)
        outside = quantizer(latents)
        assert inside.codes.dtype == torch.float32
        for name, value in inside.losses._asdict().items():
            assert value.dtype == torch.float32 and torch.equal(value, getattr(outside.losses, name)), name


class TestStraightThrough:
    @pytest.mark.parametrize(("convention", "slope"), [("scaled", 18**-0.5), ("identity", 1.0)])
    def test_a_code_takes_its_latents_gradient(self, convention, slope, generator):
        losses = QuantizerLossConfig(straight_through=convention)
        quantizer = BinarySphericalQuantizer(18, losses=losses)
        latents = quantizer.project(torch.randn(4, 18, generator=generator)).requires_grad_()
        quantizer(latents).codes.sum().backward()
        torch.testing.assert_close(latents.grad, torch.full((4, 18), slope))


class TestEntropy:
    def test_sample_entropy_is_that_of_the_whole_codebook(self, generator):
        """Paper eq. 7: the sum over 2^L codes equals the sum over channels, whichever way it is computed."""
        latents_BL = BinarySphericalQuantizer(6, group_size=3).project(torch.randn(9, 6, generator=generator))
        expected = exact_assignment(latents_BL, inv_temperature=4.0)
        expected = -(expected * expected.log()).sum(1).mean()
        for kind in ("bit", "group"):
            config = QuantizerLossConfig(inv_temperature=4.0, sample_entropy=kind)
            made = BinarySphericalQuantizer(6, group_size=3, losses=config)(latents_BL[:, None])
            torch.testing.assert_close(made.losses.sample_entropy, expected, rtol=0, atol=1e-5)

    def test_codebook_entropy_grows_from_exact_to_groups_to_bits(self, generator):
        quantizer = BinarySphericalQuantizer(6, group_size=3)
        latents_BL = quantizer.project(torch.randn(9, 6, generator=generator))
        mean = exact_assignment(latents_BL, inv_temperature=20.0).mean(0)
        exact = -(mean * mean.clamp(min=1e-30).log()).sum().item()
        values = []
        for group_size, kind in ((6, "group"), (3, "group"), (3, "bit")):
            config = QuantizerLossConfig(inv_temperature=20.0, codebook_entropy=kind)
            made = BinarySphericalQuantizer(6, group_size=group_size, losses=config)(latents_BL[:, None])
            values.append(quantizer_loss(made.losses, config)[1].item())
        assert values[0] == pytest.approx(exact, abs=1e-5)
        assert values[0] < values[1] < values[2]

    def test_sample_entropy_of_unit_latents_is_almost_constant(self, generator):
        quantizer = BinarySphericalQuantizer(18)
        losses = quantizer(quantizer.project(torch.randn(50, 64, 18, generator=generator))).losses
        assert losses.sample_entropy.item() == pytest.approx(18 * math.log(2) - 2 / 18, abs=0.01)

    def test_extreme_latents_keep_finite_gradients(self):
        config = QuantizerLossConfig(inv_temperature=1000.0)
        quantizer = BinarySphericalQuantizer(18, l2_norm=False, post_q_l2_norm=False, losses=config)
        latents = torch.full((1, 2, 18), 1e4).requires_grad_()
        total_loss(quantizer, latents).backward()
        assert latents.grad.isfinite().all()


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(SpecError, match="18, not a multiple of group_size, 4"):
        BinarySphericalQuantizer(18, group_size=4)


def with_losses(quantizer, **changes):
    return BinarySphericalQuantizer(
        quantizer.bits_per_token,
        group_size=quantizer.group_size,
        l2_norm=quantizer.l2_norm,
        post_q_l2_norm=quantizer.code_magnitude != 1.0,
        losses=dataclasses.replace(quantizer.loss_config, **changes),
    )


def total_loss(quantizer, latents):
    return quantizer_loss(quantizer(latents).losses, quantizer.loss_config)[0]


def gradient(quantizer, latents, probe):
    latents = latents.clone().requires_grad_()
    made = quantizer(latents)
    (quantizer_loss(made.losses, quantizer.loss_config)[0] + (made.codes * probe).sum()).backward()
    return latents.grad


def exact_assignment(latents_BL, inv_temperature):
    """q(c|u) over all 2^L codes, by the definition."""
    num_bits = latents_BL.shape[1]
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=num_bits))) / math.sqrt(num_bits)
    return torch.softmax(2 * inv_temperature * latents_BL @ corners.T, dim=1)
