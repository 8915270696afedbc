"""Whatever is coded comes back, in as many bytes as the prior says, and no lane knows of another."""

from __future__ import annotations

import math

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CheckpointError, SpecError
from tests.tiny_priors import random_bits, tiny_prior
from tokenizer.codes import groups_to_bits
from tokenizer.prior_coder import FREQUENCY_BITS, PriorCoder, StreamClips, cut_runs, frequencies
from tokenizer.prior_steps import PriorSteps


def code(coder, clips, first_lane=0):
    """One stream of clips, bool [T, h, w, L] each, and what it is decoded to."""
    run = StreamClips(first_lane, tuple(map(len, clips)))
    ((stream,),) = coder.encode([([run], [clips])])
    ((decoded,),) = coder.decode([([run], [stream])])
    return stream, decoded


def drawn_clips(prior, num_clips, num_frames):
    """Clips as the prior itself would make them."""
    steps = PriorSteps(prior, num_clips, num_frames)
    generator, symbols, before = torch.Generator().manual_seed(0), [], None
    for _ in range(num_frames * prior.config.tokens_per_frame * prior.config.num_groups):
        before = torch.multinomial(steps.step(before).softmax(-1), 1, generator=generator)[:, 0]
        symbols.append(before)
    groups = torch.stack(symbols, 1).view(num_clips, num_frames, *prior.config.grid, prior.config.num_groups)
    return list(groups_to_bits(groups, prior.config.group_size).numpy())


def test_the_runs_of_clips_over_blocks():
    assert cut_runs([1, 2, 1], 2, 4) == [StreamClips(2, (1, 2)), StreamClips(0, (1,))]
    assert cut_runs([1] * 8, 0, 4) == [StreamClips(0, (1,) * 4)] * 2
    assert cut_runs([3], 0, 1) == [StreamClips(0, (3,))]


@settings(max_examples=25)
@given(st.data())
def test_any_tokens_come_back(data):
    bits_per_token = data.draw(st.integers(1, 64), "L")
    group_size = data.draw(st.sampled_from([g for g in range(1, 10) if bits_per_token % g == 0]), "g")
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "grid")
    frames = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3), "T of each clip")
    prior = tiny_prior(
        data.draw(st.integers(0, 1000), "seed"),
        data.draw(st.sampled_from([0.01, 1.0, 30.0]), "sharpness"),
        bits_per_token=bits_per_token,
        group_size=group_size,
        grid=grid,
        context_frames=data.draw(st.integers(1, 3), "context"),
    )
    clips = [random_bits(prior, 1, num, seed).numpy()[0] for seed, num in enumerate(frames)]
    lanes = data.draw(st.integers(len(clips), len(clips) + 2), "lanes")
    _, decoded = code(PriorCoder(prior, lanes=lanes), clips, lanes - len(clips))
    assert all(np.array_equal(one, other) for one, other in zip(decoded, clips, strict=True))


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize("bits_and_group", [(18, 9), (12, 4)])
def test_a_payload_takes_what_the_prior_says(sharpness, bits_and_group):
    prior = tiny_prior(1, sharpness, bits_per_token=bits_and_group[0], group_size=bits_and_group[1], grid=(6, 8))
    clips = drawn_clips(prior, 4, 3)
    stream, _ = code(PriorCoder(prior, lanes=5), clips)
    entropy = sum(-float(prior.log_prob(torch.from_numpy(clip[None])).double().sum()) for clip in clips)
    expected = entropy / math.log(2) / 8
    assert abs(len(stream) - expected) <= 0.005 * expected + 8
    # What the prior expects takes less than what it does not.
    strange = [~clip for clip in clips]
    assert len(code(PriorCoder(prior, lanes=5), strange)[0]) > len(stream)


def test_a_token_worked_out_by_hand():
    """Two symbols of one bit, all with frequencies of a quarter and three quarters of 2^24."""
    prior = tiny_prior(bits_per_token=2, group_size=1, grid=(1, 1), max_frames=1)
    with torch.no_grad():
        prior.head_logits.zero_()
        prior.head_bias.copy_(torch.tensor([[0.0, math.log(3)]] * 2))
    weights = frequencies(PriorSteps(prior, 1, 1).step(None))
    # A quarter of 2^24 - 2 is 4,194,303.5; the symbol that is rounded up is the likelier one.
    assert weights.tolist() == [[4_194_303.0, 12_582_911.0]]
    bits = np.array([[[[True, True]]]])
    # The interval is the upper nine sixteenths; the first word inside it begins with 0x70.
    stream, _ = code(PriorCoder(prior, lanes=1), [bits])
    assert int.from_bytes(stream.ljust(4, b"\0"), "little") >= 0x70000000


