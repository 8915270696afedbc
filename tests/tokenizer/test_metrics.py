"""Measures agree with independent implementations to 1e-4, on pixels of 8 bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import pytorch_msssim
import scipy.linalg
import skimage.metrics
import torch
import torchmetrics.functional.image as theirs
from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim
from torch.nn import functional

from schemas.errors import SpecError
from tokenizer.code_usage import CodeCounts
from tokenizer.frechet import FeatureStatistics, frechet_distance
from tokenizer.losses import SCALE_WEIGHTS
from tokenizer.metrics import QualityMeter, Spread, decibels, ms_ssim_form, picture_scores

AGREEMENT = 1e-4


def pictures(generator, num=3, height=192, width=208):
    """Smooth pictures and the same with noise that differs in strength, uint8 [N, H, W, 3]."""
    coarse = torch.rand(num, 3, 12, 12, generator=generator)
    x = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    strength = torch.linspace(0.01, 0.2, num)[:, None, None, None]
    y = (x + strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return [(each * 255).round().to(torch.uint8).permute(0, 2, 3, 1) for each in (x, y)]


def planar(*pictures_NHWC):
    return [each.permute(0, 3, 1, 2).float() for each in pictures_NHWC]


def test_psnr_agrees_with_scikit_image_and_torchmetrics(generator):
    x, y = pictures(generator)
    found = picture_scores(x, y)["psnr"]
    expected = [
        skimage.metrics.peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(x, y, strict=True)
    ]
    assert np.allclose(found, expected, atol=AGREEMENT)
    by_torchmetrics = theirs.peak_signal_noise_ratio(*planar(y, x), data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(found, by_torchmetrics, atol=AGREEMENT)


def test_ssim_agrees_with_scikit_image_torchmetrics_and_pytorch_msssim(generator):
    x, y = pictures(generator)
    found = picture_scores(x, y)["ssim"]
    settings = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        skimage.metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=2, **settings)
        for a, b in zip(x, y, strict=True)
    ]
    assert np.allclose(found, expected, atol=AGREEMENT)
    assert torch.allclose(found, inner_similarity(*planar(x, y)), atol=AGREEMENT)
    assert torch.allclose(found, pytorch_msssim.ssim(*planar(x, y), 255, size_average=False), atol=AGREEMENT)


def inner_similarity(x, y):
    """SSIM by torchmetrics, of windows that lie wholly inside of the picture."""
    _, full = theirs.structural_similarity_index_measure(
        x, y, data_range=255.0, reduction="none", return_full_image=True
    )
    return full[..., 5:-5, 5:-5].mean((1, 2, 3))


def test_ms_ssim_agrees_with_torchmetrics_and_pytorch_msssim(generator):
    x, y = pictures(generator)
    found = picture_scores(x, y)["ms_ssim"]
    # Theirs lets windows hang over the border of the last scale and joins the colours before the product.
    colours = [each.flatten(0, 1).unsqueeze(1) for each in planar(x, y)]
    product = torch.ones(len(colours[0]))
    for number, weight in enumerate(SCALE_WEIGHTS):
        if number == len(SCALE_WEIGHTS) - 1:
            product *= inner_similarity(*colours) ** weight
        else:
            _, contrast = theirs.structural_similarity_index_measure(
                *colours, data_range=255.0, reduction="none", return_contrast_sensitivity=True
            )
            product *= contrast**weight
            colours = [functional.avg_pool2d(each, 2) for each in colours]
    assert torch.allclose(found, product.reshape(-1, 3).mean(1), atol=AGREEMENT)
    assert torch.allclose(found, pytorch_msssim.ms_ssim(*planar(x, y), 255, size_average=False), atol=AGREEMENT)


@pytest.mark.parametrize(("side", "scales"), [(128, 5), (97, 5), (96, 4), (64, 4), (48, 3), (32, 3)])
def test_ms_ssim_of_small_pictures_has_seven_taps_and_says_how_many_scales(generator, side, scales):
    x, y = pictures(generator, height=side, width=side + 11)
    (name,) = [name for name in picture_scores(x, y) if name.startswith("ms_ssim") and not name.endswith("_db")]
    assert name == ("ms_ssim_w7" if scales == 5 else f"ms_ssim_w7_s{scales}")
    weights = np.array(SCALE_WEIGHTS[:scales]) * sum(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS[:scales])
    found = picture_scores(x, y)[name]
    assert torch.allclose(found, of_scales(*planar(x, y), weights), atol=AGREEMENT)
    if scales == 5:  # theirs refuses smaller pictures, whatever the weights
        whole = pytorch_msssim.ms_ssim(*planar(x, y), 255, size_average=False, win_size=7)
        assert torch.allclose(found, whole, atol=AGREEMENT)


def of_scales(x, y, weights):
    """MS-SSIM of as many scales as weights, by pytorch-msssim's single scale."""
    product = torch.ones(3)
    window = _fspecial_gauss_1d(7, 1.5).repeat([3, 1, 1, 1])
    for number, weight in enumerate(weights):
        similarity, contrast = _ssim(x, y, data_range=255, win=window, size_average=False)
        last = number == len(weights) - 1
        product = product * torch.relu(similarity if last else contrast) ** weight
        x, y = (functional.avg_pool2d(each, 2, padding=[side % 2 for side in each.shape[2:]]) for each in (x, y))
    return product.mean(1)


