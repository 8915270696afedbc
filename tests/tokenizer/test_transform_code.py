"""The transform code keeps what it says, and a tokenizer learns it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SpecError
from tests.tiny_training import CPU, frames
from tests.tiny_training import settings as tiny_settings
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import from_pretrained
from tokenizer.code_start import look_at_partners
from tokenizer.config import preset_config
from tokenizer.losses import psnr
from tokenizer.trainer import Trainer, held_batches
from tokenizer.transform_code import TransformCode


def pictures(num: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some grain, planar from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.from_numpy(frames(num, 1, size, seed)[:, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def code() -> TransformCode:
    return TransformCode.fit(pictures(600), patch_size=8, bits_per_token=18, num_classes=8, most_bits=5)


@pytest.fixture(scope="module")
def plain_code() -> TransformCode:
    return TransformCode.fit(pictures(600), patch_size=8, bits_per_token=18, num_classes=1)


def quality(code: TransformCode, frames_BCHW: torch.Tensor) -> float:
    made = code.decode(code.encode(frames_BCHW).bits, *frames_BCHW.shape[-2:])
    return float(psnr(made.clamp(-1, 1), frames_BCHW).mean())


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_any_bits_are_read_back_from_the_picture_that_they_stand_for(
    plain_code: TransformCode, seed: int, rows: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(2, 4 * rows * columns, 18, generator=generator) < 0.5
    assert torch.equal(plain_code.encode(plain_code.decode(bits, 16 * rows, 16 * columns)).bits, bits)


def test_a_picture_is_decoded_alike_whatever_its_neighbours_are(code: TransformCode) -> None:
    seen = pictures(8, 48, seed=4)
    together = code.decode(code.encode(seen).bits, 48, 48)
    for number in range(8):
        block = seen[number : number + 1, :, 16:32, 32:48]
        alone = code.decode(code.encode(block).bits, 16, 16)
        assert torch.allclose(together[number, :, 16:32, 32:48], alone[0], atol=1e-5)


def test_blocks_and_classes_of_them_each_make_better_pictures_of_as_many_bits(plain_code: TransformCode) -> None:
    flat = pictures(600)
    flat[::2] = flat[::2] * 0.1 + 0.3
    unseen = torch.cat([pictures(20, seed=1), pictures(20, seed=2) * 0.1 + 0.3])
    options = {"patch_size": 8, "bits_per_token": 18}
    patches = quality(TransformCode.fit(flat, block_tokens=1, num_classes=1, **options), unseen)
    blocks = quality(TransformCode.fit(flat, num_classes=1, **options), unseen)
    classes = quality(TransformCode.fit(flat, num_classes=8, **options), unseen)
    assert patches + 0.3 < blocks < classes - 0.3


def test_a_wrong_bit_costs_least_where_the_code_says_it_matters_least(plain_code: TransformCode) -> None:
    unseen = pictures(60, seed=2)
    bits, weights = plain_code.encode(unseen)
    costs = []
    for bit in range(18):
        flipped = bits.clone()
        flipped[..., bit] ^= True
        costs.append(float((plain_code.decode(flipped, 32, 32) - unseen).square().mean()))
    assert weights.shape == bits.shape and float(weights.mean()) == pytest.approx(1, abs=1e-5)
    order = torch.tensor(costs).argsort()
    assert float(weights[..., order[:6]].mean()) < 0.5 * float(weights[..., order[-6:]].mean())


def test_all_bits_are_dealt_out_once_and_coefficients_stay_whole(code: TransformCode) -> None:
    for coefficients, shifts in zip(code.coefficient_CSL, code.shift_CSL, strict=True):
        pairs = list(zip(coefficients.flatten().tolist(), shifts.flatten().tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) == 4 * 18
        tokens = [set(row) for row in coefficients.tolist()]
        assert sum(len(tokens[i] & tokens[j]) for i in range(4) for j in range(i)) <= 12
    says_class = code.coefficient_CSL == code.basis_VK.shape[1]
    assert int(says_class[0].sum()) == 3 and (says_class == says_class[0]).all()
    alike = (code.coefficient_CSL == code.coefficient_CSL[4]) & (code.shift_CSL == code.shift_CSL[4])
    assert float(alike.float().mean()) > 0.6


def test_what_cannot_be_cut_or_fitted_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot be cut into blocks of 16 px"):
        TransformCode.fit(pictures(10, 40), patch_size=8, bits_per_token=18)
    with pytest.raises(SpecError, match="at least 1,536 blocks"):
        TransformCode.fit(pictures(10), patch_size=8, bits_per_token=18)


def test_heads_begin_with_looking_at_one_partner_each() -> None:
    config = preset_config("vit-small-128-l18")
    model = BSQViT(config, seed=0)
    half = model.encoder.transformer
    look_at_partners(half, config.grid, seed=0)
    features = torch.randn(1, 4, 256, 192, generator=torch.Generator().manual_seed(0))
    first = half.blocks[0]
    with torch.no_grad():
        for num_frames in (1, 4):
            clip = features[:, :num_frames] + half.position + half.temporal[:num_frames, None]
            x = first.attention_norm(half.norm_in(clip).flatten(1, 2))
            query, key, _ = torch.unflatten(first.attention.qkv(x), -1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(-1, -2) / 8).softmax(-1)[0]
            place = 256 * (num_frames - 1) + torch.arange(256)
            for head, exchanged in enumerate((1, 16, 17)):
                assert float(weights[head, place, place ^ exchanged].mean()) > 0.25
    with pytest.raises(SpecError, match="transform_code to false"):
        look_at_partners(half, (15, 15), seed=0)


def test_a_tokenizer_learns_the_code_and_resumes_on_the_same_losses(tmp_path) -> None:
    arrays = [frames(300, 1, seed=3)]

    def run(out, steps, resume=False):
        config = tiny_settings(
            losses={"transform_code": True, "code_classes": 8},
            optimizer={"steps": 60, "learning_rate": 3e-3, "warmup_steps": 5, "batch_images": 16},
            run={"save_every": 20},
        )
        trainer = Trainer(config, held_batches(config, arrays, CPU), out)
        trainer.begin(resume=resume)
        if steps < 60:
            update = trainer.learner.update

            def counted(batch, step):
                if step + 1 == steps:
                    raise KeyboardInterrupt
                return update(batch, step)

            trainer.learner.update = counted
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        else:
            trainer.run()

    def log(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [(line["loss"], line["wrong_bits"], line["mse"]) for line in lines]

    run(tmp_path / "whole", 60)
    whole = log(tmp_path / "whole")
    assert whole[-1][1] < 0.85 * whole[0][1]
    assert whole[-1][2] < 0.95 * whole[0][2]
    run(tmp_path / "cut", 33)
    run(tmp_path / "cut", 60, resume=True)
    assert log(tmp_path / "cut") == whole
    from_pretrained(tmp_path / "whole" / "tokenizer")


def test_the_decoder_is_first_given_the_code_and_then_the_bits_that_the_encoder_has(tmp_path):
    config = tiny_settings(
        losses={"transform_code": True, "own_bits_from": 0.5, "adversarial_weight": 0.1}, optimizer={"steps": 4}
    )
    trainer = Trainer(config, held_batches(config, [frames(300, 1)], CPU), tmp_path)
    trainer.begin(resume=False)
    learner = trainer.learner
    batch = torch.from_numpy(frames(4, 1, 32, seed=5))
    planar = batch[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted, own = learner._code.encode(planar).bits[:, None], (learner.model.vectors(batch) > 0)
    assert not torch.equal(wanted, own)
    given = []
    learner._render = lambda bits: given.append(bits) or learner.model.render(bits)
    before = {name: value.clone() for name, value in learner.discriminator.state_dict().items()}
    for step in range(4):
        learner._tokenizer_gradients(batch, planar, step)
    assert [torch.equal(bits, wanted) for bits in given] == [True, True, False, False]
    assert torch.equal(given[2], own)
    metrics = learner.update(batch, 3)
    assert "discriminator" not in metrics
    assert all(torch.equal(value, before[name]) for name, value in learner.discriminator.state_dict().items())
