"""What a video decoder backend is."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.types import MediaInfo


class Decoder(Protocol):
    """Decodes chosen frames of one probed file.

    The frame returned for index ``i`` is frame ``i`` in presentation order, always: a backend
    that cannot make sure of it for a file raises ``UnsuitableFileError``.
    """

    name: str

    def decode(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        size: tuple[int, int] | None,
        out: npt.NDArray[np.uint8],
        threads: int,
    ) -> npt.NDArray[np.int64]:
        """Decode frames into ``out``.

        Args:
            path: The file.
            info: Its probe.
            indices: int64 ``[n]`` rows of ``info.packets``, sorted, may repeat.
            size: ``(height, width)`` in pixels as displayed, or None for the source's own size.
                Native 8-bit 4:2:0 frames are byte for byte those of OpenCV.
            out: uint8 ``[n, height, width, 3]`` RGB, written in place.
            threads: Decoding threads, 0 for one per core.

        Returns:
            int64 positions of ``indices`` that were decoded, increasing. Rows of ``out`` at
            other positions are undefined.

        Raises:
            UnsuitableFileError: This backend cannot decode this file exactly.
        """
        ...

    def thumbnails(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        edge: int,
        threads: int,
    ) -> npt.NDArray[np.uint8]:
        """Small gray pictures of frames, for motion scores.

        Args:
            path, info, indices, threads: As for ``decode``.
            edge: Longest edge in pixels (smaller sources are not enlarged).

        Returns:
            uint8 ``[n, h, w]``; a frame that could not be decoded repeats the one before it.
        """
        ...


class UnsuitableFileError(Exception):
    """The backend cannot promise the right frames of this file."""


def thumbnail_size(info: MediaInfo, edge: int) -> tuple[int, int]:
    """``(height, width)`` of the displayed picture shrunk to a longest edge of ``edge``."""
    assert info.video is not None
    longest = max(info.video.width, info.video.height)
    scale = min(1.0, edge / longest)
    return max(1, round(info.video.height * scale)), max(1, round(info.video.width * scale))
