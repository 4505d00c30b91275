"""Small copies of camera frames, by which frames are compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Rows and columns of a thumbnail.
THUMBNAIL_SIDE = 32
#: Levels, of 255, by which a camera's noise changes a part of a thumbnail at most. Noise of 10
#: levels a pixel changes a part by 3 at 640x480 and by 5 at 320x240; what moves changes a part by 9
#: and more within 1/30 s.
NOISE = 4

Thumbnail = npt.NDArray[np.uint8]


def thumbnail_of(image: Image.Image) -> Thumbnail:
    """uint8 ``[THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3]`` of a whole RGB image: its brightness and its
    two differences of colour (YCbCr). Something may be as bright as what it moves across.

    Args:
        image: Of any size.
    """
    width, height = image.size
    # Whole pixels are averaged first, which is much cheaper than a box of any size.
    factors = max(1, width // THUMBNAIL_SIDE), max(1, height // THUMBNAIL_SIDE)
    small = image.reduce(factors).convert("YCbCr")
    return np.asarray(small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def change(before: Thumbnail | None, after: Thumbnail) -> int:
    """By how many levels a frame differs where it differs most; 256 from no frame.

    Args:
        before: The thumbnail of the frame before.
        after: The frame's.
    """
    if before is None:
        return 256
    return int(np.abs(after.astype(np.int16) - before).max())
