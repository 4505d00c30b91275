"""The PyAV backend: it decodes planned runs in parallel and tells each frame by its timestamp."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.decoders.base import Decoder, thumbnail_size
from vllm_mm_ext.media.decode.decoders.read_plan import Run, plan_runs, split_lanes
from vllm_mm_ext.media.decode.geometry import decoder_of
from vllm_mm_ext.media.decode.picture import write_gray, write_rgb
from vllm_mm_ext.media.types import MediaInfo, PacketTable

# Receives a decoded frame: row of the packet table, picture, converter of the calling thread.
Emit = Callable[[int, VideoFrame, VideoReformatter], None]

# Threads that decode parts of one file; more of them only add seeks and picture buffers.
_MAX_LANES = 8
# There are more parts than threads, so that a thread that is done early takes another part. Each
# part opens the file again, which costs a millisecond.
_PARTS_PER_LANE = 2
# A decoder returns frames in presentation order: a frame is missing for good when the decoder has
# returned this many later ones.
_PATIENCE = 32


class _DistrustError(Exception):
    """The decoder returned something else than the container promised."""


class PyAVDecoder(Decoder):
    """The default backend: see ``Decoder`` for the contract.

    FFmpeg refuses pictures of more than ``max_pixels``, whatever the container said of them.
    """

    name = "pyav"

    def _decode(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        size: tuple[int, int] | None,
        out: npt.NDArray[np.uint8],
        threads: int,
    ) -> npt.NDArray[np.int64]:
        video = info.video
        assert video is not None
        assert out.shape[1:3] == (size or (video.height, video.width))
        rows, first = np.unique(indices, return_index=True)
        position = dict(zip(rows.tolist(), first.tolist(), strict=True))

        def emit(row: int, frame: VideoFrame, converter: VideoReformatter) -> None:
            write_rgb(frame, converter, video, self._picture, out[position[row]])

        decoded = self._read(path, info, rows, emit, threads)
        for i, row in enumerate(indices.tolist()):
            if row in decoded and position[row] != i:
                out[i] = out[position[row]]
        return np.flatnonzero(np.isin(indices, sorted(decoded)))

    def _thumbnails(
        self,
        path: str,
        info: MediaInfo,
        indices: npt.NDArray[np.int64],
        edge: int,
        threads: int,
    ) -> npt.NDArray[np.uint8]:
        video = info.video
        assert video is not None
        height, width = thumbnail_size(info, edge)
        rows, where = np.unique(indices, return_inverse=True)
        small = np.zeros((len(rows), height, width), np.uint8)
        position = {row: i for i, row in enumerate(rows.tolist())}

        def emit(row: int, frame: VideoFrame, converter: VideoReformatter) -> None:
            write_gray(frame, converter, video, small[position[row]])

        decoded = self._read(path, info, rows, emit, threads)
        for i, row in enumerate(rows.tolist()):
            if row not in decoded and i:
                small[i] = small[i - 1]
        return small[where]

    def _read(
        self,
        path: str,
        info: MediaInfo,
        rows: npt.NDArray[np.int64],
        emit: Emit,
        threads: int,
    ) -> set[int]:
        """Decode ``rows`` (unique, increasing).

        Returns:
            The rows that could be decoded.
        """
        table, video = info.packets, info.video
        assert table is not None
        assert video is not None
        threads = threads or os.cpu_count() or 1
        decoded: set[int] = set()
        if table.exact and len(rows):
            parts = split_lanes(table, rows, _PARTS_PER_LANE * min(threads, _MAX_LANES))
            lanes = min(threads, _MAX_LANES, len(parts))
            each = max(1, threads // lanes)
            if lanes == 1:
                decoded = self._lane(path, info, rows, emit, each)
            else:
                with ThreadPoolExecutor(lanes) as pool:
                    jobs = [pool.submit(self._lane, path, info, p, emit, each) for p in parts]
                    decoded = set().union(*(job.result() for job in jobs))
        missing = [row for row in rows.tolist() if row not in decoded]
        if missing:
            with _Reader(path, video.index, self._max_pixels, threads, guess=True) as reader:
                decoded |= _sequential(reader, table, missing, emit)
        return decoded

    def _lane(
        self,
        path: str,
        info: MediaInfo,
        rows: npt.NDArray[np.int64],
        emit: Emit,
        threads: int,
    ) -> set[int]:
        """Decode one part; empty where the file's packet table turns out to be wrong."""
        assert info.packets is not None
        assert info.video is not None
        with _Reader(path, info.video.index, self._max_pixels, threads) as reader:
            try:
                return _planned(reader, info.packets, plan_runs(info.packets, rows), emit)
            except _DistrustError:
                return set()


