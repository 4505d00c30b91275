"""Small pictures of frames that a request was shown, for the operator's page."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

# Pictures of a video at most, pixels of a picture's longer side, and the quality of the JPEG files:
# 3 to 6 KB each.
MOST = 12
_EDGE = 160
_QUALITY = 60


def shown(frames: int) -> list[int]:
    """Indices of the frames of which there is a picture: the first, the last, even steps between.

    Args:
        frames: Number of frames.
    """
    if frames <= MOST:
        return list(range(frames))
    return [round(i * (frames - 1) / (MOST - 1)) for i in range(MOST)]


def strip_of(frames: npt.NDArray[np.uint8]) -> list[bytes]:
    """JPEG files of some frames.

    Args:
        frames: uint8 RGB ``[n, height, width, 3]``.
    """
    made = []
    for index in shown(len(frames)):
        picture = Image.fromarray(np.asarray(frames[index]))
        picture.thumbnail((_EDGE, _EDGE), Image.Resampling.BOX)
        file = BytesIO()
        picture.save(file, "JPEG", quality=_QUALITY)
        made.append(file.getvalue())
    return made
