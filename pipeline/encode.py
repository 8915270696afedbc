"""The encoder as the device loop sees it: planar uint8 frames in, packed tokens out."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.stub import STUB_BITS, STUB_NAME, STUB_PATCH
from schemas.errors import SpecError
from schemas.job import TokenizerRecord
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import from_pretrained
from tokenizer.codes import packed_size

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """`packed` uint8 [B, O]; `finite` bool [B]."""

    packed: npt.NDArray[np.uint8]
    finite: npt.NDArray[np.bool_]


class PendingBatch(Protocol):
    """A batch that the device works on."""

    def wait(self) -> Encoded:
        """Wait for the result."""


class Encoder(Protocol):
    """Encodes batches of one process on one device."""

    num_lanes: int
    """Threads that should call `submit`: one for a GPU, one per CPU otherwise."""
    depth: int
    """Batches that one lane may have submitted without waiting."""
    pin: bool
    """Whether frames should lie in pinned memory."""

    def submit(self, frames_BTCHW: torch.Tensor, num_rows: int) -> PendingBatch:
        """Encode the first `num_rows` of uint8 [B, T, 3, size, size]."""

    def arithmetic(self) -> dict[str, Any]:
        """What decides the last bit: device, dtype, versions."""


@dataclass(slots=True)
class _Done:
    encoded: Encoded

    def wait(self) -> Encoded:
        return self.encoded


class StubEncoder:
    """Costs next to nothing: a token is two pixels of the frame's red plane."""

    num_lanes = 1
    depth = 1
    pin = False

    def submit(self, frames_BTCHW: torch.Tensor, num_rows: int) -> PendingBatch:
        pixels = frames_BTCHW[:num_rows, :, 0].flatten(2)[:, :, :: STUB_PATCH * STUB_PATCH // (STUB_BITS // 8)]
        packed = pixels.flatten(1).contiguous().numpy()
        return _Done(Encoded(packed, np.ones(num_rows, dtype=np.bool_)))

    def arithmetic(self) -> dict[str, Any]:
        return {"device": STUB_NAME}


class BatchLimits:
    """How many rows of each shape the device has room for, learned when it runs out of memory."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def most(self, num_rows: int, num_frames: int) -> int:
        """How many of so many rows of so many frames are encoded together."""
        return min(self._most.get(num_frames, num_rows), num_rows)

    def encode(
        self, frames_BTCHW: torch.Tensor, encode: Callable[[torch.Tensor], T], free: Callable[[], object]
    ) -> list[T]:
        """Encode the rows in as few parts as there is room for, and return what `encode` gives for each.

        Out of memory, `free` is called and the same rows are tried again in halves, which are remembered: the device
        has no room for more of this shape, now or later.  Raises what `encode` raises when one row is too many."""
        num_rows, num_frames = frames_BTCHW.shape[:2]
        while True:
            most = self.most(num_rows, num_frames)
            try:
                return [encode(part_BTCHW) for part_BTCHW in torch.split(frames_BTCHW, most)]
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not _is_out_of_memory(error):
                    raise
            # Outside of the handler, which holds on to the tensors of the attempt.
            free()
            self._most[num_frames] = min(self._most.get(num_frames, num_rows), (most + 1) // 2)


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """The CPU's kernels (oneDNN) name no cause when memory for a kernel is refused, so their failures count too."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "could not create a", "could not execute a"))


class CpuEncoder:
    """Runs the model on the CPU, one batch in each lane with one thread: that scales better over cores than all
    threads on one batch, and leaves the scheduler free to give cores to decoding."""

    depth = 1
    pin = False

    def __init__(self, model: BSQViT, num_cpus: int) -> None:
        self.num_lanes = num_cpus
        self._model = model.eval()
        self._limits = BatchLimits()

    def submit(self, frames_BTCHW: torch.Tensor, num_rows: int) -> PendingBatch:
        # fp32 bits on the CPU do not depend on the batch size, so a partial batch need not be padded.
        with torch.inference_mode():
            parts = self._limits.encode(frames_BTCHW[:num_rows], self._model.encode_packed, gc.collect)
        packed_BO, finite_B = (torch.cat(part) for part in zip(*parts, strict=True))
        return _Done(Encoded(packed_BO.numpy(), finite_B.numpy()))

    def arithmetic(self) -> dict[str, Any]:
        return {
            "device": f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "dtype": str(self._model.compute_dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }


@dataclass(slots=True)
class _OnDevice:
    packed: torch.Tensor
    finite: torch.Tensor
    done: torch.cuda.Event
    num_rows: int

    def wait(self) -> Encoded:
        self.done.synchronize()
        return Encoded(self.packed[: self.num_rows].numpy(), self.finite[: self.num_rows].numpy())


class CudaEncoder:
    """Runs the model on one GPU: copies on a stream of their own, whole batches always, nothing waited for."""

    num_lanes = 1
    depth = 2
    pin = True

    def __init__(self, model: BSQViT, device: torch.device, shapes: Sequence[tuple[int, int]]) -> None:
        """`shapes` are (T, B) of the batches that come; how many rows run together decides bits on a GPU."""
        self._model = model.eval().to(device)
        self._device = device
        self._shapes = shapes
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._limits = BatchLimits()

    def submit(self, frames_BTCHW: torch.Tensor, num_rows: int) -> PendingBatch:
        # The current device belongs to the thread, and threads come and go.
        with torch.cuda.device(self._device), torch.inference_mode():
            parts = self._limits.encode(frames_BTCHW, self._encode, torch.cuda.empty_cache)
            packed_BO, finite_B = (torch.cat(part) for part in zip(*parts, strict=True))
            host_packed = torch.empty(packed_BO.shape, dtype=torch.uint8, pin_memory=True)
            host_finite = torch.empty(finite_B.shape, dtype=torch.bool, pin_memory=True)
            host_packed.copy_(packed_BO, non_blocking=True)
            host_finite.copy_(finite_B, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return _OnDevice(host_packed, host_finite, done, num_rows)

    def arithmetic(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(self._device),
            "dtype": str(self._model.compute_dtype).removeprefix("torch."),
            "batches": [[self._limits.most(rows, frames), frames] for frames, rows in self._shapes],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    def _encode(self, frames_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            on_device = frames_BTCHW.to(self._device, non_blocking=True)
        compute.wait_stream(self._copies)
        on_device.record_stream(compute)
        packed, finite = self._model.encode_packed(on_device)
        return packed, finite


def choose_device(asked: str) -> torch.device:
    """The device that "cpu", "cuda" or "cuda:1" means here.  Raises SpecError when there is no such device."""
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError("device is cuda, but torch sees no GPU here. Use device: cpu, or install torch for CUDA.")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def open_encoder(
    record: TokenizerRecord,
    folder: str,
    *,
    dtype: str,
    device: str,
    num_cpus: int,
    shapes: Sequence[tuple[int, int]],
    storage_options: Mapping[str, Any],
) -> Encoder:
    """Load the tokenizer copied to `folder` onto a device, for batches of `shapes` (T, B).

    Raises SpecError for arithmetic that the device does not have, CheckpointError for damaged weights."""
    if record.config.get("preset") == STUB_NAME:
        return StubEncoder()
    target = choose_device(device)
    compute_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    model = from_pretrained(folder, compute_dtype=compute_dtype, storage_options=storage_options)
    if target.type == "cpu":
        return CpuEncoder(model, num_cpus)
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise SpecError(f"{torch.cuda.get_device_name(target)} has no bfloat16. Start the job with dtype: float32.")
    return CudaEncoder(model, target, shapes)


def cut_tokens(packed_O: npt.NDArray[np.uint8], num_tokens: int, bits: int) -> bytes:
    """The first `num_tokens` of a row of packed tokens, spare bits of the last byte cleared."""
    num_bytes = packed_size(num_tokens, bits)
    tokens = packed_O[:num_bytes].tobytes()
    spare = num_bytes * 8 - num_tokens * bits
    return tokens if not spare else tokens[:-1] + bytes([tokens[-1] & 0xFF >> spare])


def arithmetic_id(value: dict[str, Any]) -> str:
    """Eight hex digits that name an arithmetic in commit records."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def batch_shapes(batch: int, clip_frames: int) -> Sequence[tuple[int, int]]:
    """(T, B) of the two kinds of batch: images, and clips so that their frames come near `batch`."""
    if clip_frames == 1:
        return [(1, batch)]
    return [(1, batch), (clip_frames, max(1, batch // clip_frames))]
