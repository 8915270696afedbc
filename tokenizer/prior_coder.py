"""Tokens as a bitstream: a range coder with the probabilities of a prior.

Clips are coded side by side, one in each lane of a *block*.  Encoder and decoder walk the same way (`_walk`): symbol
by symbol, over all lanes together, always with the same number of lanes, empty ones too, on one thread.  So both
compute the same probabilities, bit for bit, on the same kind of device.  Other processors may add up in another
order; streams therefore carry a checksum of their tokens (`schemas/bsqfile.py`).

What a range coder needs are integer frequencies.  The rule: the probabilities of the K symbols of a group, a softmax
in float64 of the fp32 logits, are multiplied with 2^24 - K and rounded down; what is missing to 2^24 - K is added to
the largest, the first of several; then every symbol gets one more.  So frequencies sum up to 2^24 and none is 0.

Shape letters: B lanes, T frames, h w the grid, M tokens of a clip, L bits per token, G groups, K symbols of a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.errors import BsqError, CheckpointError, SpecError
from tokenizer.codes import bits_to_groups, groups_to_bits
from tokenizer.prior import TokenPrior
from tokenizer.prior_steps import PriorSteps

FREQUENCY_BITS = 24
"""The precision of constriction's default coders."""
DEFAULT_LANES = 32
MAX_LANES = 255
_WORD_BYTES = 4

Bits = npt.NDArray[np.bool_]
"""[T, h, w, L]"""
Weights = npt.NDArray[np.float32]
Symbols = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StreamClips:
    """The clips of one stream: the frames of each; they lie in neighbouring lanes from `first_lane` on."""

    first_lane: int
    frames: tuple[int, ...]

    @property
    def end_lane(self) -> int:
        return self.first_lane + len(self.frames)


def cut_runs(frames: Sequence[int], first_lane: int, lanes: int) -> list[StreamClips]:
    """Lay clips into lanes from `first_lane` on; at the last lane they go on in lane 0 of the next block."""
    bounds = [0, *range(lanes - first_lane, len(frames), lanes), len(frames)]
    return [
        StreamClips(0 if start else first_lane, tuple(frames[start:end]))
        for start, end in pairwise(bounds)
        if end > start
    ]


Block = Sequence[StreamClips]
"""Streams whose clips are coded side by side; their lanes do not overlap."""


