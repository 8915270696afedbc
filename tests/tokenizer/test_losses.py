"""Losses agree with independent implementations, and their gradients arrive where they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from schemas.errors import CheckpointError
from tokenizer.config import QuantizerLossConfig
from tokenizer.discriminator import Discriminator
from tokenizer.losses import (
    Perceptual,
    discriminator_loss,
    generator_loss,
    ms_ssim,
    psnr,
    quantizer_loss,
    r1_penalty,
    reconstruction_loss,
    ssim,
)
from tokenizer.quantizer import BinarySphericalQuantizer


def pair(generator, num=2, height=128, width=128):
    """Smooth pictures and the same with noise, from -1 to 1."""
    coarse = torch.rand(num, 3, 8, 8, generator=generator)
    x = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 2 - 1
    y = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, y


def test_ssim_agrees_with_scikit_image(generator):
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair(generator, height=41, width=67)
    settings = {"data_range": 2.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, **settings)
        for a, b in zip(x.double(), y.double(), strict=True)
    ]
    assert np.allclose(ssim(x, y).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "taps"), [((128, 128), 7), ((176, 200), 11), ((113, 131), 7)])
def test_ms_ssim_agrees_with_pytorch_msssim(generator, size, taps):
    theirs = pytest.importorskip("pytorch_msssim")
    x, y = pair(generator, height=size[0], width=size[1])
    expected = theirs.ms_ssim(x, y, data_range=2.0, size_average=False, win_size=taps)
    assert torch.allclose(ms_ssim(x, y, taps=taps), expected, atol=1e-4)
    assert torch.allclose(ssim(x, y, taps=taps), theirs.ssim(x, y, 2.0, False, taps), atol=1e-4)


def test_similarity_of_a_picture_with_itself_is_one_and_its_gradient_finite_against_the_opposite(generator):
    x, _ = pair(generator, height=32, width=32)
    assert torch.allclose(ms_ssim(x, x, taps=7), torch.ones(2))
    inverse = (-x).requires_grad_()
    (1 - ms_ssim(inverse, x, taps=7)).mean().backward()
    assert inverse.grad.isfinite().all()


def test_measures_convolve_in_whole_fp32_and_leave_the_setting_as_it_was(generator, monkeypatch):
    seen = []
    convolve = nn.functional.conv2d

    def recorded(*given, **named):
        seen.append(torch.backends.cudnn.allow_tf32)
        return convolve(*given, **named)

    monkeypatch.setattr(nn.functional, "conv2d", recorded)
    x, y = pair(generator, height=32, width=32)
    before = torch.backends.cudnn.allow_tf32
    ms_ssim(x, y, taps=7)
    r1_penalty(Discriminator(16, channels=4, max_channels=8), torch.rand(4, 3, 16, 16, generator=generator))
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_psnr_counts_what_rounding_leaves():
    black = torch.full((1, 3, 4, 4), -1.0)
    assert psnr(black + 0.4 / 127.5, black).item() > 100  # rounds to the same byte
    one_level = psnr(black + 1 / 127.5, black).item()
    assert one_level == pytest.approx(20 * math.log10(255), abs=1e-4)


def test_the_loss_of_pixels_by_hand():
    difference = torch.tensor([[0.5, -0.5], [0.1, 0.3]]).reshape(2, 1, 1, 2)
    assert float(reconstruction_loss("l1", difference)) == pytest.approx(0.35)
    assert float(reconstruction_loss("mse", difference)) == pytest.approx((0.25 + 0.05) / 2)


def test_the_log_of_squares_falls_by_the_same_for_each_decibel_of_any_picture(generator):
    plain, busy = (scale * torch.randn(1, 3, 16, 16, generator=generator) for scale in (0.2, 0.8))
    decibel = 10 ** (-1 / 20)

    def saved(better, worse):
        return float(reconstruction_loss("log_mse", torch.cat([*worse]))) - float(
            reconstruction_loss("log_mse", torch.cat([*better]))
        )

    of_plain, of_busy = saved((plain * decibel, busy), (plain, busy)), saved((plain, busy * decibel), (plain, busy))
    assert of_plain == pytest.approx(of_busy, rel=0.05) and of_plain > 0
    perfect = torch.zeros(1, 3, 16, 16, requires_grad=True)
    reconstruction_loss("log_mse", perfect).backward()
    assert perfect.grad.isfinite().all()


def test_adversarial_losses_by_hand():
    zero, two = torch.zeros(1), torch.full((1,), 2.0)
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(two, -two).item() == pytest.approx(2 * math.log(1 + math.exp(-2)), rel=1e-5)


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 2, 2) / 10)

        def forward(self, x):
            return (x * self.weight).sum((1, 2, 3))

    model = Linear()
    penalty = r1_penalty(model, torch.rand(5, 3, 2, 2))
    assert penalty.item() == pytest.approx(model.weight.square().sum().item() / 2, rel=1e-5)
    penalty.backward()
    assert torch.allclose(model.weight.grad, model.weight)  # the derivative of |w|^2 / 2


def test_r1_reaches_every_weight_of_the_discriminator(generator):
    model = Discriminator(16, channels=4, max_channels=8)
    r1_penalty(model, torch.rand(4, 3, 16, 16, generator=generator)).backward()
    for name, parameter in model.named_parameters():
        # Adding a constant to the logit does not change its slope.
        if name.endswith("weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_quantizer_loss_by_hand(generator):
    config = QuantizerLossConfig(beta=0.25, gamma0=0.7, gamma=1.3, inv_temperature=2.0)
    quantizer = BinarySphericalQuantizer(18, losses=config)
    latents = quantizer.project(torch.randn(3, 5, 18, generator=generator))
    total, codebook_entropy = quantizer_loss(quantizer(latents).losses, config)
    shares = quantizer.soft_assignment(latents, quantizer.group_size)
    of_samples = torch.special.entr(shares).sum((-2, -1)).mean()
    of_codebook = torch.special.entr(shares.mean((0, 1))).sum()
    distance = (quantizer.to_codes(latents > 0) - latents).square().sum(-1).mean()
    assert torch.allclose(codebook_entropy, of_codebook, atol=1e-4)
    assert torch.allclose(total, 0.25 * distance + (0.7 * of_samples - 1.3 * of_codebook) / 2, atol=1e-4)


def write_lpips(folder, generator):
    """Random weights in the shapes of the real ones."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    trunk, inputs = {}, 3
    for number, width in zip(numbers, widths, strict=True):
        scale = (2 / (9 * inputs)) ** 0.5
        trunk[f"features.{number}.weight"] = torch.randn(width, inputs, 3, 3, generator=generator) * scale
        trunk[f"features.{number}.bias"] = torch.zeros(width)
        inputs = width
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for number, width in enumerate((64, 128, 256, 512, 512))
    }
    folder.mkdir(exist_ok=True)
    save_file(trunk, folder / "vgg16.safetensors")
    save_file(heads, folder / "lpips_vgg.safetensors")


