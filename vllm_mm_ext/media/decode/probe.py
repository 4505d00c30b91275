"""Reads from a media file's container what the file holds, without decoding."""

from __future__ import annotations

import os
import re
from array import array
from dataclasses import dataclass, field

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.errors import MediaTooLargeError, MediaTooLongError, UnreadableMediaError
from vllm_mm_ext.media.audio.audio_streams import describe_audio
from vllm_mm_ext.media.decode.container import describe, open_container
from vllm_mm_ext.media.types import (
    DecodeLimits,
    MediaInfo,
    PacketTable,
    VideoStream,
)

# Demuxing costs about 2 us a packet, so a file of this many packets takes some 4 s to probe. At
# 120 fps the limit is 4.6 hours.
MAX_PACKETS = 2_000_000
# Stands for a packet without a presentation timestamp.
_NO_PTS = np.iinfo(np.int64).min
# Frame rate assumed where neither timestamps nor headers give one.
_DEFAULT_FPS = 25.0
_NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails


def probe(path: str, limits: DecodeLimits) -> MediaInfo:
    """Read the container: its streams and, for video, one row per presentable frame.

    Args:
        path: A local file; ``/proc/self/fd/N`` works too.
        limits: Of these, ``max_pixels`` and ``max_duration_s`` apply.

    Raises:
        UnreadableMediaError: The file is no media, or has no readable audio or video packet.
        UnsupportedFormatError: FFmpeg knows the format, but the plugin does not accept it.
        MediaTooLargeError: A frame has more than ``max_pixels`` pixels, or there are more than
            ``MAX_PACKETS`` packets.
        MediaTooLongError: The video is longer than ``max_duration_s``.
    """
    with open_container(path, max_pixels=limits.max_pixels) as container:
        info = _read(container, path, limits)
    if info is not None:
        return info
    # FFmpeg learns the parameters of some raw formats (ADTS, MP3, elementary streams) only by
    # decoding a few frames.
    with open_container(path, max_pixels=limits.max_pixels, guess=True) as container:
        info = _read(container, path, limits, guessed=True)
    if info is None:
        raise UnreadableMediaError("The media holds no readable audio or video stream.")
    return info


def video_stream(container: InputContainer) -> AvVideoStream | None:
    """The stream of moving pictures that a player shows, or None.

    Cover art and thumbnails are no moving pictures. As in the ffmpeg tool, a stream marked as the
    default is preferred, then the one of the largest picture, then the first in the file.
    """
    moving = [
        stream
        for stream in container.streams.video
        if not stream.disposition & _NOT_VIDEO and stream.codec_context is not None
    ]
    return max(moving, key=_shown_first, default=None)


def _shown_first(stream: AvVideoStream) -> tuple[bool, int]:
    picture = stream.codec_context
    return bool(stream.disposition & Disposition.default), picture.width * picture.height


def _read(
    container: InputContainer, path: str, limits: DecodeLimits, *, guessed: bool = False
) -> MediaInfo | None:
    """Read an open container; None if the headers leave out what decoding a few frames may show.

    Args:
        container: The container.
        path: The file.
        limits: As for ``probe``.
        guessed: A few frames have been decoded: what is not known will not be.
    """
    video = video_stream(container)
    sounds = describe_audio(container)
    if not guessed and any(not sound.sample_rate for sound in sounds):
        return None
    sounds = tuple(sound for sound in sounds if sound.sample_rate)
    if video is None and not sounds:
        return None
    # A hostile header may say less than nothing.
    claimed = max(0.0, container.duration / av.time_base) if container.duration else 0.0
    described, packets = None, None
    if video is not None:
        width, height = video.codec_context.width, video.codec_context.height
        if width <= 0 or height <= 0:
            return None
        check_pixels(width, height, limits.max_pixels)
        _check_duration(_seconds(video) or claimed, limits)
        described, packets = _read_video(container, video, limits)
    seconds = [s.duration for s in sounds] + ([described.duration] if described else [])
    return MediaInfo(
        container=container.format.name,
        num_bytes=os.stat(path).st_size,
        duration=max(seconds),
        video=described,
        audio=sounds,
        packets=packets,
        unsupported_audio=bool(container.streams.audio) and not sounds,
    )


@dataclass
class _Packets:
    """Packets of one stream in decoding order, in columns that stay cheap at millions of rows."""

    pts: array[int] = field(default_factory=lambda: array("q"))
    duration: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    flags: array[int] = field(default_factory=lambda: array("b"))  # 1 keyframe, 2 hidden


def _read_packets(container: InputContainer, stream: AvVideoStream) -> _Packets:
    if stream.frames > MAX_PACKETS:
        raise _too_many(stream.frames)
    rows = _Packets()
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            rows.pts.append(_NO_PTS if packet.pts is None else packet.pts)
            rows.duration.append(packet.duration or 0)
            rows.size.append(packet.size)
            rows.flags.append(packet.is_keyframe | packet.is_discard << 1)
            if len(rows.pts) > MAX_PACKETS:
                raise _too_many(len(rows.pts))
    except av.FFmpegError as error:
        # A file that was cut short still has its first part, which stock vLLM serves too.
        if not rows.pts:
            raise UnreadableMediaError(
                f"The video stream could not be read: {describe(error)}."
            ) from error
    return rows


