"""A mixture is a function of the sample number: exact shares, nothing lost, any place without walking there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mixture import MAX_SAMPLES, MAX_WEIGHT_SUM, Mixture, integer_weights
from schemas.errors import SpecError


@dataclass
class Info:
    bits: int = 18
    weight_sha256: str = "a" * 64


@dataclass
class Dataset:
    """What a mixture asks of a dataset."""

    length: int
    info: Info = field(default_factory=Info)

    def __len__(self) -> int:
        return self.length


def mixture(*pairs, stop="first"):
    return Mixture({f"source {n}": (Dataset(length), weight) for n, (length, weight) in enumerate(pairs)}, stop)


sources = st.lists(
    st.tuples(st.integers(1, 60), st.one_of(st.integers(1, 12), st.floats(1e-3, 1e3, allow_nan=False))),
    min_size=1,
    max_size=9,
)


def test_seven_to_three_worked_out_by_hand():
    """The left source has floor((7 n + 5) / 10) of the first n samples: 0 1 1 2 3 4 4 5 6 6 7."""
    source, position = mixture((100, 0.7), (100, 0.3)).schedule(0, 12)
    assert source.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert position.tolist() == [0, 0, 1, 2, 3, 1, 4, 5, 2, 6, 7, 3]
    assert (source.dtype, position.dtype) == (np.int32, np.int64)


@given(sources, st.integers(0, 1 << 41), st.integers(0, 300))
def test_each_source_gives_its_samples_in_order_without_gap(pairs, start, count):
    mixed = mixture(*pairs, stop="never")
    source, position = mixed.schedule(start, count)
    before, after = mixed.counts(np.array([start, start + count])).T
    for number in range(len(pairs)):
        assert position[source == number].tolist() == list(range(before[number], after[number]))
    assert before.sum() == start


@given(sources, st.integers(0, 1 << 41), st.integers(1, 50), st.integers(0, 49))
def test_any_place_is_found_without_walking_there(pairs, start, count, within):
    mixed = mixture(*pairs, stop="never")
    source, position = mixed.schedule(start, count)
    within %= count
    alone = mixed.schedule(start + within, 1)
    assert (alone[0][0], alone[1][0]) == (source[within], position[within])


@given(sources, st.integers(1, 1 << 41))
def test_each_source_has_its_share_to_within_half_a_sample_for_each_fork(pairs, samples):
    mixed = mixture(*pairs, stop="never")
    counts = mixed.counts(np.array([samples]))[:, 0].tolist()
    forks = (len(pairs) - 1).bit_length()
    for count, weight in zip(counts, mixed.weights, strict=True):
        # Integers: |count - samples * weight / sum| <= forks / 2
        assert abs(count * sum(mixed.weights) - samples * weight) * 2 <= forks * sum(mixed.weights)


@given(sources)
def test_the_end_is_where_the_samples_say(pairs):
    """`first` stops before anything repeats and could not go on; `all` stops with the last sample not yet seen."""
    lengths = np.array([length for length, _ in pairs])
    first = mixture(*pairs, stop="first")
    end = first.num_samples
    counts = first.counts(np.array([end, end + 1])).T
    assert (counts[0] <= lengths).all() and (counts[1] > lengths).any()
    every = mixture(*pairs, stop="all")
    end = every.num_samples
    counts = every.counts(np.array([end - 1, end])).T
    assert (counts[0] < lengths).any() and (counts[1] >= lengths).all()
    assert mixture(*pairs, stop="never").num_samples is None


@given(sources, st.data())
def test_the_inverse_is_exact(pairs, data):
    mixed = mixture(*pairs, stop="never")
    source = data.draw(st.integers(0, len(pairs) - 1))
    count = data.draw(st.integers(1, 1000))
    samples = mixed.first_after(source, count)
    if samples <= MAX_SAMPLES:
        assert mixed.counts(np.array([samples - 1, samples]))[source].tolist() == [count - 1, count]
    assert mixed.first_after(source, 0) == 0


def test_weights_are_taken_as_they_are_written():
    assert integer_weights({"a": 0.7, "b": 0.3}) == (7, 3)
    assert integer_weights({"a": 2, "b": 4, "c": 6}) == (1, 2, 3)
    assert integer_weights({"a": 1e-3, "b": 1}) == (1, 1000)


@settings(max_examples=50)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_weights_beyond_64_bits_become_shares_near_to_them(weights):
    integers = integer_weights({str(number): weight for number, weight in enumerate(weights)})
    total = sum(integers)
    assert total <= MAX_WEIGHT_SUM and min(integers) >= 1
    for integer, weight in zip(integers, weights, strict=True):
        assert abs(integer / total - weight / sum(weights)) < 1e-4


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(SpecError, match="the weight of 'source 1' is"):
        mixture((3, 1), (3, weight))


def test_what_cannot_be_mixed_is_refused_in_a_line():
    with pytest.raises(SpecError, match="at least one dataset"):
        Mixture({})
    with pytest.raises(SpecError, match="'source 1' has no samples"):
        mixture((3, 1), (0, 1))
    with pytest.raises(SpecError, match="Did you mean 'first'"):
        mixture((3, 1), stop="frist")
    with pytest.raises(SpecError, match="'a' has tokens of 18 bits and 'b' of 36"):
        Mixture({"a": (Dataset(3), 1), "b": (Dataset(3, Info(bits=36)), 1)})
    with pytest.raises(SpecError, match="tokenizer aaaaaaaa and 'b' with bbbbbbbb"):
        Mixture({"a": (Dataset(3), 1), "b": (Dataset(3, Info(weight_sha256="b" * 64)), 1)})
    with pytest.raises(SpecError, match="they go from 0 to 2"):
        mixture((3, 1)).schedule(MAX_SAMPLES, 1)
