from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SpecError
from tokenizer import codes

KINDS = ["numpy", "torch"]


def as_kind(array, kind):
    return torch.from_numpy(np.array(array)) if kind == "torch" else array


def same(ours, expected):
    assert isinstance(ours, torch.Tensor | np.ndarray)
    np.testing.assert_array_equal(np.asarray(ours), expected)


def packed_by_hand(values, num_bits):
    """The rule of the token file as Python integers: values follow each other, least significant bit first."""
    word = sum(int(value) << (position * num_bits) for position, value in enumerate(values))
    return np.frombuffer(word.to_bytes(math.ceil(len(values) * num_bits / 8), "little"), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
class TestWorkedByHand:
    def test_three_tokens_of_three_bits(self, kind):
        """Bits 110, 001, 101 are 6, 1, 5; laid down from the lowest bit of byte 0.

        Low to high, 6 is 011, 1 is 100, 5 is 101: the row is 0111 0010 1, so byte 0 is 0b01001110, byte 1 is 1."""
        bits = as_kind(np.array([[[1, 1, 0], [0, 0, 1], [1, 0, 1]]], bool), kind)
        packed = as_kind(np.array([[0x4E, 0x01]], np.uint8), kind)
        same(codes.pack_bits(bits), packed)
        same(codes.unpack_bits(packed, 3, 3), bits)
        same(codes.bits_to_indices(bits), [[6, 1, 5]])
        same(codes.unpack_indices(packed, 3, 3), [[6, 1, 5]])

    def test_two_tokens_of_eighteen_bits(self, kind):
        """0x2ABCD and 0x12345: 0x2ABCD + (0x12345 << 18) = 0x48D16ABCD, least byte first."""
        packed = as_kind(np.array([[0xCD, 0xAB, 0x16, 0x8D, 0x04]], np.uint8), kind)
        same(codes.unpack_indices(packed, 2, 18), [[0x2ABCD, 0x12345]])
        same(codes.pack_indices(as_kind(np.array([[0x2ABCD, 0x12345]]), kind), 18), packed)

    def test_channel_zero_is_the_highest_bit_of_index_and_group(self, kind):
        bits = as_kind(np.array([[[True] + [False] * 17]]), kind)
        same(codes.bits_to_indices(bits), [[1 << 17]])
        same(codes.bits_to_groups(bits, 9), [[[256, 0]]])
        same(codes.pack_bits(bits), [[0, 0, 2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bits", range(1, 65))
class TestEveryWidth:
    @settings(max_examples=12, deadline=None)
    @given(num_tokens=st.integers(1, 40), num_rows=st.integers(0, 4), seed=st.integers(0, 1 << 32))
    def test_what_is_packed_comes_back(self, kind, num_bits, num_tokens, num_rows, seed):
        generator = np.random.default_rng(seed)
        bits = generator.random((num_rows, num_tokens, num_bits)) > generator.random()
        packed = codes.pack_bits(as_kind(bits, kind))
        values = [[int("".join(map(str, map(int, token))), 2) for token in row] for row in bits]
        for row, each in zip(np.asarray(packed), values, strict=True):
            np.testing.assert_array_equal(row, packed_by_hand(each, num_bits))
        assert packed.shape == (num_rows, codes.packed_size(num_tokens, num_bits))
        same(codes.unpack_bits(packed, num_tokens, num_bits), bits)
        if num_bits <= codes.MAX_INDEX_BITS:
            expected = np.array(values, np.int64).reshape(num_rows, num_tokens)
            indices = codes.unpack_indices(packed, num_tokens, num_bits)
            same(indices, expected)
            same(codes.bits_to_indices(as_kind(bits, kind)), expected)
            same(codes.indices_to_bits(indices, num_bits), bits)
            same(codes.pack_indices(indices, num_bits), np.asarray(packed))
        if num_bits <= 31:
            narrow = codes.unpack_indices(packed, num_tokens, num_bits, "int32")
            assert str(narrow.dtype).removeprefix("torch.") == "int32"
            same(narrow, expected)

    def test_all_ones_and_all_zeros(self, kind, num_bits):
        for value in (False, True):
            bits = as_kind(np.full((2, 33, num_bits), value), kind)
            packed = codes.pack_bits(bits)
            same(codes.unpack_bits(packed, 33, num_bits), bits)
            if num_bits <= codes.MAX_INDEX_BITS:
                expected = np.full((2, 33), ((1 << num_bits) - 1) * value)
                same(codes.unpack_indices(packed, 33, num_bits), expected)

    def test_groups_come_back(self, kind, num_bits):
        bits = as_kind(np.random.default_rng(num_bits).random((3, 5, num_bits)) > 0.5, kind)
        for group_size in (size for size in range(1, min(num_bits, 62) + 1) if num_bits % size == 0):
            groups = codes.bits_to_groups(bits, group_size)
            assert groups.shape == (3, 5, num_bits // group_size)
            same(codes.groups_to_bits(groups, group_size), bits)


@pytest.mark.parametrize("num_rows", [127, 128, 129, 300])
def test_rows_beyond_a_block_and_views_are_unpacked(num_rows):
    indices = np.random.default_rng(0).integers(0, 1 << 18, (num_rows, 16))
    packed = codes.pack_indices(indices, 18)
    same(codes.unpack_indices(packed, 16, 18), indices)
    same(codes.unpack_indices(packed[::-1], 16, 18), indices[::-1])
    wide = np.concatenate([packed, packed], axis=1)
    same(codes.unpack_indices(wide[:, : packed.shape[1]], 16, 18), indices)
    read_only = np.frombuffer(packed.tobytes(), np.uint8).reshape(packed.shape)
    same(codes.unpack_indices(read_only, 16, 18), indices)


@pytest.mark.parametrize("kind", KINDS)
class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda a: codes.pack_bits(a(np.zeros((2, 3, 18), np.uint8))), "bits are .*uint8; expected bool"),
            (lambda a: codes.pack_bits(a(np.zeros((2, 3), bool))), r"expected \[rows, tokens, 1 to 64 bits\]"),
            (lambda a: codes.pack_bits(a(np.zeros((2, 3, 65), bool))), "1 to 64 bits"),
            (lambda a: codes.bits_to_indices(a(np.zeros((2, 63), bool))), "1 to 62 bits"),
            (lambda a: codes.unpack_bits(a(np.zeros((2, 6), np.uint8)), 3, 18), r"take \[rows, 7\] bytes"),
            (lambda a: codes.unpack_bits(a(np.zeros((2, 7), np.int8)), 3, 18), "int8; expected uint8"),
            (lambda a: codes.unpack_indices(a(np.zeros((2, 7), np.uint8)), 3, 63), "from 1 to 62"),
            (lambda a: codes.unpack_indices(a(np.zeros((2, 4), np.uint8)), 1, 32, "int32"), "do not fit int32"),
            (lambda a: codes.unpack_indices(a(np.zeros((2, 0), np.uint8)), 0, 18), "num_tokens is 0"),
            (lambda a: codes.indices_to_bits(a(np.array([1 << 18])), 18), "18 bits hold 0 to 262,143"),
            (lambda a: codes.indices_to_bits(a(np.array([-1])), 18), "from -1"),
            (lambda a: codes.indices_to_bits(a(np.array([1.0])), 18), "float64; expected integers"),
            (lambda a: codes.bits_to_groups(a(np.zeros((2, 18), bool)), 4), "multiple of 4"),
        ],
    )
    def test_wrong_input_is_named(self, kind, call, words):
        with pytest.raises(SpecError, match=words):
            call(lambda array: as_kind(array, kind))
