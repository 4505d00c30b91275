"""The decord backend, for the files in which decord finds the right frames."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.decode.container import describe, open_container
from vllm_mm_ext.media.decode.decoders.base import Decoder, UnsuitableFileError
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.pixel_limit import ffmpeg_limit
from vllm_mm_ext.media.types import MediaInfo

# decord's seeks return wrong pictures for open GOPs, for B frames in MPEG-4 part 2 and for MPEG-TS
# (checked against sequential decoding), so decord gets only these codecs and containers, and only
# with closed GOPs.
_CODECS = frozenset({"h264", "vp8", "vp9", "av1"})
_CONTAINERS = frozenset({"mov", "matroska"})
# Where more packets than this lie behind a frame, decord2 3.4.0 serves an earlier picture, without
# an error, if the frame's keyframe is far away (found with 2 h files of GOP 250).
_MOST_PACKETS = 10_000
# Frames per call of decord: this bounds the size of the copy that decord returns.
_BATCH = 8


class DecordDecoder(Decoder):
    """decord2's ``VideoReader``; see ``Decoder`` for the contract."""

    name = "decord"

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
        import decord

        check_suitable(info)
        _check_first_picture(path, info, self._max_pixels)
        assert info.packets is not None
        height, width = size or (-1, -1)
        try:
            reader = decord.VideoReader(path, width=width, height=height, num_threads=threads)
            _check_timeline(reader, info)
            for begin in range(0, len(indices), _BATCH):
                batch = reader.get_batch(indices[begin : begin + _BATCH].tolist()).asnumpy()
                out[begin : begin + len(batch)] = batch
        except (decord.DECORDError, RuntimeError, AssertionError, ValueError) as error:
            raise UnsuitableFileError(f"decord: {error}") from error
        seen.update(indices.tolist())
        return np.arange(len(indices), dtype=np.int64)

    def _thumbnails(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        edge: int,
        threads: int,
        keep: Collection[int],
    ) -> npt.NDArray[np.uint8]:
        # decord always converts to RGB; PyAV reads the luma plane alone.
        return PyAVDecoder(self._max_pixels).thumbnails(path, info, indices, edge, threads, keep)


def check_suitable(info: MediaInfo) -> None:
    """Refuse the kinds of files that decord is known to decode wrongly.

    Args:
        info: The file's probe, with its packet table.

    Raises:
        UnsuitableFileError: The file is of such a kind.
    """
    video, table = info.video, info.packets
    assert video is not None
    assert table is not None
    if video.codec not in _CODECS or info.container.split(",")[0] not in _CONTAINERS:
        raise UnsuitableFileError(f"decord is not exact for {video.codec} in {info.container}")
    if len(table) > _MOST_PACKETS:
        raise UnsuitableFileError(f"decord is not exact past {_MOST_PACKETS} packets")
    if not table.exact or not video.plain:
        raise UnsuitableFileError("decord needs exact timestamps and a plain picture")
    latest = np.maximum.accumulate(table.order)
    if (latest > table.order)[table.is_key].any():
        raise UnsuitableFileError("decord is not exact for open GOPs")


def _check_first_picture(path: str, info: MediaInfo, max_pixels: int) -> None:
    """Refuse a file whose pictures are not of the size that its container says.

    decord has no limit on pixels, so PyAV, which has one, decodes the first picture before decord.
    """
    assert info.video is not None
    with open_container(path, max_pixels=max_pixels) as container:
        if len(container.streams.video) > 1:
            raise UnsuitableFileError("decord chooses the stream by itself")
        stream = container.streams[info.video.index]
        stream.codec_context.options = {"max_pixels": str(ffmpeg_limit(max_pixels))}
        try:
            picture = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise UnsuitableFileError(f"the first picture: {describe(error)}") from error
    size = (picture.width, picture.height) if isinstance(picture, av.VideoFrame) else None
    if size != (info.video.width, info.video.height):
        raise UnsuitableFileError("the pictures are not of the size that the container says")


def _check_timeline(reader: Any, info: MediaInfo) -> None:
    """Refuse a file whose frames decord counts or times otherwise than the packet table does."""
    table = info.packets
    assert table is not None
    if len(reader) != len(table):
        raise UnsuitableFileError(f"decord counts {len(reader)} frames, the file {len(table)}")
    starts = reader.get_frame_timestamp(np.arange(len(table)))[:, 0]
    own = (table.pts - table.pts[0]) * table.time_base
    if np.abs(starts - starts[0] - own).max() > 1e-3:
        raise UnsuitableFileError("decord's timestamps differ from the container's")
