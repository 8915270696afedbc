from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from schemas.errors import CheckpointError
from tokenizer.checkpoint import weight_sha256
from tokenizer.weightfile import read_tensor_entries, weight_sha256_of_buffer


def file_of(header, body=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_hash_of_two_tensors_worked_out_by_hand():
    """SHA-256 of `["a","F32",[2]]\\n` + 8 bytes + `["b","BF16",[]]\\n` + 2 bytes, by sha256sum."""
    body = np.array([1.0, -2.0], "<f4").tobytes() + bytes.fromhex("803f")
    # Stored in the other order than hashed.
    content = file_of({"b": entry("BF16", (), (0, 2)), "a": entry(offsets=(2, 10))}, body[8:] + body[:8])
    assert weight_sha256_of_buffer(content, "here") == GOLDEN
    assert weight_sha256({"b": torch.tensor(1.0, dtype=torch.bfloat16), "a": torch.tensor([1.0, -2.0])}) == GOLDEN


GOLDEN = "6a05ea002d2c0270f179dafd5750fa8738e38a83bee3b8b5507be966c4a1a795"


def test_file_and_memory_and_model_agree(tiny):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = {name: tensor.to(dtype) for name, tensor in tiny.state_dict().items()}
        assert weight_sha256_of_buffer(save(weights, {"note": "not hashed"}), "here") == weight_sha256(weights)
    assert weight_sha256(tiny) == weight_sha256(dict(reversed(tiny.state_dict().items())))


def test_every_change_changes_the_hash():
    values = torch.arange(6.0)
    hashes = [
        weight_sha256(weights)
        for weights in (
            {"a": values},
            {"b": values},
            {"a": values.reshape(2, 3)},
            {"a": values.half()},
            {"a": values + 1},
            {"a": values[:3], "b": values[3:]},
        )
    ]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims 4,611,686,018,427,387,904 bytes"),
        (file_of(b"{nope"), "is not JSON"),
        (file_of(b"[" * 100_000), "is not JSON"),
        (file_of(b"\xff\xff"), "is not JSON"),
        (file_of([1]), "is no object"),
        (file_of({"a": [1]}), "lacks dtype, shape or data_offsets"),
        (file_of({"a": entry(dtype="F33")}, b"x" * 8), "dtype 'F33'"),
        (file_of({"a": entry(dtype=["F32"])}, b"x" * 8), r"dtype \['F32'\]"),
        (file_of({"a": entry(shape=(-2,), offsets=(0, 8))}, b"x" * 8), "impossible shape"),
        (file_of({"a": entry(shape=(1 << 50,), offsets=(0, 8))}, b"x" * 8), "impossible shape"),
        (file_of({"a": entry(shape=(True, 2))}, b"x" * 8), "impossible shape"),
        (file_of({"a": entry(shape=(3,))}, b"x" * 8), "does not fill its 8 bytes"),
        (file_of({"a": entry(offsets=(8, 0))}, b"x" * 8), "does not fill"),
        (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12), "overlaps another or leaves a gap"),
        (file_of({"a": entry(offsets=(4, 12))}, b"x" * 12), "leaves a gap"),
        (file_of({"a": entry()}, b"x" * 7), "the tensors end at byte"),
        (file_of({"a": entry()}, b"x" * 9), "the tensors end at byte"),
    ],
)
def test_damaged_files_are_refused_by_what_is_wrong(content, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tensor_entries(content, "here")
    assert str(caught.value).startswith("here: ")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_does_more_than_be_refused(data):
    content = bytearray(file_of({"a": entry(), "b": entry("U8", (3, 1), (8, 11))}, bytes(range(11))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        entries = read_tensor_entries(content, "here")
    except CheckpointError:
        return
    assert all(0 <= each.start <= each.end <= len(content) for each in entries)
