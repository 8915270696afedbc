"""A device that runs out of memory gets smaller batches of the same samples, and loses none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.encode import BatchLimits, CpuEncoder, CudaEncoder
from tests.tiny_corpus import bsq_environment
from tokenizer import from_pretrained
from tokenizer.bsqvit import BSQViT, PackedTokens

TINY = "untrained:vit-tiny-32-l18"


def frames(num_rows: int, num_frames: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(0, 256, (num_rows, num_frames, 3, 32, 32), dtype=torch.uint8, generator=generator)


class SmallDevice(BSQViT):
    """A model whose device has room for so many frames and no more."""

    room = 10

    def encode_packed(self, frames_BTCHW: torch.Tensor) -> PackedTokens:
        self.tried = [*getattr(self, "tried", []), tuple(frames_BTCHW.shape[:2])]
        if frames_BTCHW.shape[0] * frames_BTCHW.shape[1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().encode_packed(frames_BTCHW)


@pytest.fixture
def model() -> BSQViT:
    return from_pretrained(TINY)


def test_out_of_memory_halves_the_batch_of_that_shape_and_gives_the_same_tokens(model: BSQViT) -> None:
    expected = {shape: CpuEncoder(model, 1).submit(frames(*shape), shape[0]).wait() for shape in [(32, 1), (2, 8)]}
    model.__class__ = SmallDevice
    encoder = CpuEncoder(model, 1)
    encoded = encoder.submit(frames(32), 32).wait()
    assert (encoded.packed == expected[32, 1].packed).all() and encoded.finite.all()
    assert model.tried == [(32, 1), (16, 1)] + [(8, 1)] * 4
    model.tried = []
    encoder.submit(frames(32), 32).wait()
    assert model.tried == [(8, 1)] * 4, "remembered"
    model.tried = []
    encoded = encoder.submit(frames(2, 8), 2).wait()
    assert model.tried == [(2, 8), (1, 8), (1, 8)], "another shape has room of its own"
    assert (encoded.packed == expected[2, 8].packed).all()


NO_MEMORY = [torch.OutOfMemoryError(), MemoryError(), RuntimeError("could not create a primitive")]


@pytest.mark.parametrize("rows", [1, 3, 7, 33])
@pytest.mark.parametrize("no_memory", NO_MEMORY, ids=["device", "Python", "oneDNN"])
def test_every_row_is_encoded_once_and_in_order(rows: int, no_memory: Exception) -> None:
    def encode(part: torch.Tensor) -> list[int]:
        if len(part) > 2:
            raise no_memory
        return part.flatten().tolist()

    batch = torch.arange(rows).reshape(rows, 1)
    for limits in (BatchLimits(), BatchLimits()):
        parts = limits.encode(batch, encode, lambda: None) + limits.encode(batch, encode, lambda: None)
        assert [value for part in parts for value in part] == 2 * list(range(rows))


def test_a_row_that_does_not_fit_alone_is_told() -> None:
    def encode(part: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        BatchLimits().encode(frames(4), encode, lambda: None)


def test_other_failures_are_not_taken_for_want_of_memory() -> None:
    calls = []

    def encode(part: torch.Tensor) -> None:
        calls.append(len(part))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        BatchLimits().encode(frames(4), encode, lambda: None)
    assert calls == [4]


REAL_LIMIT = """
import resource, torch
from pipeline.encode import CpuEncoder
from tokenizer import from_pretrained
torch.set_num_threads(1)
model = from_pretrained("untrained:vit-tiny-32-l18")
frames = torch.randint(0, 256, (2048, 1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
encoder = CpuEncoder(model, 1)
expected = torch.cat([torch.from_numpy(encoder.submit(part, 64).wait().packed) for part in frames.split(64)])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
packed = encoder.submit(frames, 2048).wait().packed
assert (torch.from_numpy(packed) == expected).all()
print(encoder._limits._most)
"""


def test_a_real_limit_of_memory_is_met_with_smaller_batches() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL_LIMIT], capture_output=True, text=True, env=bsq_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{1: ") and int(done.stdout.split()[1].rstrip("}\n")) < 2048


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_without_room_gets_smaller_batches(model: BSQViT) -> None:
    device = torch.device("cuda", 0)
    encoder = CudaEncoder(model, device)
    batch = frames(8192)
    expected = np.concatenate([encoder.submit(part, len(part)).wait().packed for part in batch.split(64)])
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(device) + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        packed = encoder.submit(batch, len(batch)).wait().packed
        most = encoder._limits._most[1]
        again = encoder.submit(batch, len(batch)).wait().packed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert most < len(batch) and encoder._limits._most[1] == most, "remembered"
    assert (packed == again).all()
    # Batches of another shape may flip bits whose latents lie near zero.
    assert np.unpackbits(packed ^ expected).mean() < 0.01
