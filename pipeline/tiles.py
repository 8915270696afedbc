"""Pictures of any size as tiles of one size, and back.

Shape letters: N tiles in row-major order, T frames, H W pixels of the picture, h w pixels of a tile, C colours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


def count_tiles(height: int, width: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that cover a picture."""
    return -(-height // tile[0]), -(-width // tile[1])


def cut_tiles(frames_THWC: Pixels, tile: tuple[int, int]) -> Pixels:
    """Cut frames into tiles, [N, T, h, w, C]; what lies beyond the right and lower edge repeats the last pixel."""
    height, width = frames_THWC.shape[1:3]
    rows, columns = count_tiles(height, width, tile)
    margins = ((0, 0), (0, rows * tile[0] - height), (0, columns * tile[1] - width), (0, 0))
    padded = np.pad(frames_THWC, margins, mode="edge")
    cut = padded.reshape(len(padded), rows, tile[0], columns, tile[1], -1)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4, 5).reshape(rows * columns, len(padded), *tile, -1))


def join_tiles(tiles_NThwC: npt.NDArray[np.generic], height: int, width: int) -> npt.NDArray[np.generic]:
    """Put the tiles of a picture of that size together, [T, H, W, C]."""
    num_frames, *tile = tiles_NThwC.shape[1:4]
    rows, columns = count_tiles(height, width, (tile[0], tile[1]))
    grid = tiles_NThwC.reshape(rows, columns, num_frames, *tile, -1).transpose(2, 0, 3, 1, 4, 5)
    return grid.reshape(num_frames, rows * tile[0], columns * tile[1], -1)[:, :height, :width]