class _Reader:
    """One open file and its decoder, for one thread."""

    def __init__(
        self, path: str, stream: int, max_pixels: int, threads: int, *, guess: bool = False
    ) -> None:
        self._opened = open_container(path, max_pixels=max_pixels, guess=guess)
        self._stream_index = stream
        self._max_pixels = max_pixels
        self._threads = threads
        self.converter = VideoReformatter()

    def __enter__(self) -> _Reader:
        self._container: InputContainer = self._opened.__enter__()
        self._stream = self._container.streams[self._stream_index]
        self._context = decoder_of(self._stream)
        self._context.options = {"max_pixels": str(self._max_pixels)}
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO"
        self._packets = self._demux()
        self._skip: Literal["DEFAULT", "NONREF"] = "DEFAULT"
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _demux(self) -> Iterator[Packet[Any]]:
        return iter(self._container.demux(self._stream))

    def read(self) -> Packet[Any] | None:
        """Next packet with data; None at the end of the file, or where the file is unreadable."""
        try:
            while (packet := next(self._packets, None)) is not None:
                if packet.size:
                    return packet
        except av.FFmpegError:
            pass
        return None

    def decode(self, packet: Packet[Any] | None, *, needed: bool = True) -> list[VideoFrame]:
        """Give the decoder a packet.

        Args:
            packet: The packet; None asks for all frames that the decoder still holds.
            needed: If false, the decoder may drop the packet when no other frame refers to it.

        Returns:
            The frames that are ready; none for a broken packet.
        """
        skip: Literal["DEFAULT", "NONREF"] = "DEFAULT" if needed else "NONREF"
        if skip != self._skip:
            self._context.skip_frame = skip
            self._skip = skip
        try:
            return list(self._context.decode(packet))
        except av.EOFError:
            return []
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            return []

    def flush(self) -> None:
        """Make the decoder forget all pictures, which every jump in the file needs.

        Without that, an H.264 decoder takes the gap in frame numbers at an open GOP for loss and
        holds pictures back. The decoder must have returned all its frames before.
        """
        self._context.flush_buffers()

    def seek(self, pts: int) -> None:
        """Go to the last keyframe at or before ``pts``."""
        try:
            self._container.seek(pts, stream=self._stream, backward=True)
        except av.FFmpegError as error:
            raise _DistrustError from error
        self._packets = self._demux()


def _planned(reader: _Reader, table: PacketTable, runs: list[Run], emit: Emit) -> set[int]:
    """Decode the runs and check that the decoder returns what the packet table says.

    Raises:
        _DistrustError: A seek missed, or a "keyframe" does not decode as one. Frames emitted
            before that may be wrong.
    """
    pts = table.pts.tolist()
    row_of = {p: row for row, p in enumerate(pts)}
    order = table.order.tolist()
    decoded: set[int] = set()
    entered: set[int] = set()  # keyframes decoding began at, not seen yet

    def take(frames: list[VideoFrame]) -> None:
        for frame in frames:
            row = row_of.get(frame.pts, -1) if frame.pts is not None else -1
            if row in entered:
                entered.discard(row)
                if not frame.key_frame:
                    raise _DistrustError
            if row in wanted and row not in decoded:
                emit(row, frame, reader.converter)
                decoded.add(row)

    wanted = {row for run in runs for row in run.wanted}
    for run in runs:
        if run is not runs[0]:
            take(reader.decode(None))
            reader.flush()
        if run.seek:
            reader.seek(pts[run.key])
        if run.start:
            entered.add(run.key)
        running = run.start == 0
        while (packet := reader.read()) is not None:
            row = row_of.get(packet.pts, -1) if packet.pts is not None else -1
            at = order[row] if row >= 0 else -1
            if not running:
                if at > run.start:
                    raise _DistrustError
                running = at == run.start
                if not running:
                    continue
            take(reader.decode(packet, needed=row in wanted or at == run.start))
            if at >= run.stop:
                break
    take(reader.decode(None))
    if entered:
        raise _DistrustError
    return decoded


def _sequential(reader: _Reader, table: PacketTable, rows: list[int], emit: Emit) -> set[int]:
    """Decode everything from the start of the file, as stock loaders do, up to the last wanted row.

    A frame's timestamp tells its row; in a file without usable timestamps, counting does.
    """
    row_of = {p: row for row, p in enumerate(table.pts.tolist())} if table.exact else {}
    wanted, last = set(rows), rows[-1]
    decoded: set[int] = set()
    count = late = 0
    draining = False
    while not draining and len(decoded) < len(wanted) and late < _PATIENCE:
        packet = reader.read()
        draining = packet is None
        for frame in reader.decode(packet):
            row = row_of.get(frame.pts, -1) if row_of and frame.pts is not None else count
            count += 1
            late += row > last
            if row in wanted and row not in decoded:
                emit(row, frame, reader.converter)
                decoded.add(row)
    return decoded
