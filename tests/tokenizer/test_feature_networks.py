"""The networks of the Fréchet distances compute what the published code computes, and load from local files only.

The real weights are not at hand here: the expected numbers come from running pytorch-fid 0.3.0 and piergiaj/pytorch-i3d
(05783d1) on weights and pixels that are drawn below."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.image.inception import InceptionScore

from schemas.errors import CheckpointError
from tokenizer.frechet import FeatureStatistics
from tokenizer.i3d import I3DLogits, load_i3d
from tokenizer.inception import InceptionFeatures, inception_score, load_inception
from tokenizer.metrics import FeatureNetworks, QualityMeter

INCEPTION = [
    [0.4613199234008789, 0.2784069776535034, 1.4120068550109863, 0.7239336371421814],
    [0.41749757528305054, 0.29348790645599365, 1.557246446609497, 0.570221483707428],
]
I3D = [6.462301254272461, 3.8436155319213867, 1.023027777671814, -18.710147857666016]


def drawn_weights(kind):
    """Weights of a network that keep activations in range, drawn in the order of their names."""
    with torch.device("meta"):
        network = kind()
    generator = np.random.default_rng(0)
    weights = {}
    for name, tensor in sorted(network.state_dict().items()):
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = torch.from_numpy(generator.uniform(0.5, 1.5, shape).astype(np.float32))
        elif len(shape) > 1:
            scale = (2 / np.prod(shape[1:])) ** 0.5
            weights[name] = torch.from_numpy((scale * generator.standard_normal(shape)).astype(np.float32))
        else:
            weights[name] = torch.from_numpy(
                (generator.uniform(-0.5, 0.5, shape) + name.endswith("bn.weight")).astype(np.float32)
            )
    return weights


def drawn_pixels(*shape, seed=1):
    """Planar pixels in blocks of 8 x 8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (*shape[:-2], shape[-2] // 8, shape[-1] // 8), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(8, -2).repeat(8, -1))


def drawn_clips(num, num_frames, seed=1):
    """uint8 [N, T, 32, 32, 3]"""
    return drawn_pixels(num, num_frames, 3, 32, 32, seed=seed).permute(0, 1, 3, 4, 2)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """As it is published: a state dict of torch.save, with tensors that are not used."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    weights = drawn_weights(InceptionFeatures)
    torch.save({**weights, "AuxLogits.fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.save(drawn_weights(I3DLogits), path)
    return path


def test_inception_computes_what_pytorch_fid_computes(inception_file):
    features = load_inception(inception_file)(drawn_pixels(2, 3, 64, 64))
    assert features.shape == (2, 2048)
    assert np.allclose(features[:, ::512].numpy(), INCEPTION, rtol=1e-4), features[:, ::512]


def test_i3d_computes_what_its_published_code_computes(i3d_file):
    logits = load_i3d(i3d_file)(drawn_pixels(1, 3, 9, 224, 224))
    assert logits.shape == (1, 400)
    assert np.allclose(logits[0, ::100].numpy(), I3D, rtol=1e-4), logits[0, ::100]


def test_safetensors_give_the_same_network(inception_file, tmp_path):
    weights = torch.load(inception_file)
    save_file({name: each for name, each in weights.items() if "num_batches" not in name}, tmp_path / "w.safetensors")
    first, second = load_inception(inception_file), load_inception(tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(each.requires_grad for each in second.parameters()) and not second.training


@pytest.mark.parametrize("load", [load_inception, load_i3d])
def test_weights_that_are_missing_or_others_are_one_line(load, tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(CheckpointError, match=r"weights\.pth: .* not there, and nothing is fetched") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"tensor '\S+' is not there. These are not the weights of"):
        load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="no zip archive"):
        load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no state dict"):
        load(path)


def test_a_tensor_of_another_shape_or_too_many_is_named(tmp_path):
    weights = {name: torch.zeros_like(tensor) for name, tensor in drawn_weights(I3DLogits).items()}
    torch.save(weights | {"logits.conv3d.weight": torch.zeros(157, 1024, 1, 1, 1)}, tmp_path / "charades.pt")
    with pytest.raises(CheckpointError, match=r"'logits.conv3d.weight' has shape \[157, 1024, 1, 1, 1\] instead of"):
        load_i3d(tmp_path / "charades.pt")
    torch.save(weights | {"flow.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match=r"'flow\.weight' is not part of them"):
        load_i3d(tmp_path / "more.pt")


def test_a_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


def test_the_distance_of_pictures_to_themselves_is_zero_and_grows_with_noise(inception_file):
    networks = FeatureNetworks(inception=inception_file)
    originals = drawn_clips(2, 1)
    noisy = originals // 2 + drawn_clips(2, 1, seed=2) // 2
    statistics = FeatureStatistics()
    statistics.add(networks.features(originals)["rfid"])
    distances = []
    for made in (originals, noisy):
        meter = QualityMeter(networks)
        meter.add(originals, made)
        distances.append(meter.frechet_distances({"rfid": statistics})["rfid"])
    assert distances[0] == pytest.approx(0, abs=1e-3) and distances[1] > 0.1


def test_clips_that_are_too_short_for_i3d_have_no_rfvd(i3d_file):
    networks = FeatureNetworks(i3d=i3d_file)
    assert networks.features(drawn_clips(1, 8)) == {}
    assert networks.features(drawn_clips(1, 1)) == {}


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std\\(\\)")
@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_agrees_with_torchmetrics(splits, monkeypatch):
    logits = 3 * torch.randn(40, 1008, generator=torch.Generator().manual_seed(0))
    # It draws another order; parts of the pictures are compared in the one they have here.
    monkeypatch.setattr(torch, "randperm", torch.arange)
    theirs = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    theirs.update(logits)
    mean, std = theirs.compute()
    assert inception_score(logits, splits)[0] == pytest.approx(float(mean), rel=1e-5) != 1
    if splits > 1:
        unbiased = inception_score(logits, splits)[1] * (splits / (splits - 1)) ** 0.5
        assert unbiased == pytest.approx(float(std), rel=1e-3)


def test_the_inception_score_takes_logits_without_the_bias(inception_file):
    network = load_inception(inception_file)
    features = torch.rand(2, 2048, generator=torch.Generator().manual_seed(0))
    weights = torch.load(inception_file)["fc.weight"]
    assert torch.allclose(network.logits(features), features @ weights.T, atol=1e-4)


def test_the_inception_score_by_hand():
    sure, unsure = 50 * torch.eye(5).repeat(4, 1), torch.ones(20, 5)
    assert inception_score(sure, 2) == pytest.approx((5, 0)), "each picture surely of another of five classes"
    assert inception_score(unsure, 2) == pytest.approx((1, 0))
    assert inception_score(sure[:3]) == pytest.approx((1, 0)), "no more parts than pictures"
