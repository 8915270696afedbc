"""Measure how many tokens a second a prior encodes and decodes.

python -m benchmarks.coding_speed --prior DIR --clips 64 --lanes 32 --rounds 3"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch

from tokenizer.prior_checkpoint import build_prior, read_prior
from tokenizer.prior_coder import PriorCoder, cut_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", default="untrained:prior-small", help="speed does not depend on the weights")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="blocks at a time; 0: one for each CPU")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    prior = build_prior(read_prior(given.prior))
    config = prior.config
    shape = (given.clips, given.frames, *config.grid, config.bits_per_token)
    clips = list(np.random.default_rng(0).random(shape) > 0.5)
    coder = PriorCoder(prior, lanes=given.lanes, threads=given.threads)
    runs = cut_runs([given.frames] * given.clips, 0, given.lanes)
    firsts = np.cumsum([0, *(len(run.frames) for run in runs)])
    blocks = [([run], [clips[first : first + len(run.frames)]]) for run, first in zip(runs, firsts, strict=False)]
    num_tokens = given.clips * given.frames * config.tokens_per_frame
    parameters = sum(value.numel() for value in prior.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, torch {torch.__version__}, {len(os.sched_getaffinity(0))} CPUs")
    print(f"{given.clips} clips of {given.frames} frames in blocks of {given.lanes} lanes: {num_tokens:,} tokens")
    for number in range(given.rounds):
        begun, cpu = time.perf_counter(), time.process_time()
        streams = list(coder.encode(blocks))
        encoded, cpu_encoded = time.perf_counter(), time.process_time()
        decoded = list(coder.decode([(block, stream) for (block, _), stream in zip(blocks, streams, strict=True)]))
        ended = time.perf_counter()
        for (_, (sent,)), (received,) in zip(blocks, decoded, strict=True):
            assert received is not None and np.array_equal(sent, received)
        print(
            f"round {number + 1}: encode {num_tokens / (encoded - begun):,.0f} tokens/s, "
            f"decode {num_tokens / (ended - encoded):,.0f} tokens/s; "
            f"encode {num_tokens / (cpu_encoded - cpu):,.0f} for each second of CPU time"
        )


if __name__ == "__main__":
    main()
