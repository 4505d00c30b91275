"""What a video decoder backend is, and what every backend checks before it decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.decode.pixel_limit import check_pixels
from vllm_mm_ext.media.types import AS_PLAYERS, MediaInfo, PictureRules


class UnsuitableFileError(Exception):
    """The backend cannot promise the right frames of this file."""


class Decoder(ABC):
    """Decodes chosen frames of one probed file.

    The frame returned for index ``i`` is frame ``i`` in presentation order, always: a backend that
    cannot make sure of that for a file raises ``UnsuitableFileError``.

    Args:
        max_pixels: Most pixels that a picture of the file may have.
        picture: How pictures are shown.
        keep_bytes: Most bytes of decoded pictures that the decoder may keep from ``thumbnails`` for
            the next ``decode``, which then need not decode them again.

    Attributes:
        name: The backend; after a ``decode``, the one that decoded.
        note: Why a GPU that was to decode did not; empty where all went as planned.
        kept: The file, which this process keeps open between jobs and has checked; a backend may
            read it instead of opening the file anew.
    """

    name: str
    kept: KeptReader | None = None

    def __init__(
        self, max_pixels: int, *, picture: PictureRules = AS_PLAYERS, keep_bytes: int = 0
    ) -> None:
        self._max_pixels = max_pixels
        self._picture = picture
        self._keep_bytes = keep_bytes
        self.note = ""

    def decode(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        size: tuple[int, int] | None,
        out: npt.NDArray[np.uint8],
        threads: int,
        seen: set[int] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Decode frames into ``out``.

        Args:
            path: The file.
            info: Its probe.
            indices: int64 ``[n]`` rows of ``info.packets``, sorted, may repeat.
            size: ``(height, width)`` in pixels as displayed, or None for the source's own size.
                Native frames of ``plain`` video are byte for byte those of OpenCV.
            out: uint8 ``[n, height, width, 3]`` RGB, written in place.
            threads: Decoding threads, 0 for one per core.
            seen: Receives rows of ``info.packets`` that turned out to decode, wanted or not.

        Returns:
            int64 positions of ``indices`` that were decoded, increasing. Rows of ``out`` at other
            positions are undefined.

        Raises:
            UnsuitableFileError: This backend cannot decode this file exactly.
            UnreadableMediaError: The file is of no format that may be opened, or not the one that
                was probed.
            MediaTooLargeError: Its pictures have more than ``max_pixels``.
        """
        self._check(path, info)
        return self._decode(
            path, info, indices, size, out, threads, set() if seen is None else seen
        )

    def thumbnails(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        edge: int,
        threads: int,
        keep: Collection[int],
    ) -> npt.NDArray[np.uint8]:
        """Make small pictures of frames, by which the frames are compared.

        Args:
            path, info, indices, threads: As for ``decode``.
            edge: Longest edge in pixels (smaller sources are not enlarged).
            keep: Those of the indices that are likely to be decoded next: see ``keep_bytes``. A
                backend may keep others too.

        Returns:
            uint8 ``[n, h * 3 / 2, w]``: Y, then Cb and Cr at half the size, as FFmpeg packs
            yuv420p. A frame that could not be decoded repeats the one before it.

        Raises:
            UnreadableMediaError, MediaTooLargeError: As ``decode``.
        """
        self._check(path, info)
        return self._thumbnails(path, info, indices, edge, threads, keep)

    def _check(self, path: str, info: MediaInfo) -> None:
        if self.kept is None:
            check_file(path, info, self._max_pixels)

    @abstractmethod
    def _decode(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        size: tuple[int, int] | None,
        out: npt.NDArray[np.uint8],
        threads: int,
        seen: set[int],
    ) -> npt.NDArray[np.int64]:
        """As ``decode``, of a file that was checked."""

    @abstractmethod
    def _thumbnails(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        edge: int,
        threads: int,
        keep: Collection[int],
    ) -> npt.NDArray[np.uint8]:
        """As ``thumbnails``, of a file that was checked."""


def check_file(path: str, info: MediaInfo, max_pixels: int) -> None:
    """Refuse a file that a decoder must not open, whatever its own library would make of the file.

    Args:
        path: The file.
        info: Its probe.
        max_pixels: Most pixels of a picture.

    Raises:
        UnreadableMediaError: The file is of no format that may be opened, or not the one that was
            probed.
        MediaTooLargeError: The container says that the pictures have more pixels.
    """
    video = info.video
    assert video is not None
    with open_container(path, max_pixels=max_pixels) as container:
        streams = container.streams
        known = container.format.name == info.container and video.index < len(streams)
        if not known or streams[video.index].type != "video":
            raise UnreadableMediaError("The media are not what they were when they were probed.")
    check_pixels(video.width, video.height, max_pixels)


def thumbnail_size(info: MediaInfo, edge: int) -> tuple[int, int]:
    """``(height, width)``, both even, of the displayed picture shrunk to an edge of ``edge``."""
    assert info.video is not None
    longest = max(info.video.width, info.video.height)
    scale = min(1.0, edge / longest)
    height, width = (round(side * scale / 2) for side in (info.video.height, info.video.width))
    return 2 * max(1, height), 2 * max(1, width)
