"""A view is a box of whole pixels of the upright source, resized to exactly size x size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import pipeline.preprocess
from pipeline.preprocess import (
    Box,
    SplitMix64,
    check_engine,
    choose_box,
    choose_view,
    resize_box,
    stored_box,
    turn_upright,
    upright_size,
    view_seed,
)
from schemas.errors import SpecError
from schemas.jobspec import PreprocessSpec


def photo(height: int, width: int) -> np.ndarray:
    """A smooth picture with some texture, without symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(9 * x + 5 * y + phase) + 0.3 * np.sin(40 * x * y + phase) for phase in (0.0, 1.0, 2.0)]
    return (127 + 90 * np.stack(waves, axis=-1)).clip(0, 255).astype(np.uint8)


def store(upright_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """The stored picture that the EXIF standard shows as `upright_HWC`."""
    turned = {
        1: upright_HWC,
        2: upright_HWC[:, ::-1],
        3: upright_HWC[::-1, ::-1],
        4: upright_HWC[::-1],
        5: upright_HWC.transpose(1, 0, 2),
        6: np.rot90(upright_HWC, 1),  # shown by turning clockwise, so stored turned counter-clockwise
        7: upright_HWC[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright_HWC, -1),
    }
    return np.ascontiguousarray(turned[orientation])


def test_the_generator_gives_the_published_numbers():
    assert SplitMix64(1234567).next_uint64() == 6457827717110365317


def test_view_seeds_are_pinned():
    # Worked out with numpy's wrapping integers; a change here changes every random crop ever made.
    def splitmix(state: int) -> np.uint64:
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def by_hand(seed: int, key: str, view: int) -> int:
        key_hash = np.uint64(0xCBF29CE484222325)
        for byte in key.encode():
            key_hash = (key_hash ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        return int(splitmix(int(splitmix(seed) ^ key_hash)) ^ splitmix(view))

    pinned = {
        (0, "", 0): 0xB9015EB6816A3CE3,
        (0, "000001", 0): 0xBBF131307099706B,
        (0, "000001", 1): 0xC8DBB4E58286E105,
        (7, "photos/naïve-日本語", 3): 0x8C14919103F2EC12,
        (2**63 - 1, "a", 63): 0x9297478126DE924E,
    }
    with np.errstate(over="ignore"):
        assert {arguments: by_hand(*arguments) for arguments in pinned} == pinned
    assert {arguments: view_seed(*arguments) for arguments in pinned} == pinned


def test_random_views_depend_on_seed_key_and_view_alone():
    spec = PreprocessSpec(size=32, crop="random", views=4, flip=0.5, seed=3)
    keys = [f"sample-{number}" for number in range(50)]
    forwards = {(key, view): choose_view(640, 480, spec, key, view) for key in keys for view in range(4)}
    backwards = {(key, view): choose_view(640, 480, spec, key, view) for key in reversed(keys) for view in (3, 1, 0, 2)}
    assert forwards == backwards
    assert len({view.box for view in forwards.values()}) > 190
    assert 70 < sum(view.flipped for view in forwards.values()) < 130
    other_seed = spec.model_copy(update={"seed": 4})
    assert choose_view(640, 480, other_seed, keys[0], 0) != forwards[keys[0], 0]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1, 4000), (5000, 7), (17, 17)])
def test_random_boxes_are_squares_inside_of_the_source_within_the_scale(size):
    spec = PreprocessSpec(size=32, crop="random", random_scale=(0.3, 0.9))
    for number in range(200):
        x, y, width, height = choose_view(*size, spec, f"{number}", 0).box
        assert width == height
        assert 0 <= x <= size[0] - width
        assert 0 <= y <= size[1] - height
        assert max(1, round(0.3 * min(size))) <= width <= max(1, round(0.9 * min(size)))


