from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from schemas.errors import SpecError
from tokenizer.bsqvit import BSQViT
from tokenizer.codes import bits_to_groups, bits_to_indices, unpack_bits
from tokenizer.config import PRESETS
from tokenizer.losses import quantizer_loss

# Each golden tensor is compared in the test named here; a new one fails until it is.
COMPARED = {
    *("frames_uint8", "x", "latents", "bits", "zq", "indices", "group_indices", "used_codes"),
    *("reconstruction", "reconstruction_raw", "indices_reference_float"),
    *("latents_reference_as_is", "bits_reference_as_is"),
    # test_quantizer.py
    *("probe", "persample_entropy", "codebook_entropy", "avg_prob", "commit_distance", "commit_loss"),
    *("quant_loss_total", "quant_loss_total_as_is", "grad_latents", "grad_latents_as_is", "grad_quant_loss"),
}
TOLERANCE = 1e-5


def random_frames(generator, *shape):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


class TestGolden:
    def test_every_golden_tensor_is_compared(self, golden):
        assert golden.expected.keys() <= COMPARED

    def test_pixels_enter_the_network_as_in_the_reference(self, golden):
        x = golden.model._to_range(golden.frames.permute(0, 4, 1, 2, 3)).reshape_as(golden.expected["x"])
        assert torch.equal(x, golden.expected["x"])

    def test_latents_bits_and_indices(self, golden):
        latents_BML = golden.model.latents(golden.frames).flatten(1, 3)
        bits_BML = golden.model.encode(golden.frames).flatten(1, 3)
        torch.testing.assert_close(latents_BML, golden.expected["latents"], rtol=0, atol=TOLERANCE)
        assert torch.equal(bits_BML, golden.expected["bits"].bool())
        indices_BM = bits_to_indices(bits_BML)
        assert torch.equal(indices_BM, golden.expected["indices"])
        assert torch.equal(bits_to_groups(bits_BML, golden.model.config.group_size), golden.expected["group_indices"])
        assert torch.equal(indices_BM.unique(), golden.expected["used_codes"])

    def test_packed_tokens_hold_the_same_bits(self, golden):
        packed, finite = golden.model.encode_packed(golden.frames.permute(0, 1, 4, 2, 3))
        bits_BML = golden.expected["bits"].bool()
        assert torch.equal(unpack_bits(packed, *bits_BML.shape[1:]), bits_BML)
        assert finite.all()

    def test_codes_and_reconstruction(self, golden):
        with torch.no_grad():
            made = golden.model.autoencode(golden.frames)
        torch.testing.assert_close(made.quantized.codes.flatten(1, 2), golden.expected["zq"], rtol=0, atol=1e-6)
        raw = golden.expected["reconstruction_raw"]
        unclamped = made.unclamped.permute(0, 4, 1, 2, 3).reshape_as(raw)
        torch.testing.assert_close(unclamped, raw, rtol=0, atol=TOLERANCE)
        clamped = golden.expected.get("reconstruction", raw.clamp(-1, 1))
        frames = made.frames.permute(0, 4, 1, 2, 3).reshape_as(clamped)
        torch.testing.assert_close(frames, clamped, rtol=0, atol=TOLERANCE)

    def test_defects_of_the_reference_are_not_repeated(self, golden):
        if "indices_reference_float" in golden.expected:
            assert (golden.expected["indices_reference_float"] != golden.expected["indices"]).all()
        if "bits_reference_as_is" in golden.expected:
            bits_BML = golden.model.encode(golden.frames).flatten(1, 3)
            assert (bits_BML != golden.expected["bits_reference_as_is"].bool()).any()
            latents_BML = golden.model.latents(golden.frames).flatten(1, 3)
            assert (latents_BML - golden.expected["latents_reference_as_is"]).abs().max() > 100 * TOLERANCE


