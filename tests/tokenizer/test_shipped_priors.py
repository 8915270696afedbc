"""What comes with the package as trained priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from tokenizer.checkpoint import CARD_FILE, from_pretrained, read_checkpoint
from tokenizer.prior_checkpoint import SHIPPED_PRIORS, build_prior, prior_config, read_prior, shipped_priors
from tokenizer.prior_coder import PriorCoder, cut_runs

MOST_BYTES = 12_000_000
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Tokens, bool [1, h, w, L] each."""
    model = from_pretrained("default")
    size = model.config.image_size
    frames = []
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)())
        side = min(picture.size)
        frames.append(np.asarray(picture.crop((0, 0, side, side)).resize((size, size), Image.Resampling.LANCZOS)))
    bits = model.encode(torch.from_numpy(np.stack(frames))[:, None])
    return list(bits.numpy())


@pytest.mark.parametrize("name", shipped_priors())
def test_each_is_trained_small_described_and_for_the_default_tokenizer(name: str) -> None:
    files = read_prior(name)
    config = prior_config(files)
    assert config.trained and config.preset == name
    assert config.tokenizer_sha256 == read_checkpoint("default").weight_sha256()
    assert len(files.model_safetensors) <= MOST_BYTES
    card = (SHIPPED_PRIORS / name / CARD_FILE).read_text(encoding="utf-8")
    for heading in ("## Training", "## What it reaches", "## Limits"):
        assert heading in card


def test_the_default_spends_fewer_bits_on_photographs_and_its_stream_takes_what_it_says(photographs) -> None:
    prior = build_prior(read_prior("default"))
    tokens = torch.from_numpy(np.stack(photographs))
    with torch.inference_mode():
        nats = -float(prior.log_prob(tokens).double().sum())
    bits, count = nats / math.log(2), tokens[..., 0].numel()
    assert bits / count < 0.8 * prior.config.bits_per_token
    runs = cut_runs([1] * len(photographs), 0, 32)
    coder = PriorCoder(prior, lanes=32)
    ((stream,),) = coder.encode([(runs, [photographs])])
    assert 8 * len(stream) == pytest.approx(bits, rel=0.005, abs=8 * 8)
    ((decoded,),) = coder.decode([(runs, [stream])])
    assert np.array_equal(np.stack(decoded), np.stack(photographs))
