"""Reads and decodes the packets of one video stream: planned runs of them, or all in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet, PacketSideData, PktSideDataT
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.decoders.read_plan import Run
from vllm_mm_ext.media.decode.decoders.row_index import RowIndex
from vllm_mm_ext.media.decode.geometry import decoder_of
from vllm_mm_ext.media.decode.left_out import LeftOut
from vllm_mm_ext.media.decode.packets import GIVEN_ONCE, demux
from vllm_mm_ext.media.decode.pixel_limit import ffmpeg_limit
from vllm_mm_ext.media.decode.references import References
from vllm_mm_ext.media.sampling.timeline import is_leaf, is_reordered
from vllm_mm_ext.media.types import PacketTable

# Receives a decoded frame: row of the packet table, picture, converter of the calling thread.
Emit = Callable[[int, VideoFrame, VideoReformatter], None]

# A decoder returns frames in presentation order: a frame is missing for good when the decoder has
# returned this many later ones.
_PATIENCE = 32
# A container without an index is searched for a decoding time that the packet table does not hold.
# The reader asks for a frame this many rows before the keyframe after the first miss, more than
# codecs reorder, and twice as many after each further one.
_FIRST_STEP_BACK = 8
# Packets that are read before the first of them is decoded, to know which ones others refer to;
# fewer where they are large.
LOOK_AHEAD, LOOK_AHEAD_BYTES = 128, 8 << 20


class SeekMissError(Exception):
    """No seek lands at or before a keyframe, or the file cannot be read up to it."""


class Read(NamedTuple):
    """What reading planned runs has shown.

    Attributes:
        decoded: Wanted rows whose frames were handed on and are right.
        true_keys: Rows of keyframes at which decoding began.
        false_keys: Rows of keyframes at which decoding could not begin. Nothing of their runs is in
            the other sets.
        shown: Rows of all frames that the decoder returned.
    """

    decoded: set[int]
    true_keys: set[int]
    false_keys: set[int]
    shown: set[int]


class Reader:
    """One open file and its decoder, for one thread.

    Args:
        path: The file.
        stream: Index of the video stream.
        max_pixels: Most pixels of a picture.
        threads: Decoding threads.
        guess: See ``open_container``.
    """

    # Whether an error of the decoder is raised; else the packet counts as broken.
    strict = False

    def __init__(
        self, path: str, stream: int, max_pixels: int, threads: int, *, guess: bool = False
    ) -> None:
        self._opened = open_container(path, max_pixels=max_pixels, guess=guess)
        self._stream_index = stream
        self._max_pixels = max_pixels
        self._threads = threads
        self._unread: Packet[Any] | None = None
        self._passed: dict[PktSideDataT, PacketSideData] = {}
        self._step_back = 0
        self.converter = VideoReformatter()

    def __enter__(self) -> Reader:
        self._container: InputContainer = self._opened.__enter__()
        stream = self._container.streams[self._stream_index]
        assert isinstance(stream, VideoStream)
        self._stream = stream
        self._context = decoder_of(self._stream)
        self._context.options = {"max_pixels": str(ffmpeg_limit(self._max_pixels))}
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO"
        self._packets = self._demux()
        self._skip: Literal["DEFAULT", "NONREF"] = "DEFAULT"
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _demux(self) -> Iterator[Packet[Any]]:
        return demux(self._container, self._stream)

    def read(self) -> Packet[Any] | None:
        """Next packet with data; None at the end of the file, or where the file is unreadable."""
        packet, self._unread = self._unread, None
        if packet is not None:
            return packet
        try:
            while (packet := next(self._packets, None)) is not None:
                if packet.size:
                    return packet
        except av.FFmpegError:
            pass
        return None

    def unread(self, packet: Packet[Any]) -> None:
        """Have the next ``read`` return this packet again."""
        self._unread = packet

    def passed_over(self, packet: Packet[Any]) -> None:
        """Note that the decoder does not get this packet; what is beside it comes with the next."""
        if next(packet.iter_sidedata(), None) is None:
            return
        for kind in GIVEN_ONCE:
            if packet.has_sidedata(kind):
                self._passed[kind] = packet.get_sidedata(kind)

    def left_out(self, table: PacketTable) -> LeftOut | None:
        """Tells which B pictures need not be decoded though others refer to them.

        None where there are none, or where it is not known to what pictures refer.
        """
        codec = self._stream.codec_context
        in_pyramids = is_reordered(table) & ~is_leaf(table)
        known = codec.codec.canonical_name == "h264" and in_pyramids.any()
        return LeftOut(References(codec.extradata or b"")) if known else None

    def decode(self, packet: Packet[Any] | None, *, needed: bool = True) -> list[VideoFrame]:
        """Give the decoder a packet.

        Args:
            packet: The packet; None asks for all frames that the decoder still holds.
            needed: If false, the decoder may drop the packet when no other frame refers to it.

        Returns:
            The frames that are ready; none for a broken packet, or of more than ``max_pixels``.
        """
        skip: Literal["DEFAULT", "NONREF"] = "DEFAULT" if needed else "NONREF"
        if skip != self._skip:
            self._context.skip_frame = skip
            self._skip = skip
        while packet is not None and self._passed:
            kind, data = self._passed.popitem()
            if not packet.has_sidedata(kind):
                packet.set_sidedata(data)
        try:
            pictures = self._context.decode(packet)
            return [p for p in pictures if p.width * p.height <= self._max_pixels]
        except av.EOFError:
            return []
        except av.FFmpegError as error:
            if self.strict or isinstance(error, MemoryError):
                raise
            return []

    def flush(self) -> None:
        """Make the decoder forget all pictures, which every jump in the file needs.

        Without that, an H.264 decoder takes the gap in frame numbers at an open GOP for loss and
        holds pictures back. The decoder must have returned all its frames before.
        """
        self._context.flush_buffers()

    def seek(self, pts: Sequence[int], key: int) -> None:
        """Go to a keyframe or to a place before it.

        In a container without an index (MPEG-TS) FFmpeg looks for the keyframe's presentation time
        among decoding times, and so lands behind the keyframe. Once ``seek_again`` was called, all
        seeks of this reader aim at an earlier frame.

        Args:
            pts: Timestamp of each row of the packet table.
            key: Row of the keyframe.

        Raises:
            SeekMissError: The container cannot seek.
        """
        self._unread = None
        try:
            at = pts[max(0, key - self._step_back)]
            self._container.seek(at, stream=self._stream, backward=True)
        except av.FFmpegError as error:
            raise SeekMissError from error
        self._packets = self._demux()

    def seek_again(self, pts: Sequence[int], key: int) -> None:
        """As ``seek``, from further before the keyframe, after a seek that landed behind it.

        Raises:
            SeekMissError: There is no earlier place to try.
        """
        if self._step_back >= key:
            raise SeekMissError
        self._step_back = max(_FIRST_STEP_BACK, 2 * self._step_back)
        self.seek(pts, key)


def read_planned(
    reader: Reader, table: PacketTable, runs: Sequence[Run], emit: Emit, *, leave_out: bool
) -> Read:
    """Decode runs of packets and check that the decoder returns what the packet table says.

    Args:
        reader: The file, at its start.
        table: Its packet table, with exact timestamps.
        runs: What to decode, in file order.
        emit: Receives the wanted frames, and perhaps wrong ones for rows that are not returned.
        leave_out: Leave out B pictures that no wanted one refers to, though others do.

    Raises:
        SeekMissError: The place of a run was not found.
        LostReferencesError: What was left out would make pictures wrong.
    """
    index = RowIndex(table)
    read = Read(set(), set(), set(), set())
    left_out = reader.left_out(table) if leave_out else None
    for number, run in enumerate(runs):
        if number:
            reader.flush()
        if run.seek:
            reader.seek(index.pts, run.key)
        wanted = set(run.wanted)
        decoded: set[int] = set()
        shown: set[int] = set()
        began = run.start == 0
        packets = _packets_of(reader, run, index, wanted)
        for frame in _frames_of(reader, packets, left_out):
            row, _ = index.place(frame.pts)
            began = began or (row == run.key and frame.key_frame)
            if row in wanted and row not in decoded:
                emit(row, frame, reader.converter)
                decoded.add(row)
            if row >= 0:
                shown.add(row)
        if began:
            read.true_keys.add(run.key)
            read.decoded.update(decoded)
            read.shown.update(shown)
        else:
            read.false_keys.add(run.key)
    return read


def _packets_of(
    reader: Reader, run: Run, index: RowIndex, wanted: set[int]
) -> Iterator[tuple[Packet[Any], bool]]:
    """All packets of a run, and whether each is needed for itself."""
    at, needed = -1, False
    packet = first_packet(reader, run, index)
    while packet is not None:
        row, place = index.place_of(packet)
        if row >= 0:
            at, needed = place, row in wanted or place == run.start
        if at > run.stop:
            reader.unread(packet)
            return
        # A packet without a row, as the second of two fields, goes with the picture before it.
        yield packet, needed
        if row < 0 and at == run.stop:
            return
        packet = reader.read()


def _frames_of(
    reader: Reader, packets: Iterator[tuple[Packet[Any], bool]], left_out: LeftOut | None
) -> Iterator[VideoFrame]:
    """All frames that the decoder returns for the packets of a run.

    Args:
        reader: The decoder.
        packets: From ``_packets_of``.
        left_out: Tells which packets to leave out; None: that is left to the decoder.
    """
    if left_out is None:
        for packet, needed in packets:
            yield from reader.decode(packet, needed=needed)
    else:
        left_out.restart()
        while batch := _batch(packets):
            for (packet, needed), (given, _) in zip(batch, left_out.marks(batch), strict=True):
                if given:
                    yield from reader.decode(packet, needed=needed)
    yield from reader.decode(None)


def _batch(packets: Iterator[tuple[Packet[Any], bool]]) -> list[tuple[Packet[Any], bool]]:
    """The next packets, as far as may be looked ahead."""
    batch: list[tuple[Packet[Any], bool]] = []
    num_bytes = 0
    while len(batch) < LOOK_AHEAD and num_bytes < LOOK_AHEAD_BYTES:
        item = next(packets, None)
        if item is None:
            break
        batch.append(item)
        num_bytes += item[0].size
    return batch


def first_packet(reader: Reader, run: Run, index: RowIndex) -> Packet[Any] | None:
    """Read up to the first packet of a run; None if the file has no packets.

    Args:
        reader: The file, where the run's ``seek`` or the run before left it.
        run: The run.
        index: Of the file's packet table.

    Raises:
        SeekMissError: The packet is not found.
    """
    while (packet := reader.read()) is not None:
        _, place = index.place_of(packet)
        if run.start == 0 or place == run.start:
            return packet
        if place > run.start:
            if not run.seek:
                raise SeekMissError
            reader.seek_again(index.pts, run.key)
        else:
            reader.passed_over(packet)
    if run.start:
        raise SeekMissError
    return None


def picture_bytes(picture: VideoFrame) -> int:
    """Bytes of a decoded picture."""
    return sum(plane.buffer_size for plane in picture.planes)


def read_in_order(
    reader: Reader, table: PacketTable, rows: Sequence[int], emit: Emit, seen: set[int]
) -> set[int]:
    """Decode everything from the start of the file, as stock loaders do, up to the last wanted row.

    A frame's timestamp tells its row; in a file without usable timestamps, counting does.

    Args:
        reader, table, emit, seen: As for ``read_planned``.
        rows: The wanted rows, increasing.

    Returns:
        The wanted rows that were decoded.
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
            if 0 <= row < len(table):
                seen.add(row)
    return decoded
