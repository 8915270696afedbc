"""What comes with the package as trained tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from tokenizer.checkpoint import CARD_FILE, SHIPPED, from_pretrained, read_checkpoint, shipped_names
from tokenizer.config import preset_config

MOST_BYTES = 25_000_000
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def photographs(size: int) -> torch.Tensor:
    """uint8 [B, 1, size, size, 3]."""
    pictures = []
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)())
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        pictures.append(np.asarray(square.convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1)


def test_the_default_is_one_of_them() -> None:
    assert read_checkpoint("default").where in shipped_names()


@pytest.mark.parametrize("name", shipped_names())
def test_each_is_trained_small_and_described(name: str) -> None:
    files = read_checkpoint(name)
    config = files.config()
    assert config.trained
    assert config.preset == name
    assert (config.encoder, config.bits_per_token) == (preset_config(name).encoder, preset_config(name).bits_per_token)
    assert len(files.model_safetensors) <= MOST_BYTES
    card = (SHIPPED / name / CARD_FILE).read_text(encoding="utf-8")
    for heading in ("## Training", "## What they reach", "## Limits"):
        assert heading in card


@pytest.mark.parametrize("name", shipped_names())
def test_photographs_are_recognised_in_what_they_decode_to(name: str) -> None:
    model = from_pretrained(name)
    frames = photographs(model.config.image_size)
    with torch.inference_mode():
        decoded = model.decode(model.encode(frames))
        noise = from_pretrained(f"untrained:{name}")
        of_noise = noise.decode(noise.encode(frames))
    original = frames.float() / 127.5 - 1

    def psnr(other: torch.Tensor) -> torch.Tensor:
        return 10 * torch.log10(4 / (other - original).square().mean(dim=(1, 2, 3, 4)))

    assert psnr(of_noise).max() < 15
    assert psnr(decoded).mean() > 21