class TestFrames:
    def test_forward_is_decode_of_encode(self, tiny, generator):
        frames = random_frames(generator, 3, 5, 32, 32)
        decoded = tiny.decode(tiny.encode(frames))
        assert torch.equal(tiny(frames), decoded)
        assert decoded.shape == (3, 5, 32, 32, 3)
        assert decoded.dtype == torch.float32
        assert decoded.abs().max() <= 1

    def test_a_later_frame_changes_no_earlier_bit(self, tiny, generator):
        frames = random_frames(generator, 2, 6, 32, 32)
        bits = tiny.encode(frames)
        for t in range(6):
            perturbed = frames.clone()
            perturbed[:, t] = 255 - perturbed[:, t]
            changed = (tiny.encode(perturbed) != bits).flatten(2).any(2).any(0)
            assert not changed[:t].any()
            assert changed[t]

    @pytest.mark.parametrize("model", ["tiny", "small"])
    def test_a_prefix_encodes_and_decodes_to_the_prefix(self, model, request, generator):
        model = request.getfixturevalue(model)
        size = model.config.image_size
        frames = random_frames(generator, 1, 5, size, size)
        bits, latents = model.encode(frames), model.latents(frames)
        decoded = model.decode(bits)
        for t in (1, 3):
            assert torch.equal(model.encode(frames[:, :t]), bits[:, :t])
            assert torch.equal(model.latents(frames[:, :t]), latents[:, :t])
            assert torch.equal(model.decode(bits[:, :t]), decoded[:, :t])

    def test_an_image_is_a_clip_of_one_frame(self, tiny, generator):
        """The image tokenizer with the clip tokenizer's weights gives the bits of the clip's first frame."""
        images = random_frames(generator, 4, 1, 32, 32)
        image_model = BSQViT(dataclasses.replace(tiny.config, max_frames=1)).eval()
        weights = {name: each for name, each in tiny.state_dict().items() if not name.endswith("temporal")}
        for half in ("encoder", "decoder"):
            weights[f"{half}.transformer.position"] = (
                weights[f"{half}.transformer.position"] + tiny.state_dict()[f"{half}.transformer.temporal"][0]
            )
        image_model.load_state_dict(weights)
        clip_bits = tiny.encode(torch.cat([images, random_frames(generator, 4, 3, 32, 32)], 1))
        assert torch.equal(image_model.encode(images), clip_bits[:, :1])

    def test_attention_equals_one_masked_call(self, tiny, generator):
        attention = tiny.encoder.transformer.blocks[0].attention
        x_BMD = torch.randn(2, 4 * 16, 64, generator=generator)
        frame_M = torch.arange(64) // 16
        query, key, value = attention.qkv(x_BMD).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        visible_MM = frame_M[:, None] >= frame_M
        masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible_MM)
        expected = attention.out(masked.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x_BMD, 16), expected, rtol=0, atol=1e-5)

    def test_bytes_and_floats_give_the_same_bits(self, tiny, generator):
        frames = random_frames(generator, 2, 2, 32, 32)
        assert torch.equal(tiny.encode(frames), tiny.encode(frames.double().div(127.5).sub(1).float()))

    def test_every_byte_is_normalised_like_the_reference(self, tiny):
        """The reference divides by 255, subtracts a half and divides by a half, in fp32."""
        values = torch.arange(256, dtype=torch.uint8)
        torch.testing.assert_close(tiny._to_range(values), (values.float() / 255 - 0.5) / 0.5, rtol=0, atol=1.2e-7)

    def test_planar_memory_is_seen_without_a_copy(self, tiny, generator):
        planar = random_frames(generator, 1, 2, 32, 32).permute(0, 1, 4, 2, 3).contiguous()
        assert tiny._planar(planar.permute(0, 1, 3, 4, 2)).data_ptr() == planar.data_ptr()
        assert tiny._planar(planar.permute(0, 1, 3, 4, 2)).is_contiguous()

    def test_a_sample_with_nan_is_told_apart(self, tiny, generator):
        planar = torch.rand(3, 1, 3, 32, 32, generator=generator)
        clean = tiny.encode_packed(planar)
        planar[1, 0, 2, 5, 5] = float("nan")
        packed, finite = tiny.encode_packed(planar)
        assert finite.tolist() == [True, False, True]
        assert torch.equal(packed[[0, 2]], clean.packed[[0, 2]])

    def test_training_reaches_every_weight(self, generator):
        model = BSQViT(PRESETS["vit-tiny-32-l18"])
        made = model.autoencode(random_frames(generator, 2, 3, 32, 32))
        entropies, _ = quantizer_loss(made.quantized.losses, model.quantizer.loss_config)
        (made.unclamped.square().mean() + entropies).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


