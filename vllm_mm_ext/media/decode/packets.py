"""Reads the packets of a stream, without decoding them."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet, PktSideDataT
from av.stream import Stream
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.errors import MediaTooLargeError, UnreadableMediaError
from vllm_mm_ext.media.decode.clock import NO_TICKS
from vllm_mm_ext.media.decode.container import describe, open_container
from vllm_mm_ext.media.decode.pictures import HIDDEN, reader_for

# Demuxing costs about 2 us a packet, so a file of this many packets takes some 4 s to probe. At
# 120 fps the limit is 4.6 hours.
MAX_PACKETS = 2_000_000
# What a container gives its decoder beside one packet and never again: the colours of an AVI file
# with a palette, new parameters where recordings were joined.
GIVEN_ONCE: tuple[PktSideDataT, ...] = ("palette", "new_extradata")
# Formats in which that happens midway, and a seek leaves it out.
_FORGETTING = frozenset({"flv", "live_flv", "avi"})


@dataclass
class Packets:
    """Packets of one stream in decoding order, in columns that stay cheap at millions of rows.

    Attributes:
        pts, dts: Timestamps in units of the stream's time base; ``NO_TICKS`` for none.
        duration: In the same units; 0 if not known.
        size: In bytes.
        flags: 1 for a keyframe, and ``HIDDEN`` or ``SECOND_FIELD``.
        renewed: A packet after the first brings new parameters or colours for the decoder, and the
            container does not give them again after a seek.
    """

    pts: array[int] = field(default_factory=lambda: array("q"))
    dts: array[int] = field(default_factory=lambda: array("q"))
    duration: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    flags: array[int] = field(default_factory=lambda: array("b"))
    renewed: bool = False


def read_packets(container: InputContainer, stream: AvVideoStream) -> Packets:
    """Read all packets of a stream that hold data.

    Args:
        container: An open file.
        stream: One of its streams.

    Raises:
        MediaTooLargeError: There are more than ``MAX_PACKETS``.
        UnreadableMediaError: Not even the first can be read.
    """
    if stream.frames > MAX_PACKETS:
        raise _too_many(stream.frames)
    rows = Packets()
    codec = stream.codec_context
    forgets = container.format.name in _FORGETTING
    kind_of = reader_for(codec.codec.canonical_name, codec.extradata)
    try:
        for packet in demux(container, stream):
            if not packet.size:
                continue
            pts, dts = packet.pts, packet.dts
            if forgets and rows.pts and not rows.renewed:
                # Joined recordings repeat what they began with.
                rows.renewed = any(
                    packet.has_sidedata(kind)
                    and bytes(packet.get_sidedata(kind)) != codec.extradata
                    for kind in GIVEN_ONCE
                )
            rows.pts.append(NO_TICKS if pts is None else pts)
            rows.dts.append(NO_TICKS if dts is None else dts)
            rows.duration.append(packet.duration or 0)
            rows.size.append(packet.size)
            kind = 0 if kind_of is None else kind_of(memoryview(packet))
            rows.flags.append(packet.is_keyframe | (HIDDEN if packet.is_discard else kind))
            if len(rows.pts) > MAX_PACKETS:
                raise _too_many(len(rows.pts))
    except av.FFmpegError as error:
        # A file that was cut short still has its first part, which stock vLLM serves too.
        if not rows.pts:
            raise UnreadableMediaError(
                f"The video stream could not be read: {describe(error)}."
            ) from error
    return rows


def read_beside(
    path: str, max_pixels: int, video: int, audio: int
) -> tuple[array[int], array[float], array[float]]:
    """Where the packets of a sound lie among those of the pictures, and when.

    Args:
        path: The file.
        max_pixels: See ``open_container``.
        video, audio: Indices of the two streams.

    Returns:
        For each packet of the sound, in the order of the file: int64 how many packets of
        ``read_packets`` come before it; float64 seconds on the container's clock at which it is
        decoded. And for each packet of ``read_packets`` the second at which it is shown; NaN where
        its timestamp is missing. All are empty where FFmpeg found the streams only by decoding.
    """
    before, seconds, shown = array("q"), array("d"), array("d")
    with (
        open_container(path, max_pixels=max_pixels) as container,
        contextlib.suppress(av.FFmpegError),
    ):
        if max(video, audio) >= len(container.streams):
            return before, seconds, shown
        for packet in demux(container, container.streams[video], container.streams[audio]):
            if packet.stream_index == video:
                if packet.size:
                    pts = packet.pts
                    shown.append(math.nan if pts is None else float(pts * packet.time_base))
            elif packet.dts is not None:
                before.append(len(shown))
                seconds.append(float(packet.dts * packet.time_base))
            if len(shown) + len(before) > 2 * MAX_PACKETS:
                break
    return before, seconds, shown


def demux(container: InputContainer, *streams: Stream) -> Iterator[Packet[Any]]:
    """The packets of streams, from where the container stands, as ``container.demux`` gives them.

    PyAV raises IndexError at a packet of a stream that turns up midway, as in joined transport
    streams, and BlockingIOError at each 64 KiB of a transport stream that hold no packet. It can be
    asked to go on after both.

    Raises:
        av.FFmpegError: The file cannot be read on.
    """
    for _ in range(MAX_PACKETS):
        try:
            yield from container.demux(*streams)
        except (IndexError, av.BlockingIOError):
            continue
        return


def _too_many(count: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The video stream claims {count} frames, past the limit of {MAX_PACKETS}.",
        parameter="video_url",
        value=count,
    )