def _read_video(
    container: InputContainer, stream: AvVideoStream, limits: DecodeLimits
) -> tuple[VideoStream, PacketTable]:
    rows = _read_packets(container, stream)
    pts = np.frombuffer(rows.pts, np.int64) if rows.pts else np.empty(0, np.int64)
    flags = np.frombuffer(rows.flags, np.int8) if rows.flags else np.empty(0, np.int8)
    is_key = (flags & 1).astype(bool)
    shown = (flags & 2) == 0
    exact = bool((pts[shown] != _NO_PTS).all())
    if is_key.any():
        # Decoders output no frame that is decoded before the first keyframe, and none that is shown
        # before it.
        first = int(is_key.argmax())
        shown[:first] = False
        if exact:
            shown &= pts >= pts[first]
    if not shown.any():
        raise UnreadableMediaError("The video stream holds no frame.")
    order = np.flatnonzero(shown)
    if exact:
        order = order[np.argsort(pts[order], kind="stable")]
        exact = bool((np.diff(pts[order].astype(np.float64)) > 0).all())
    time_base = float(stream.time_base) if stream.time_base else 1.0 / _DEFAULT_FPS
    guessed = float(stream.guessed_rate or stream.average_rate or 0.0)
    times, last = _times(pts[order], rows.duration[int(order[-1])], time_base, guessed, exact)
    duration = float(times[-1]) + last
    _check_duration(duration, limits)
    gaps = np.diff(times)
    is_vfr = _uneven(gaps, time_base)
    fps = len(order) / duration if duration > 0 else guessed or _DEFAULT_FPS
    # For an evenly spaced stream the declared rate is exact (30000/1001), the computed one nearly.
    if guessed > 0 and not is_vfr and abs(guessed / fps - 1) < 0.01:
        fps = guessed
    table = PacketTable(
        pts=pts[order] if exact else np.round(times / time_base).astype(np.int64),
        time=times,
        size=np.frombuffer(rows.size, np.int64)[order].astype(np.int32),
        is_key=is_key[order],
        time_base=time_base,
        order=order,
        exact=exact,
    )
    width, height = stream.codec_context.width, stream.codec_context.height
    rotation = _rotation(container, stream.index)
    if rotation in (90, 270):
        width, height = height, width
    described = VideoStream(
        index=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        width=width,
        height=height,
        rotation=rotation,
        fps=fps,
        is_vfr=is_vfr,
        num_frames=len(order),
        duration=duration,
        pixel_format=stream.codec_context.pix_fmt or "",
        start=float(table.pts[0]) * time_base if exact else 0.0,
    )
    return described, table


def _times(
    pts: npt.NDArray[np.int64], last_ticks: int, time_base: float, fps: float, exact: bool
) -> tuple[npt.NDArray[np.float64], float]:
    """Seconds from the first frame to each frame, and seconds for which the last one is shown.

    Args:
        pts: Timestamps of the frames in presentation order, in units of ``time_base``.
        last_ticks: Duration of the last frame's packet in the same units; 0 if not known.
        time_base: Seconds per unit.
        fps: Frame rate that the container claims; 0 if it claims none.
        exact: ``pts`` can be used; otherwise frames are spaced by ``fps``.
    """
    if exact:
        # Garbage timestamps may be further apart than int64 holds; floating point does not wrap.
        ticks = pts - pts[0] if int(pts[-1]) - int(pts[0]) < 2**62 else pts / 1.0 - pts[0]
        times = np.asarray(ticks * time_base, np.float64)
        usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        last = last_ticks * time_base
        if not 0 < last <= max(10 * usual, 1.0):
            last = usual or 1.0 / (fps or _DEFAULT_FPS)
        return times, last
    step = 1.0 / (fps or _DEFAULT_FPS)
    return np.arange(len(pts), dtype=np.float64) * step, step


def _uneven(gaps: npt.NDArray[np.float64], time_base: float) -> bool:
    """Whether gaps differ by more than rounding timestamps to the time base explains (plus 2 %)."""
    if len(gaps) < 2:
        return False
    return bool(np.abs(gaps - np.median(gaps)).max() > 0.02 * np.median(gaps) + 1.5 * time_base)


def _rotation(container: InputContainer, index: int) -> int:
    """Clockwise display rotation of a stream: 0, 90, 180 or 270 degrees; other angles count as 0.

    PyAV shows a stream's display matrix only in FFmpeg's own description of the file.
    """
    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        text = container.dumps_format()  # type: ignore[attr-defined]
    finally:
        av.logging.set_level(before)
    for section in re.split(r"^  Stream ", text, flags=re.MULTILINE)[1:]:
        if re.match(rf"#0:{index}\D", section):
            found = re.search(
                r"^      Display Matrix: rotation of (-?[\d.]+) degrees$",
                section,
                re.IGNORECASE | re.MULTILINE,
            )
            angle = float(found.group(1)) if found else 0.0
            turned = round(-angle) % 360
            return turned if turned in (90, 180, 270) else 0
    return 0


def _seconds(stream: AvVideoStream) -> float:
    """Duration in seconds that the container claims for a stream; 0 if it claims none."""
    if not stream.duration or not stream.time_base:
        return 0.0
    return max(0.0, float(stream.duration * stream.time_base))


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


def _check_duration(seconds: float, limits: DecodeLimits) -> None:
    if limits.max_duration_s and seconds > limits.max_duration_s:
        raise MediaTooLongError(
            f"The video lasts {seconds:.1f} s, past the limit of {limits.max_duration_s:g} s.",
            parameter="video_url",
            value=round(seconds, 3),
        )


def _too_many(count: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The video stream claims {count} frames, past the limit of {MAX_PACKETS}.",
        parameter="video_url",
        value=count,
    )