def test_eleven_taps_from_176_px_on():
    assert ms_ssim_form(175) == ("ms_ssim_w7", 7)
    assert ms_ssim_form(176) == ("ms_ssim", 11)


def test_a_picture_against_itself_has_the_most_of_everything(generator):
    x, _ = pictures(generator, height=128, width=128)
    scores = picture_scores(x, x)
    assert (scores["psnr"] == 100).all() and torch.allclose(scores["ssim"], torch.ones(3))
    assert (scores["ms_ssim_w7_db"] > 60).all() and (scores["ms_ssim_w7_db"] <= 100).all()
    assert decibels(torch.tensor([0.9, 0.99])).tolist() == pytest.approx([10, 20], abs=1e-4)


def test_pixels_that_are_not_rounded_are_refused(generator):
    x, _ = pictures(generator, height=64, width=64)
    with pytest.raises(SpecError, match="uint8"):
        picture_scores(x.float(), x)


def test_a_clip_counts_once_as_the_mean_of_its_frames(generator):
    x, y = pictures(generator, num=6, height=64, width=64)
    meter = QualityMeter()
    for first in (0, 3):
        meter.add(x[first : first + 3][None], y[first : first + 3][None])
    alone = picture_scores(x, y)["psnr"].double().reshape(2, 3).mean(1)
    assert meter.values["psnr"] == pytest.approx(alone.tolist())
    assert meter.spreads()["psnr"].mean == pytest.approx(float(alone.mean()))
    assert meter.frechet_distances({}) == {}


def test_a_spread_by_hand():
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert spread.mean == 4 and spread.median == 3 and spread.least == 1 and spread.most == 10
    assert spread.std == pytest.approx(np.sqrt(10))
    assert dataclasses.asdict(Spread.of([7.0])) == dict.fromkeys(
        ("mean", "least", "p05", "median", "p95", "most"), 7.0
    ) | {"std": 0.0}


def statistics(features, batch):
    found = FeatureStatistics()
    for part in torch.split(features, batch):
        found.add(part)
    return found


def test_the_frechet_distance_agrees_with_the_matrix_root_of_scipy(generator):
    first = (
        torch.randn(400, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    second = 0.3 + 1.2 * torch.randn(300, 12, generator=generator, dtype=torch.float64)
    found = frechet_distance(statistics(first, 64), statistics(second, 300))
    mean = [each.mean(0).numpy() for each in (first, second)]
    covariance = [np.cov(each.numpy(), rowvar=False) for each in (first, second)]
    root = scipy.linalg.sqrtm(covariance[0] @ covariance[1]).real
    expected = np.sum((mean[0] - mean[1]) ** 2) + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert found == pytest.approx(expected, rel=1e-8)


def test_few_features_and_sums_of_many_give_the_same_distance(generator):
    first, second = (torch.randn(30, 40, generator=generator).double() for _ in range(2))
    kept = frechet_distance(statistics(first, 30), statistics(second, 7))
    summed = [statistics(each.repeat(2, 1), 11) for each in (first, second)]  # more than 40 items
    scale = 29 / 30 * 60 / 59  # of an unbiased covariance whose items come twice
    means = float((first.mean(0) - second.mean(0)).square().sum())
    assert frechet_distance(*summed) - means == pytest.approx((kept - means) * scale, rel=1e-6)
    mixed = frechet_distance(summed[0], statistics(second, 30))
    assert mixed == pytest.approx(kept, rel=0.1)


def test_the_frechet_distance_needs_no_more_items_than_features(generator):
    features = torch.randn(20, 64, generator=generator)
    same = frechet_distance(statistics(features, 7), statistics(features, 20))
    assert same == pytest.approx(0, abs=1e-6)
    moved = frechet_distance(statistics(features, 7), statistics(features + 0.5, 20))
    assert moved == pytest.approx(64 * 0.25, rel=1e-4)


def test_code_counts_by_hand():
    counts = CodeCounts(4, 2)
    counts.add(torch.tensor([[[1, 0, 1, 1], [0, 0, 1, 1]], [[1, 0, 1, 1], [0, 0, 1, 0]]], dtype=torch.bool))
    quarter = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert counts.channel_bits() == pytest.approx([1, 0, 0, quarter], abs=1e-6)
    assert counts.num_tokens == 4
    groups = counts.groups()
    assert [(group.codes, group.used) for group in groups] == [(4, 2), (4, 2)]
    assert [group.entropy_bits for group in groups] == pytest.approx([1, quarter])