def test_random_boxes_reach_every_edge():
    boxes = [choose_box(5, 4, "random", scale=0.5, along_x=place, along_y=place) for place in (0.0, 0.9999999)]
    assert boxes == [Box(0, 0, 2, 2), Box(3, 2, 2, 2)]


def test_centred_and_whole_boxes():
    assert choose_box(640, 480, "center") == Box(80, 0, 480, 480)
    assert choose_box(7, 4, "center") == Box(1, 0, 4, 4)
    assert choose_box(640, 480, "exact") == Box(0, 0, 640, 480)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_the_upright_source_is_the_same_pixels_however_it_is_stored(orientation):
    upright_HWC = photo(30, 46)
    stored_HWC = store(upright_HWC, orientation)
    height, width = stored_HWC.shape[:2]
    assert upright_size(width, height, orientation) == (46, 30)
    whole = turn_upright(torch.from_numpy(stored_HWC).permute(2, 0, 1), orientation)
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), upright_HWC)

    box = Box(11, 3, 20, 14)
    x, y, box_width, box_height = stored_box(box, width, height, orientation)
    cut_CHW = torch.from_numpy(stored_HWC[y : y + box_height, x : x + box_width]).permute(2, 0, 1)
    assert np.array_equal(turn_upright(cut_CHW, orientation).permute(1, 2, 0).numpy(), upright_HWC[3:17, 11:31])


@pytest.mark.parametrize("filter", ["lanczos", "bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_torch_and_pillow_differ_by_rounding_only(filter, size):
    pixels_HWC = photo(90, 130)
    box = Box(20, 5, 80, 80)
    ours, pillows = (
        resize_box(pixels_HWC, box, (size, size), filter, engine).short() for engine in ("torch", "pillow")
    )
    assert ours.shape == pillows.shape == (3, size, size)
    assert (ours - pillows).abs().max() <= 2


@pytest.mark.parametrize("engine", ["torch", "pillow"])
def test_pixels_outside_of_the_box_do_not_matter(engine):
    pixels_HWC = photo(60, 60)
    box = Box(20, 10, 30, 30)
    other_HWC = np.full_like(pixels_HWC, 255)
    other_HWC[10:40, 20:50] = pixels_HWC[10:40, 20:50]
    resized, of_other = (resize_box(pixels, box, (24, 24), "lanczos", engine) for pixels in (pixels_HWC, other_HWC))
    assert torch.equal(resized, of_other)
    assert resized.is_contiguous()
    assert resized.dtype == torch.uint8


def test_a_box_of_the_right_size_is_copied_exactly():
    pixels_HWC = photo(40, 50)
    resized_CHW = resize_box(pixels_HWC, Box(6, 4, 32, 32), (32, 32), "lanczos", "torch")
    assert np.array_equal(resized_CHW.permute(1, 2, 0).numpy(), pixels_HWC[4:36, 6:38])


@pytest.mark.parametrize("shape", [(4000, 1), (1, 4000), (5000, 7)])
@pytest.mark.parametrize("crop", ["center", "exact"])
def test_extreme_shapes_stay_small(shape, crop):
    pixels_HWC = np.zeros((*shape, 3), np.uint8)
    box = choose_box(shape[1], shape[0], crop)
    tracemalloc.start()
    frame_CHW = resize_box(pixels_HWC, box, (256, 256), "lanczos", "pillow")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frame_CHW.shape == (3, 256, 256)
    assert peak < 20e6
    assert torch.equal(
        resize_box(pixels_HWC, choose_box(shape[1], shape[0], crop), (256, 256), "lanczos", "torch"), frame_CHW
    )


def test_a_torch_without_the_filter_is_refused_with_the_remedy(monkeypatch):
    def interpolate(*arguments, **options):
        raise NotImplementedError("antialias with mode lanczos")

    monkeypatch.setattr(pipeline.preprocess.F, "interpolate", interpolate)
    with pytest.raises(SpecError, match=r"engine.*pillow.*bicubic"):
        check_engine("lanczos", "torch")
    check_engine("lanczos", "pillow")
