"""Stage 2 of ``adaptive``: the planes of thumbnails, by which they are compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Luma, Cb and Cr of thumbnails, float32 ``[k, h, w]`` each in levels of 255.
Planes = tuple[npt.NDArray[np.float32], ...]


def planes(thumbnails: npt.NDArray[np.uint8]) -> Planes:
    """What thumbnails are compared by.

    Args:
        thumbnails: uint8 ``[k, h * 3 / 2, w]``: Y, then Cb and Cr at half the size.
    """
    count, lines, width = thumbnails.shape
    height = lines * 2 // 3
    chroma = thumbnails[:, height:].reshape(count, 2, height // 2, width // 2)
    luma = _smooth(thumbnails[:, :height].astype(np.float32))
    return luma, *np.ascontiguousarray(chroma.swapaxes(0, 1), np.float32)


def pixels(seen: Planes) -> npt.NDArray[np.float32]:
    """Every second pixel of each second line, float32 ``[k, p]`` in levels."""
    return np.concatenate([plane[:, ::2, ::2].reshape(len(plane), -1) for plane in seen], axis=1)


def _smooth(frames: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """2x2 box filter, which halves the sensor noise that the reduction in size has left."""
    rows = frames[:, 1:] + frames[:, :-1]
    sums = rows[:, :, 1:] + rows[:, :, :-1]
    sums /= 4
    return sums
