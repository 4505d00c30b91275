"""The limit on the pixels of a picture, as clients are told of it and as FFmpeg enforces it."""

from __future__ import annotations

import math

from vllm_mm_ext.errors import MediaTooLargeError

# What FFmpeg holds against its limit is larger than the picture: sides rounded up to multiples of
# up to 64, or a scratch line (decoders of the MPEG-1 to MPEG-4 family) of the width and 280 rows.
_ROOM = 2300  # For each pixel of the side of a square: pictures 64 times as wide as high pass.
_LEAST_ROOM = 1 << 16


def ffmpeg_limit(max_pixels: int) -> int:
    """A limit for FFmpeg (``max_pixels``) that no picture of ``max_pixels`` or fewer is past.

    FFmpeg keeps pictures from taking much more memory than allowed; the pictures that it returns
    have to be held against ``max_pixels`` itself.

    Args:
        max_pixels: Most pixels of a picture.
    """
    return max_pixels + _ROOM * math.isqrt(max_pixels) + _LEAST_ROOM


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse pictures that are too large.

    Raises:
        MediaTooLargeError: A picture has more than ``max_pixels`` pixels.
    """
    if width * height > max_pixels:
        raise MediaTooLargeError(
            f"The video is {width}x{height} ({width * height} pixels a frame), "
            f"past the limit of {max_pixels} pixels.",
            parameter="video_url",
            value=f"{width}x{height}",
        )
