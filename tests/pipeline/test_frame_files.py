"""Frames kept as JPEG come back in place, shared ones are kept once, and damage is one line."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.frame_files import QUALITIES, write_jpeg_frames
from schemas.errors import SpecError
from tests.tiny_training import frames
from tokenizer.frame_batches import read_arrays


def test_frames_come_back_in_place_and_close(tmp_path):
    clips = frames(5, 4)
    quality, num_bytes = write_jpeg_frames({tmp_path / "clips.npz": clips}, 10_000_000)
    assert quality == QUALITIES[0] and num_bytes == (tmp_path / "clips.npz").stat().st_size
    (back,) = read_arrays(tmp_path / "clips.npz")
    assert back.shape == clips.shape and back.dtype == np.uint8
    errors = (back.astype(float) - clips).reshape(20, -1)
    assert np.abs(errors).mean() < 2
    # Each frame is nearest to its own original.
    flat = clips.reshape(20, -1).astype(float)
    distances = np.abs(back.reshape(20, 1, -1) - flat[None]).mean(2)
    assert distances.argmin(1).tolist() == list(range(20))


def test_a_frame_that_clips_share_is_kept_once(tmp_path):
    video = frames(1, 12)[0]
    overlapping = np.stack([video[start : start + 8] for start in (0, 2, 4)])
    _, shared = write_jpeg_frames({tmp_path / "shared.npz": overlapping}, 10_000_000)
    _, alone = write_jpeg_frames({tmp_path / "alone.npz": video[None]}, 10_000_000)
    assert shared < alone + 200
    (back,) = read_arrays(tmp_path / "shared.npz")
    assert np.array_equal(back[0, 2:], back[1, :6]) and np.array_equal(back[1, 2:], back[2, :6])


def test_the_best_quality_that_fits_is_taken_over_all_files(tmp_path):
    files = {tmp_path / "images.npz": frames(30, 1), tmp_path / "clips.npz": frames(4, 6, seed=1)}
    _, most = write_jpeg_frames(files, 10_000_000)
    quality, num_bytes = write_jpeg_frames(files, most - 100)
    assert QUALITIES[-1] <= quality < QUALITIES[0] and num_bytes < most
    with pytest.raises(SpecError, match=r"take [\d,]+ bytes as JPEG of quality 75, and 1,000 are left"):
        write_jpeg_frames(files, 1000)


def test_a_folder_may_hold_both_kinds_of_files(tmp_path):
    np.save(tmp_path / "images.npy", frames(2, 1))
    write_jpeg_frames({tmp_path / "clips.npz": frames(3, 4)}, 10_000_000)
    assert [array.shape[:2] for array in read_arrays(tmp_path)] == [(3, 4), (2, 1)]


@pytest.mark.parametrize("what", ["index", "ends", "jpeg", "shape", "cut"])
def test_a_damaged_file_is_one_line(tmp_path, what):
    path = tmp_path / "clips.npz"
    write_jpeg_frames({path: frames(2, 3)}, 10_000_000)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        wrong = {"index": arrays["index"] + 99, "ends": arrays["ends"] + 7, "shape": arrays["shape"][:4]}
        wrong["jpeg"] = np.where(np.arange(len(arrays["jpeg"])) < 40, 0, arrays["jpeg"]).astype(np.uint8)
        np.savez(path, **(arrays | {what: wrong[what]}))
    with pytest.raises(SpecError, match=r"clips\.npz") as refusal:
        read_arrays(path)
    assert "\n" not in str(refusal.value)
