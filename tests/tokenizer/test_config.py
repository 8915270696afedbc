from __future__ import annotations

import dataclasses
import json
import math

import pytest

from schemas.errors import SpecError
from tokenizer.config import PRESETS, BSQViTConfig, QuantizerLossConfig, TransformerConfig, preset_config


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_config_survives_json(config):
    assert BSQViTConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config


def test_every_field_survives_json():
    config = BSQViTConfig(
        preset="odd",
        image_size=40,
        patch_size=4,
        max_frames=3,
        bits_per_token=12,
        group_size=6,
        encoder=TransformerConfig(width=32, layers=1, heads=4, mlp_ratio=3.5, layer_scale=0.4, ln_pre=False),
        decoder=TransformerConfig(width=40, layers=2, heads=5),
        head_width=None,
        l2_norm=False,
        post_q_l2_norm=False,
        clamp_range=(0.0, 1.0),
        losses=QuantizerLossConfig(beta=0.5, codebook_entropy="bit", straight_through="identity"),
        trained=True,
    )
    assert BSQViTConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config


def test_presets_have_the_sizes_of_the_paper():
    """Section 5: 174.8 M parameters at 256 px, 173.6 M at 128; our small one stays under 25 MB in bf16."""
    from tokenizer.checkpoint import expected_shapes

    def millions(name):
        shapes = expected_shapes(PRESETS[name]).values()
        return sum(math.prod(shape) for shape in shapes) / 1e6

    assert millions("vit-b8-256-l18") == pytest.approx(174.8, abs=0.1)
    assert millions("vit-b8-128-l18") == pytest.approx(173.6, abs=0.1)
    assert millions("vit-small-128-l18") < 12.4


def test_derived_sizes():
    config = PRESETS["vit-small-128-l18"]
    assert config.grid == (16, 16)
    assert config.tokens_per_frame == 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 7}, "image_size is 32, not a multiple of patch_size, 7"),
        ({"group_size": 4}, "bits_per_token is 18, not a multiple of group_size, 4"),
        ({"bits_per_token": 65}, "bits_per_token is 65; it must be a whole number from 1 to 64"),
        ({"bits_per_token": True}, "bits_per_token is True"),
        ({"image_size": 0}, "image_size is 0"),
        ({"max_frames": 1.5}, "max_frames is 1.5"),
        ({"clamp_range": [0, 2]}, "must be \\(-1, 1\\) or \\(0, 1\\)"),
        ({"clamp_range": 1}, "clamp_range is 1; it must be two numbers"),
        ({"trained": "yes"}, "trained is 'yes'"),
        ({"bits_per_tokens": 18}, "unknown key 'bits_per_tokens'.*Did you mean 'bits_per_token'"),
        ({"encoder": {"width": 64, "layers": 2, "heads": 3}}, "width is 64, not a multiple of heads, 3"),
        ({"encoder": {"width": 64, "layers": 2}}, "encoder: 'heads' is missing"),
        ({"encoder": None}, "encoder: expected an object"),
        ({"losses": {"gama": 1.0}}, "losses: unknown key 'gama'.*Did you mean 'gamma'"),
        ({"losses": {"beta": float("nan")}}, "beta is nan"),
        ({"losses": {"inv_temperature": 0}}, "inv_temperature is 0"),
        ({"losses": {"codebook_entropy": "bits"}}, "codebook_entropy is 'bits'.*Did you mean 'bit'"),
    ],
)
def test_an_impossible_config_is_refused_by_name(change, words):
    with pytest.raises(SpecError, match=words):
        BSQViTConfig.from_json_dict({**PRESETS["vit-tiny-32-l18"].to_json_dict(), **change})


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SpecError, match=r"Did you mean 'vit-tiny-32-l18'\?"):
        preset_config("vit-tiny-32")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["vit-tiny-32-l18"].image_size = 64
