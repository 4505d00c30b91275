"""A video file that stays open and positioned between reads of consecutive spans of it.

A read goes on where the one before ended: there is no seek, no keyframe to begin at, and the
pictures in which two spans overlap are kept. Thus spans that follow each other cost what one decode
of the file costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame

from vllm_mm_ext.media.decode.decoders.read_plan import Run, plan_runs
from vllm_mm_ext.media.decode.decoders.reader import (
    LOOK_AHEAD,
    LOOK_AHEAD_BYTES,
    Emit,
    Reader,
    SeekMissError,
    first_packet,
    picture_bytes,
)
from vllm_mm_ext.media.decode.decoders.row_index import RowIndex
from vllm_mm_ext.media.decode.left_out import LeftOut, LostReferencesError
from vllm_mm_ext.media.types import PacketTable

# Seconds at the end of a span of which pictures are kept, until it is seen by how much spans
# overlap, and at most.
_OVERLAP_S, _MOST_OVERLAP_S = 2.0, 10.0
# Where at least so many pictures a second are wanted of the end of a span, all of them are decoded,
# as the next span may want others.
_DENSE_FPS = 1.0
# Packets after the last one wanted that a decoder may be given before it returns the picture: it
# holds back what it decodes at a time, and what it reorders.
_MOST_BEHIND = 96
# Decode position after that of every packet.
_END = 1 << 62


class KeptReader:
    """One file with its decoder, for one thread at a time.

    Args:
        path: The file, which must stay what it is.
        stream: Index of its video stream.
        table: Its packet table. Where timestamps are not exact, rows are counted, and the file is
            decoded from its start.
        max_pixels: Most pixels of a picture.
        threads: Decoding threads.
    """

    def __init__(
        self, path: str, stream: int, table: PacketTable, max_pixels: int, threads: int
    ) -> None:
        self._path = path
        self._stream = stream
        self._table = table
        self._index = RowIndex(table)
        self._max_pixels = max_pixels
        self._threads = threads
        self._reader: Reader | None = None
        # The decoder can go on with the packet after this decode position, and returns the rows
        # after `_shown` then; -1 where it cannot.
        self._fed = self._shown = -1
        self._left_out: LeftOut | None = None
        self._leaves_out = table.exact
        self._doubtful: set[int] = set()  # Rows that the decoder returns without their references.
        self._pictures: dict[int, VideoFrame] = {}  # By row.
        self._room = 0
        self._span = (0.0, 0.0)
        self._overlap_s = _OVERLAP_S
        self._tail = 0
        self._due = False

    def begin(self, span: tuple[float, float], keep_bytes: int) -> None:
        """Tell the span that the next ``read`` is about.

        Args:
            span: Start and end in seconds on the picture's clock.
            keep_bytes: Most bytes of pictures to keep for the span after it.
        """
        start, end = span
        if self._span[0] < start < self._span[1]:
            overlap = self._span[1] - start
            self._overlap_s = min(max(overlap, _OVERLAP_S), _MOST_OVERLAP_S)
        self._span = span
        self._tail = self._row_at(end - self._overlap_s)
        first = self._row_at(start)
        self._pictures = {row: kept for row, kept in self._pictures.items() if row >= first}
        self._room = keep_bytes - self.num_bytes
        self._due = True

    def take_turn(self) -> bool:
        """Whether the span that was told has not been read yet; it counts as read from now on."""
        due, self._due = self._due, False
        return due

    def read(self, rows: npt.NDArray[np.int64], emit: Emit, seen: set[int]) -> set[int]:
        """Decode rows of the span.

        Args:
            rows: int64 ``[n]`` rows of the packet table, increasing.
            emit: Receives the frames, and perhaps wrong ones for rows that are not returned.
            seen: Receives rows that turned out to decode, wanted or not.

        Returns:
            The rows that were decoded. Where some are missing, another way to read the file may
            find them.
        """
        decoded: set[int] = set()
        try:
            reader = self._reader or self._open()
            for row in rows.tolist():
                picture = self._pictures.get(row)
                if picture is not None:
                    emit(row, picture, reader.converter)
                    decoded.add(row)
            seen.update(self._pictures)
            left = rows[~np.isin(rows, list(decoded))]
            asked, runs = set(left.tolist()), self._planned(left)
            for number, run in enumerate(runs):
                decoded |= self._decode(run, number == len(runs) - 1, asked, emit, seen)
        except SeekMissError:
            self.close()
        except LostReferencesError:
            self._leaves_out = False
            self.close()
        except BaseException:
            self.close()
            raise
        return decoded

    def close(self) -> None:
        """Close the file and forget the pictures; a later read opens it again."""
        self._pictures = {}
        self._fed = self._shown = -1
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.__exit__(None, None, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pictures that are kept."""
        return sum(map(picture_bytes, self._pictures.values()))

    def _open(self) -> Reader:
        counting = not self._table.exact
        reader = Reader(self._path, self._stream, self._max_pixels, self._threads, guess=counting)
        self._reader = reader.__enter__()
        self._left_out = reader.left_out(self._table) if self._leaves_out else None
        self._used = False
        return self._reader

    def _row_of(self, frame: VideoFrame) -> int:
        """Row of the next frame that the decoder returned; -1 if the packet table lacks it."""
        return self._index.place(frame.pts)[0] if self._table.exact else self._shown + 1

    def _row_at(self, second: float) -> int:
        """Row of the frame on screen at a moment."""
        return max(0, int(np.searchsorted(self._table.time, second + 1e-6, side="right")) - 1)

    def _planned(self, rows: npt.NDArray[np.int64]) -> list[Run]:
        """Runs for rows; the first begins where the decoder stands, if that serves."""
        if not len(rows):
            return []
        tail = np.arange(self._tail, int(rows[-1]) + 1)
        if np.count_nonzero(rows >= self._tail) >= _DENSE_FPS * self._overlap_s:
            past = self._shown if int(rows[0]) > self._shown else -1
            rows = np.union1d(rows, tail[tail > past])
        if not self._table.exact:
            goes_on = self._fed >= 0 and int(rows[0]) > self._shown
            start = self._fed + 1 if goes_on else 0
            return [Run(-1, start, _END, tuple(rows.tolist()), seek=False)]
        runs = plan_runs(self._table, rows, self._fed)
        first = runs[0]
        if self._fed >= 0 and first.start <= self._fed + 1 and int(rows[0]) > self._shown:
            runs[0] = first._replace(start=self._fed + 1, seek=False)
        elif first.start <= self._fed or (self._fed < 0 and self._used):
            runs[0] = first._replace(seek=True)
        return runs

    def _decode(
        self, run: Run, is_last: bool, asked: set[int], emit: Emit, seen: set[int]
    ) -> set[int]:
        """Decode a run; after the last one the decoder can go on.

        Returns:
            The rows asked for that were decoded.
        """
        goes_on = 0 <= self._fed == run.start - 1
        if goes_on:
            assert self._reader is not None
            packet = self._reader.read()
        else:
            self._shown = -1
            packet = self._first_packet(run)
            self._doubtful.clear()
            if self._left_out is not None:
                self._left_out.restart()
        reader = self._reader
        assert reader is not None
        self._used, self._fed = True, -1
        decoded: set[int] = set()
        began = goes_on or run.start == 0
        for frames, fed in self._frames(packet, run, is_last):
            for frame in frames:
                row = self._row_of(frame)
                began = began or (row == run.key and frame.key_frame)
                if not began or row < 0:
                    continue
                self._shown = max(self._shown, row)
                if row < len(self._table):
                    seen.add(row)
                if row in asked and row not in decoded:
                    emit(row, frame, reader.converter)
                    decoded.add(row)
                if row >= self._tail and row not in self._doubtful:
                    self._keep(row, frame)
            if fed >= 0 and self._shown >= run.wanted[-1]:
                self._fed = fed
                return decoded
        if not began:
            self.close()
        return decoded

    def _frames(
        self, packet: Packet[Any] | None, run: Run, is_last: bool
    ) -> Iterator[tuple[list[VideoFrame], int]]:
        """What the decoder returns, with the decode position of the last packet that it was given.

        The decoder of the last run gets more packets than the run's, until nobody asks for more
        frames. In other runs, and where the file ends, it is asked for all that it holds: it cannot
        go on then, and the position is -1.
        """
        reader = self._reader
        assert reader is not None
        for batch in self._batches(packet, run, is_last):
            marks = [(True, True)] * len(batch)
            if self._left_out is not None:
                marks = self._left_out.marks([(packet, needed) for packet, needed, _ in batch])
            for number, ((packet, needed, at), (given, right)) in enumerate(
                zip(batch, marks, strict=True), start=1
            ):
                if given and not right:
                    self._doubtful.add(self._index.place_of(packet)[0])
                frames = reader.decode(packet, needed=needed) if given else []
                # Packets that were read ahead are gone if nobody asks for more.
                yield frames, at if is_last and number == len(batch) else -1
        yield reader.decode(None), -1

    def _batches(
        self, first: Packet[Any] | None, run: Run, is_last: bool
    ) -> Iterator[list[tuple[Packet[Any], bool, int]]]:
        """The packets of ``_packets``, those together that must be known to leave some out."""
        batch: list[tuple[Packet[Any], bool, int]] = []
        num_bytes = 0
        for packet, needed, at in self._packets(first, run, is_last):
            batch.append((packet, needed, at))
            num_bytes += packet.size
            is_full = len(batch) >= LOOK_AHEAD or num_bytes >= LOOK_AHEAD_BYTES
            if self._left_out is None or is_full or at >= run.stop:
                yield batch
                batch, num_bytes = [], 0
        if batch:
            yield batch

    def _packets(
        self, packet: Packet[Any] | None, run: Run, is_last: bool
    ) -> Iterator[tuple[Packet[Any], bool, int]]:
        """Packets, whether each is wanted for itself, and the decode position reached with it."""
        reader = self._reader
        assert reader is not None
        wanted, last = set(run.wanted), run.wanted[-1]
        at, needed, behind = run.start - 1, True, 0
        while packet is not None:
            row, place = self._index.place_of(packet)
            if not self._table.exact:
                at += 1
            elif row >= 0:
                at = place
                # What comes after the frames wanted is for the next span.
                needed = row in wanted or place == run.start or row > last or row >= self._tail
            if at > run.stop:
                behind += 1
                if not is_last or behind > _MOST_BEHIND:
                    reader.unread(packet)
                    return
            # A packet without a row, as the second of two fields, goes with the picture before it.
            yield packet, needed, at
            if row < 0 and at == run.stop and not is_last:
                return
            packet = reader.read()

    def _first_packet(self, run: Run) -> Packet[Any] | None:
        """Go to the first packet of a run."""
        reader = self._reader
        starts_over = run.start == 0 or (run.seek and not self._table.seekable)
        if self._used and starts_over:
            pictures = self._pictures
            self.close()
            self._pictures, reader = pictures, self._open()
        elif self._used:
            assert reader is not None
            reader.flush()
        assert reader is not None
        run = run._replace(seek=run.seek and not starts_over)
        if run.seek:
            reader.seek(self._index.pts, run.key)
        return first_packet(reader, run, self._index)

    def _keep(self, row: int, frame: VideoFrame) -> None:
        num_bytes = picture_bytes(frame)
        if row not in self._pictures and num_bytes <= self._room:
            self._room -= num_bytes
            self._pictures[row] = frame
