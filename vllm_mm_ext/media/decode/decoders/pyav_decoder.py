"""The PyAV backend: it decodes planned runs in parallel and tells each frame by its timestamp."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vllm_mm_ext.media.decode.decoders.base import Decoder, thumbnail_size
from vllm_mm_ext.media.decode.decoders.read_plan import Run, keys_of, plan_runs, split_lanes
from vllm_mm_ext.media.decode.decoders.reader import (
    Emit,
    Read,
    Reader,
    SeekMissError,
    picture_bytes,
    read_in_order,
    read_planned,
)
from vllm_mm_ext.media.decode.left_out import LostReferencesError
from vllm_mm_ext.media.decode.picture import write_rgb, write_thumbnail
from vllm_mm_ext.media.types import AS_PLAYERS, MediaInfo, PacketTable, PictureRules

# Threads that decode parts of one file; more of them only add seeks and picture buffers.
_MAX_LANES = 8
# There are more parts than threads, so that a thread that is done early takes another part. Each
# part opens the file again, which costs a millisecond.
_PARTS_PER_LANE = 2
# Planned passes over a file: from the keyframes that the container names, from those at which
# decoding has not failed, and from those at which it has begun.
_PASSES = 3


class PyAVDecoder(Decoder):
    """The default backend: see ``Decoder`` for the contract.

    Pictures of more than ``max_pixels`` are never returned, whatever the container said of them.

    The decoder keeps the pictures of the thumbnails that it makes, as they were decoded, and
    ``decode`` takes from them what it can.
    """

    name = "pyav"

    def __init__(
        self, max_pixels: int, *, picture: PictureRules = AS_PLAYERS, keep_bytes: int = 0
    ) -> None:
        super().__init__(max_pixels, picture=picture, keep_bytes=keep_bytes)
        self._kept: dict[int, VideoFrame] = {}  # By row of the packet table.
        self._room = keep_bytes
        self._lock = threading.Lock()  # Guards both.

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
        video = info.video
        assert video is not None
        assert out.shape[1:3] == (size or (video.height, video.width))
        rows, first = np.unique(indices, return_index=True)
        position = dict(zip(rows.tolist(), first.tolist(), strict=True))

        def emit(row: int, frame: VideoFrame, converter: VideoReformatter) -> None:
            write_rgb(frame, converter, video, self._picture, out[position[row]])

        at_hand = self._emit_kept(rows, emit, threads)
        seen.update(at_hand)
        others = rows[~np.isin(rows, list(at_hand))]
        decoded = self._read(path, info, others, emit, threads, seen) | at_hand
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
        keep: Collection[int],
    ) -> npt.NDArray[np.uint8]:
        video, table = info.video, info.packets
        assert video is not None
        assert table is not None
        height, width = thumbnail_size(info, edge)
        rows, where = np.unique(indices, return_inverse=True)
        small = np.zeros((len(rows), height * 3 // 2, width), np.uint8)
        position = {row: i for i, row in enumerate(rows.tolist())}
        # A second pass over a file that stays open would be a seek; over one that has to be read
        # from its start, it would be all that comes before.
        kept = set(keep) if table.exact and self.kept is None else set(position)

        beside = _OneEach()

        def emit(row: int, frame: VideoFrame, converter: VideoReformatter) -> None:
            write_thumbnail(frame, (converter, beside.converter), video, small[position[row]])
            if row in kept:
                self._keep(row, frame)

        decoded = self._read(path, info, rows, emit, threads, set())
        self._kept = {row: frame for row, frame in self._kept.items() if row in decoded}
        for i, row in enumerate(rows.tolist()):
            if row not in decoded and i:
                small[i] = small[i - 1]
        return small[where]

    def _emit_kept(self, rows: npt.NDArray[np.int64], emit: Emit, threads: int) -> set[int]:
        """Hand on those of ``rows`` that are kept, and let go of all pictures."""
        kept, self._kept = self._kept, {}
        at_hand = {row: kept[row] for row in rows.tolist() if row in kept}
        del kept
        _emit_all(at_hand, emit, threads)
        return set(at_hand)

    def _keep(self, row: int, frame: VideoFrame) -> None:
        num_bytes = picture_bytes(frame)
        with self._lock:
            # A later pass over the file may bring the right picture after a wrong one.
            known = self._kept.pop(row, None) is not None
            if known or num_bytes <= self._room:
                self._room -= 0 if known else num_bytes
                self._kept[row] = frame

    def _read(
        self,
        path: str,
        info: MediaInfo,
        rows: npt.NDArray[np.int64],
        emit: Emit,
        threads: int,
        seen: set[int],
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
        if self.kept is not None and self.kept.take_turn():
            decoded = self.kept.read(rows, emit, seen)
            rows = rows[~np.isin(rows, list(decoded))]
        if not len(rows):
            return decoded
        true_keys: set[int] = set()
        false_keys: set[int] = set()
        key_of = dict(zip(rows.tolist(), keys_of(table, rows).tolist(), strict=True))

        def add(found: set[int]) -> list[int]:
            """Note what was decoded; returns what is missing.

            A keyframe that does not decode, though decoding began before it, is damaged, and so are
            the frames that follow it.
            """
            lost = false_keys - seen
            decoded.update(row for row in found if key_of[row] not in lost)
            if lost:
                shown = np.array(sorted(seen), np.int64)
                damaged = np.isin(keys_of(table, shown), list(lost))
                seen.difference_update(shown[damaged].tolist())
            return [row for row in rows.tolist() if row not in decoded]

        missing = rows.tolist()
        for number in range(_PASSES if table.exact else 0):
            if not missing:
                return decoded
            starts = table.is_key
            if number == _PASSES - 1:
                starts = _only(starts, true_keys)
            elif number:
                starts = starts & ~_only(starts, false_keys)
            one = _Pass(
                path, video.index, self._max_pixels, replace(table, is_key=starts), number > 0
            )
            read = one.run(np.array(missing, np.int64), emit, threads)
            true_keys |= read.true_keys
            false_keys |= read.false_keys
            seen |= read.shown
            missing = add(read.decoded)
            # A second pass knows how far the decoder reorders pictures: what is missing then,
            # though decoding began at the right places, is damaged.
            if number and not read.false_keys:
                return decoded
        if missing:
            with Reader(path, video.index, self._max_pixels, threads, guess=True) as reader:
                add(read_in_order(reader, table, missing, emit, seen))
        return decoded


class _OneEach(threading.local):
    """A further converter for each thread."""

    def __init__(self) -> None:
        self.converter = VideoReformatter()


@dataclass(frozen=True)
class _Pass:
    """One planned pass over a file.

    Attributes:
        path: The file.
        stream: Index of its video stream.
        max_pixels: Most pixels of a picture.
        table: Its packet table, with exact timestamps.
        guess: See ``open_container``.
    """

    path: str
    stream: int
    max_pixels: int
    table: PacketTable
    guess: bool

    def run(self, rows: npt.NDArray[np.int64], emit: Emit, threads: int) -> Read:
        """Decode rows (unique, increasing) in several threads."""
        parts = split_lanes(self.table, rows, _PARTS_PER_LANE * min(threads, _MAX_LANES))
        lanes = min(threads, _MAX_LANES, len(parts))
        each = max(1, threads // lanes)
        if lanes == 1:
            return self._lane(rows, emit, each)
        # `map`, as a future that lies in a frame of its own error's traceback would be a reference
        # cycle, which keeps pictures.
        with ThreadPoolExecutor(lanes) as pool:
            results = list(pool.map(lambda part: self._lane(part, emit, each), parts))
        return Read(*(set[int]().union(*column) for column in zip(*results, strict=True)))

    def _lane(self, rows: npt.NDArray[np.int64], emit: Emit, threads: int) -> Read:
        """Decode one part."""
        runs = plan_runs(self.table, rows)
        plans = [runs]
        if any(run.seek for run in runs):
            # To read past packets takes longer than a seek, but it cannot miss.
            plans.append([run._replace(seek=False) for run in runs])
        for plan in plans:
            try:
                try:
                    return self._planned(plan, emit, threads, leave_out=True)
                except LostReferencesError:
                    return self._planned(plan, emit, threads, leave_out=False)
            except SeekMissError:
                pass
        return Read(set(), set(), {run.key for run in runs}, set())

    def _planned(self, plan: Sequence[Run], emit: Emit, threads: int, *, leave_out: bool) -> Read:
        with Reader(self.path, self.stream, self.max_pixels, threads, guess=self.guess) as reader:
            return read_planned(reader, self.table, plan, emit, leave_out=leave_out)


def _only(is_key: npt.NDArray[np.bool_], rows: set[int]) -> npt.NDArray[np.bool_]:
    """Of the keyframes, those of the given rows."""
    return is_key & np.isin(np.arange(len(is_key)), list(rows))


def _emit_all(frames: Mapping[int, VideoFrame], emit: Emit, threads: int) -> None:
    """Hand on frames that are decoded already, in several threads."""
    lanes = min(threads or os.cpu_count() or 1, _MAX_LANES, len(frames))
    if not lanes:
        return

    def lane(rows: Sequence[int]) -> None:
        converter = VideoReformatter()
        for row in rows:
            emit(row, frames[row], converter)

    rows = list(frames)
    if lanes == 1:
        lane(rows)
        return
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(lane, [rows[number::lanes] for number in range(lanes)]))