def test_lpips_loads_local_weights_and_refuses_in_one_line_without_them(tmp_path, generator):
    with pytest.raises(CheckpointError, match=r"vgg16.safetensors: LPIPS needs this file.*no-lpips") as refusal:
        Perceptual(tmp_path)
    assert "\n" not in str(refusal.value)
    write_lpips(tmp_path, generator)
    lpips = Perceptual(tmp_path)
    x, y = pair(generator, height=32, width=32)
    x.requires_grad_()
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert (lpips(x, y) > 0).all()
    lpips(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_under_autocast_lpips_compares_its_features_in_fp32(tmp_path, generator):
    write_lpips(tmp_path, generator)
    lpips = Perceptual(tmp_path)
    x, y = pair(generator, height=32, width=32)
    features = []
    for stage in lpips.stages:
        stage.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = lpips(x, x + 0.1 * (y - x))
    assert all(each.dtype == torch.bfloat16 for each in features)
    expected = torch.zeros(2, dtype=torch.float64)
    for number in range(5):
        first, second = (nn.functional.normalize(each.double()) for each in features[2 * number : 2 * number + 2])
        weighted = (first - second).square() * getattr(lpips, f"head_{number}").double()
        expected += weighted.sum(1).mean((1, 2))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_lpips_refuses_weights_of_something_else(tmp_path):
    for name in ("vgg16.safetensors", "lpips_vgg.safetensors"):
        save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has shape \[8, 3, 3, 3\] instead of \[64, 3, 3, 3\]"):
        Perceptual(tmp_path)