class TestArithmetic:
    @pytest.mark.parametrize("num_threads", [1, 2])
    def test_bits_depend_on_neither_batch_size_nor_threads(self, small, generator, num_threads):
        images = random_frames(generator, 32, 1, 128, 128).permute(0, 1, 4, 2, 3)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one_by_one = torch.cat([small.encode_packed(image[None]).packed for image in images])
            torch.set_num_threads(num_threads)
            for batch_size in (1, 2, 3, 7, 8, 16, 32):
                packed = torch.cat([small.encode_packed(part).packed for part in images.split(batch_size)])
                assert torch.equal(packed, one_by_one)
        finally:
            torch.set_num_threads(before)

    def test_bfloat16_flips_few_bits_and_keeps_latents_in_fp32(self, generator):
        model = BSQViT(PRESETS["vit-tiny-32-l18"]).eval()
        frames = random_frames(generator, 4, 2, 32, 32)
        exact = model.encode(frames)
        model.compute_dtype = torch.bfloat16
        latents = model.latents(frames)
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(latents.shape[:-1]), rtol=0, atol=1e-6)
        assert (model.encode(frames) != exact).float().mean() < 0.03

    def test_a_bfloat16_model_still_gives_codes_on_the_sphere(self, generator):
        model = BSQViT(PRESETS["vit-tiny-32-l18"]).eval().bfloat16()
        model.compute_dtype = torch.bfloat16
        codes = model.autoencode(random_frames(generator, 2, 1, 32, 32)).quantized.codes
        assert codes.dtype == torch.float32
        assert torch.equal(codes.abs(), torch.full_like(codes, 18**-0.5))

    def test_weights_come_from_the_seed_alone(self):
        config = PRESETS["vit-tiny-32-l18"]
        state = torch.random.get_rng_state()
        one, same, other = BSQViT(config), BSQViT(config), BSQViT(config, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
        assert not torch.equal(one.to_latents.weight, other.to_latents.weight)

    def test_initial_weights_follow_the_paper(self, small):
        weights = dict(small.named_parameters())
        assert weights["encoder.transformer.position"].std().item() == pytest.approx(0.02, rel=0.02)
        assert weights["encoder.transformer.blocks.3.mlp_in.weight"].std().item() == pytest.approx(0.02, rel=0.02)
        assert not weights["encoder.transformer.temporal"].any()
        assert not weights["decoder.transformer.blocks.0.attention.qkv.bias"].any()
        assert (weights["decoder.transformer.norm_out.weight"] == 1).all()
        assert weights["from_codes.weight"].abs().max() <= 18**-0.5


class TestRefusals:
    @pytest.mark.parametrize(
        ("shape", "dtype", "words"),
        [
            ((2, 32, 32, 3), torch.uint8, "An image is a clip of one frame"),
            ((2, 1, 3, 32, 32), torch.uint8, r"expected \[batch, frames, height, width, 3\]"),
            ((2, 1, 32, 48, 3), torch.uint8, "32 x 48 px; this tokenizer takes 32 x 32"),
            ((2, 9, 32, 32, 3), torch.uint8, "9 frames; this tokenizer takes 1 to 8"),
            ((2, 0, 32, 32, 3), torch.uint8, "0 frames"),
            ((0, 1, 32, 32, 3), torch.uint8, "the batch is empty"),
            ((2, 1, 32, 32, 3), torch.int32, "torch.int32; give uint8"),
            ((2, 1, 32, 32, 3), torch.bool, "torch.bool; give uint8"),
        ],
    )
    def test_wrong_frames_are_refused_in_one_line(self, tiny, shape, dtype, words):
        with pytest.raises(SpecError, match=words) as caught:
            tiny.encode(torch.zeros(shape, dtype=dtype))
        assert "\n" not in str(caught.value)

    def test_interleaved_frames_are_refused_where_planar_ones_belong(self, tiny):
        with pytest.raises(SpecError, match=r"expected \[batch, frames, 3, height, width\]"):
            tiny.encode_packed(torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8))

    @pytest.mark.parametrize(
        ("shape", "dtype", "words"),
        [
            ((2, 1, 4, 4, 17), torch.bool, r"expected \[batch, frames, 4, 4, 18\]"),
            ((2, 16, 18), torch.bool, r"expected \[batch, frames, 4, 4, 18\]"),
            ((2, 1, 4, 4, 18), torch.uint8, "bits are torch.uint8; expected bool"),
            ((2, 9, 4, 4, 18), torch.bool, "9 frames"),
        ],
    )
    def test_wrong_bits_are_refused_in_one_line(self, tiny, shape, dtype, words):
        with pytest.raises(SpecError, match=words):
            tiny.decode(torch.zeros(shape, dtype=dtype))


def test_pixels_of_a_network_in_zero_to_one_are_public_from_minus_one_to_one(generator):
    config = dataclasses.replace(PRESETS["vit-tiny-32-l18"], clamp_range=(0.0, 1.0))
    model = BSQViT(config).eval()
    frames = random_frames(generator, 1, 1, 32, 32)
    assert model._to_range(frames).min() >= 0
    torch.testing.assert_close(model._to_range(frames.float() / 127.5 - 1), model._to_range(frames), rtol=0, atol=1e-6)
    # Untrained weights give pixels near 0 of the network, which the caller sees as black.
    assert np.abs(model(frames).detach().numpy() + 1).mean() < 0.2
