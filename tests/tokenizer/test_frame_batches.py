"""Batches of frames that are held: one kind each, every item once an epoch, resumable, shared out exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from schemas.errors import SpecError
from tests.tiny_training import CPU, frames, settings
from tokenizer.frame_batches import HeldFrames, centre_frames, read_arrays
from tokenizer.trainer import held_batches


@pytest.mark.parametrize("colour_detail", [0.0, 0.6])
def test_batches_are_of_one_kind_come_once_per_epoch_and_do_not_depend_on_the_number_of_processes(colour_detail):
    config = settings(
        sampling={"clip_share": 0.5, "colour_detail": colour_detail}, optimizer={"batch_images": 3, "batch_clips": 1}
    )
    values = np.arange(50, 170, 10, dtype=np.uint8)
    arrays = [values[:, None, None, None, None] * np.ones((1, 1, 40, 40, 3), np.uint8), frames(4, 5)]

    def source(number, num_ranks, batch=3, clips=1):
        optimizer = replace(config.optimizer, batch_images=batch, batch_clips=clips)
        return HeldFrames(arrays, image_size=32, max_frames=3, sampling=config.sampling, optimizer=optimizer, seed=3,
                          rank=number, num_ranks=num_ranks)  # fmt: skip

    alone, ranks = source(0, 1, 6, 2), [source(0, 2), source(1, 2)]
    seen = []
    for _ in range(30):
        whole = alone.next_batch()
        assert torch.equal(whole, torch.cat([rank.next_batch() for rank in ranks]))
        assert whole.shape[1:] in ((1, 32, 32, 3), (3, 32, 32, 3)) and whole.dtype == torch.uint8
        if whole.shape[1] == 1:
            # Noise is added to some: a picture of one value keeps it on average.
            seen += (whole.flatten(1).float().mean(1) / 10 - 5).round().int().tolist()
    assert 24 <= len(seen) <= 150  # images are about half of the batches
    for epoch in range(len(seen) // 12):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert seen[:12] != seen[12:24]


def test_a_source_that_is_loaded_goes_on_with_the_same_batches():
    config = settings()
    first, second = (held_batches(config, [frames(10, 1), frames(5, 4)], CPU) for _ in range(2))
    for _ in range(7):
        first.next_batch()
    second.load(json.loads(json.dumps(first.state())))
    assert all(torch.equal(first.next_batch(), second.next_batch()) for _ in range(7))


def test_frames_of_a_wrong_kind_are_refused_in_one_line(tmp_path):
    config = settings()
    for array, words in [
        (frames(2, 1, 24), "24 x 24 px, smaller than the tokenizer's 32 px"),
        (frames(2, 1)[0], r"uint8 \[1, 40, 40, 3\]; frames are uint8"),
        (frames(2, 1).astype(np.float32), "float32"),
    ]:
        with pytest.raises(SpecError, match=words):
            held_batches(config, [array], CPU)
    with pytest.raises(SpecError, match="cannot be read as NumPy arrays"):
        read_arrays(tmp_path / "missing.npz")
    assert centre_frames(frames(2, 5, 48), image_size=32, max_frames=3).shape == (2, 3, 32, 32, 3)