@given(st.integers(1, 300), st.floats(0, 1000), st.integers(0, 99))
def test_frequencies_are_whole_and_sum_up(num_symbols, scale, seed):
    logits = torch.randn(3, num_symbols + 1, generator=torch.Generator().manual_seed(seed)) * scale
    weights = frequencies(logits)
    free = (1 << FREQUENCY_BITS) - logits.shape[1]
    assert weights.dtype == np.float32 and (weights == np.floor(weights)).all() and (weights >= 0).all()
    assert weights.astype(np.float64).sum(1).tolist() == [free] * 3


def test_constriction_codes_with_exactly_these_frequencies():
    """n symbols of frequency f take n * log2(2^24 / f) bits; a frequency one off would show after so many."""
    family = constriction.stream.model.Categorical(perfect=False)
    weights = np.array([[0, 2, (1 << FREQUENCY_BITS) - 3 - 2]], np.float32)
    for symbol, frequency in ((0, 1), (1, 3), (2, (1 << FREQUENCY_BITS) - 4)):
        count = 20_000 if frequency < 10 else 4_000_000
        encoder = constriction.stream.queue.RangeEncoder()
        model = constriction.stream.model.Categorical(weights[0], perfect=False)
        encoder.encode(np.full(count, symbol, np.int32), model)
        expected = count * math.log2((1 << FREQUENCY_BITS) / frequency)
        assert abs(encoder.num_bits() - expected) <= 64 + 1e-6 * expected
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(np.array([1], np.int32), family, weights)
    decoder = constriction.stream.queue.RangeDecoder(encoder.get_compressed())
    assert decoder.decode(family, weights).tolist() == [1]


def test_probabilities_that_are_no_numbers_are_refused():
    with pytest.raises(CheckpointError, match="not finite"):
        frequencies(torch.tensor([[0.0, math.nan]]))


def test_a_stream_does_not_depend_on_the_other_lanes():
    """The decoder of one file of many has nothing of the others."""
    prior = tiny_prior(layers=2)
    clips = list(random_bits(prior, 6, 2).numpy())
    coder = PriorCoder(prior, lanes=6)
    runs = [StreamClips(lane, (2,)) for lane in range(6)]
    (together,) = coder.encode([(runs, [[clip] for clip in clips])])
    for lane, (clip, stream) in enumerate(zip(clips, together, strict=True)):
        alone, decoded = code(coder, [clip], lane)
        assert alone == stream and np.array_equal(decoded[0], clip)
    longer = random_bits(prior, 1, 3).numpy()[0]
    (beside,) = coder.encode([([StreamClips(0, (3,)), StreamClips(1, (2,))], [[longer], [clips[1]]])])
    assert beside[1] == together[1]


def test_streams_do_not_depend_on_the_number_of_threads():
    prior = tiny_prior(layers=2, width=64)
    blocks = [([StreamClips(0, (2, 2))], [list(random_bits(prior, 2, 2, seed).numpy())]) for seed in range(6)]
    assert list(PriorCoder(prior, lanes=2, threads=1).encode(blocks)) == list(
        PriorCoder(prior, lanes=2, threads=3).encode(blocks)
    )


@pytest.mark.parametrize("lanes", [1, 3, 32])
def test_another_number_of_lanes_changes_bytes_at_most_and_never_tokens(lanes):
    """It changes the shape of the products, so perhaps the last digit of a probability; files record it."""
    prior = tiny_prior(layers=2)
    clip = random_bits(prior, 1, 3).numpy()[0]
    stream, decoded = code(PriorCoder(prior, lanes=lanes), [clip])
    assert np.array_equal(decoded[0], clip)
    assert abs(len(stream) - len(code(PriorCoder(prior, lanes=2), [clip])[0])) <= 4


@settings(max_examples=20)
@given(st.binary(max_size=40))
def test_a_garbled_stream_gives_tokens_or_none_and_ends(stream):
    prior = tiny_prior()
    ((decoded,),) = PriorCoder(prior, lanes=2).decode([([StreamClips(0, (1, 2))], [stream])])
    assert decoded is None or [clip.shape for clip in decoded] == [(1, 2, 3, 18), (2, 2, 3, 18)]


def test_lanes_that_cannot_be_are_refused():
    prior = tiny_prior()
    clip = random_bits(prior, 1, 1).numpy()[0]
    with pytest.raises(SpecError, match="lanes is 0"):
        PriorCoder(prior, lanes=0)
    for runs in ([StreamClips(1, (1, 1))], [StreamClips(0, (1, 1)), StreamClips(1, (1,))]):
        with pytest.raises(SpecError, match="do not fit 2 lanes"):
            list(PriorCoder(prior, lanes=2).encode([(runs, [[clip] * len(run.frames) for run in runs])]))
