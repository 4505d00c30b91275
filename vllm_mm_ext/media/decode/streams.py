"""Which video stream of a file counts, and what its container claims of the length of streams."""

from __future__ import annotations

import os

import av
from av.audio.stream import AudioStream as AvAudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.errors import NoSuchStreamError

# Formats whose headers tell the time at which streams end, on the container's clock, and not how
# long they are.
TELL_END = frozenset({"matroska,webm", "flv"})
# Where the main header of an AVI file and its count of pictures lie, and how many parts of the file
# are looked at.
_AVI_NAME, _AVI_COUNT = slice(24, 28), slice(48, 52)
_MAX_CHUNKS = 1000
_NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails


def video_streams(container: InputContainer, number: int | None = None) -> list[AvVideoStream]:
    """The streams of moving pictures, the one that a player shows first.

    Cover art and thumbnails are no moving pictures, and a stream of one picture comes last. As in
    the ffmpeg tool, streams marked as the default are preferred, then those of the largest picture,
    then the longest, then the first in the file.

    Args:
        container: An open file.
        number: Only this one of the file's video streams, whatever it is.

    Raises:
        NoSuchStreamError: There is no video stream of that number that can be decoded.
    """
    usable = [stream for stream in container.streams.video if stream.codec_context is not None]
    if number is None:
        moving = [stream for stream in usable if not stream.disposition & _NOT_VIDEO]
        return sorted(moving, key=_shown_first, reverse=True)
    streams = container.streams.video
    if number >= len(streams) or streams[number] not in usable:
        raise NoSuchStreamError(
            f"The media has no video stream {number}: it has {len(streams)}, counted from 0.",
            parameter="mm_ext.video_stream",
            value=number,
        )
    return [streams[number]]


def _shown_first(stream: AvVideoStream) -> tuple[bool, bool, int, float]:
    picture, is_default = stream.codec_context, bool(stream.disposition & Disposition.default)
    return stream.frames != 1, is_default, picture.width * picture.height, _seconds(stream)


def container_start(container: InputContainer) -> float:
    """Seconds on the container's clock at which it begins; 0 if it does not tell."""
    return container.start_time / av.time_base if container.start_time else 0.0


def stream_start(stream: AvVideoStream | AvAudioStream) -> float:
    """Seconds on the container's clock at which a stream begins; 0 if it does not tell."""
    if stream.start_time is None or not stream.time_base:
        return 0.0
    return float(stream.start_time * stream.time_base)


def claimed_length(
    container: InputContainer, stream: AvVideoStream | AvAudioStream, start: float
) -> float:
    """Seconds that the container claims a stream lasts; 0 if it claims nothing.

    Args:
        container: The stream's container.
        stream: A stream.
        start: Seconds on the container's clock at which the stream begins.
    """
    # A hostile header may say less than nothing.
    whole = max(0.0, container.duration / av.time_base) if container.duration else 0.0
    claimed = _seconds(stream) or whole
    if container.format.name in TELL_END and claimed > start > 0:
        return claimed - start
    return claimed


def repeats_at_end(
    container: InputContainer, stream: AvVideoStream, packets: int, path: str
) -> bool:
    """Whether the header counts pictures behind the last packet: repeats of that picture.

    In AVI, a packet without data repeats the picture before it, and FFmpeg leaves such packets out.
    A file that was cut short counts what it lost, too; a wrong count in one header proves nothing.

    Args:
        container, stream: The open file and its stream.
        packets: How many packets of the stream hold data.
        path: The file.
    """
    if container.format.name != "avi" or stream.frames <= packets:
        return False
    with open(path, "rb") as file:
        head = file.read(_AVI_COUNT.stop)
        end, size = 0, os.stat(path).st_size
        for _ in range(_MAX_CHUNKS):
            file.seek(end)
            chunk = file.read(8)
            if chunk[:4] != b"RIFF":
                break
            end += 8 + int.from_bytes(chunk[4:], "little")
    counted = int.from_bytes(head[_AVI_COUNT], "little")
    return head[_AVI_NAME] == b"avih" and counted == stream.frames and 8 < end <= size


def _seconds(stream: AvVideoStream | AvAudioStream) -> float:
    """Duration in seconds that the container claims for a stream; 0 if it claims none."""
    if not stream.duration or not stream.time_base:
        return 0.0
    return max(0.0, float(stream.duration * stream.time_base))