class PriorCoder:
    """Encodes and decodes blocks of clips, several blocks at a time on a CPU."""

    def __init__(self, prior: TokenPrior, *, lanes: int = DEFAULT_LANES, threads: int = 0) -> None:
        """`threads`: blocks that are coded at a time on a CPU; 0 takes the CPUs of this process.

        Raises SpecError for a number of lanes that cannot be, and where constriction is not installed."""
        if not 1 <= lanes <= MAX_LANES:
            raise SpecError(f"lanes is {lanes}; it must be from 1 to {MAX_LANES}.")
        self.prior, self.lanes = prior.eval(), lanes
        self._constriction = _import_constriction()
        on_cpu = prior.place.device.type == "cpu"
        self._threads = (threads or _usable_cpus()) if on_cpu else 1

    def encode(self, blocks: Iterable[tuple[Block, Sequence[Sequence[Bits]]]]) -> Iterator[list[bytes]]:
        """The streams of each block, given the bits of the clips of each of its streams."""
        return self._each(lambda pair: self._encode_block(*pair), blocks)

    def decode(self, blocks: Iterable[tuple[Block, Sequence[bytes]]]) -> Iterator[list[list[Bits] | None]]:
        """The bits of the clips of each stream of each block; None for a stream that cannot be what was coded."""
        return self._each(lambda pair: self._decode_block(*pair), blocks)

    def _encode_block(self, block: Block, clips: Sequence[Sequence[Bits]]) -> list[bytes]:
        self._require_lanes(block)
        config, stream = self.prior.config, self._constriction.stream
        num_tokens = max(max(each.frames) for each in block) * config.tokens_per_frame
        symbols_BMG = np.zeros((self.lanes, num_tokens, config.num_groups), np.int64)
        for each, several in zip(block, clips, strict=True):
            for lane, bits in enumerate(several, each.first_lane):
                symbols_MG = bits_to_groups(bits, config.group_size).reshape(-1, config.num_groups)
                symbols_BMG[lane, : len(symbols_MG)] = symbols_MG
        encoders = [stream.queue.RangeEncoder() for _ in block]
        family = stream.model.Categorical(perfect=False)

        def code(number: int, lanes: npt.NDArray[np.int64], token: int, group: int, weights: Weights) -> Symbols:
            symbols: Symbols = symbols_BMG[lanes, token, group]
            encoders[number].encode(symbols.astype(np.int32), family, weights)
            return symbols

        self._walk(block, code)
        words = [encoder.get_compressed() for encoder in encoders]
        # A decoder reads zeros behind the end.
        return [each.astype(f"<u{_WORD_BYTES}").tobytes().rstrip(b"\0") for each in words]

    def _decode_block(self, block: Block, streams: Sequence[bytes]) -> list[list[Bits] | None]:
        self._require_lanes(block)
        config, stream = self.prior.config, self._constriction.stream
        num_tokens = max(max(each.frames) for each in block) * config.tokens_per_frame
        symbols_BMG = np.zeros((self.lanes, num_tokens, config.num_groups), np.int64)
        padded = [each + bytes(-len(each) % _WORD_BYTES) for each in streams]
        decoders = [
            stream.queue.RangeDecoder(np.frombuffer(each, f"<u{_WORD_BYTES}").astype(np.uint32)) for each in padded
        ]
        family = stream.model.Categorical(perfect=False)
        impossible: set[int] = set()

        def code(number: int, lanes: npt.NDArray[np.int64], token: int, group: int, weights: Weights) -> Symbols:
            symbols: Symbols = np.zeros(len(lanes), np.int64)
            if number not in impossible:
                try:
                    symbols = decoders[number].decode(family, weights).astype(np.int64)
                # So constriction says that no encoder writes this; other streams of the block may be sound.
                except AssertionError:
                    impossible.add(number)
            symbols_BMG[lanes, token, group] = symbols
            return symbols

        self._walk(block, code)
        return [None if number in impossible else self._clips(each, symbols_BMG) for number, each in enumerate(block)]

    def _clips(self, run: StreamClips, symbols_BMG: Symbols) -> list[Bits]:
        config = self.prior.config
        return [
            groups_to_bits(symbols_BMG[lane, : frames * config.tokens_per_frame], config.group_size).reshape(
                frames, *config.grid, config.bits_per_token
            )
            for lane, frames in enumerate(run.frames, run.first_lane)
        ]

    def _walk(self, block: Block, code: Callable[[int, npt.NDArray[np.int64], int, int, Weights], Symbols]) -> None:
        """Go through all symbols; `code` is told stream, lanes, token, group and frequencies, and gives the symbols."""
        config, device = self.prior.config, self.prior.place.device
        lengths = [np.array(each.frames) * config.tokens_per_frame for each in block]
        num_tokens = max(int(each.max()) for each in lengths)
        steps = PriorSteps(self.prior, self.lanes, num_tokens // config.tokens_per_frame)
        symbols_B: Tensor | None = None
        for token in range(num_tokens):
            # A clip that has ended makes room in its stream, not in the arithmetic.
            active = [
                (number, each.first_lane + np.flatnonzero(length > token))
                for number, (each, length) in enumerate(zip(block, lengths, strict=True))
                if length.max() > token
            ]
            for group in range(config.num_groups):
                weights_BK = frequencies(steps.step(symbols_B))
                chosen_B = np.zeros(self.lanes, np.int64)
                for number, lanes in active:
                    chosen_B[lanes] = code(number, lanes, token, group, weights_BK[lanes])
                symbols_B = torch.from_numpy(chosen_B).to(device)

    def _require_lanes(self, block: Block) -> None:
        ordered = sorted(block, key=lambda each: each.first_lane)
        overlap = any(first.end_lane > second.first_lane for first, second in pairwise(ordered))
        if overlap or ordered[0].first_lane < 0 or ordered[-1].end_lane > self.lanes:
            raise SpecError(f"the clips of a block do not fit {self.lanes} lanes.")

    def _each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        if self.prior.place.device.type != "cpu":
            yield from map(work, items)
            return
        # One thread for a block: sums come out the same however many CPUs there are, and blocks run side by side.
        pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        with _one_thread(), pool:
            remaining = iter(items)
            while window := list(islice(remaining, 2 * self._threads)):
                yield from pool.map(work, window)


def frequencies(logits_BK: Tensor) -> Weights:
    """Frequencies less one of each symbol, whole numbers in float32 [B, K]: exactly what constriction makes of them.

    Its fast categorical model scales what it is given to 2^24 - K in all and adds one to each; these have that sum,
    so that the factor is 1.  Raises CheckpointError where a logit is not finite."""
    free = (1 << FREQUENCY_BITS) - logits_BK.shape[1]
    counts_BK = (logits_BK.double().softmax(-1) * free).floor_()
    missing_B = free - counts_BK.sum(-1)
    largest_B = counts_BK.argmax(-1, keepdim=True)
    counts_BK.scatter_add_(-1, largest_B, missing_B.unsqueeze(-1))
    weights: Weights = counts_BK.float().cpu().numpy()
    if not np.isfinite(weights).all():
        raise CheckpointError("the prior's probabilities are not finite; its weights are of no use.")
    return weights


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise BsqError("constriction is not installed; it codes the bits: pip install constriction") from error
    return constriction


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
