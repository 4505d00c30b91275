"""Reads from a media file's container what the file holds; of the pictures, one is decoded."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.errors import MediaTooLongError, UnreadableMediaError
from vllm_mm_ext.media.audio.audio_streams import audio_streams, describe_audio, is_unknown
from vllm_mm_ext.media.audio.sound_placement import clock_origins
from vllm_mm_ext.media.decode.clock import (
    DEFAULT_FPS,
    NO_TICKS,
    Beside,
    Clock,
    paced,
    players_delays,
    read_clock,
)
from vllm_mm_ext.media.decode.container import TIMES_RESTART, open_container
from vllm_mm_ext.media.decode.geometry import displayed
from vllm_mm_ext.media.decode.packets import Packets, read_beside, read_packets
from vllm_mm_ext.media.decode.pictures import HIDDEN, SECOND_FIELD
from vllm_mm_ext.media.decode.pixel_limit import check_pixels
from vllm_mm_ext.media.decode.shown_order import shown_order
from vllm_mm_ext.media.decode.sound_probe import sound_alone, sound_end
from vllm_mm_ext.media.decode.streams import (
    TELL_END,
    claimed_length,
    repeats_at_end,
    stream_start,
    video_streams,
)
from vllm_mm_ext.media.types import (
    AS_PLAYERS,
    DecodeLimits,
    MediaInfo,
    PacketTable,
    PictureRules,
    VideoStream,
)

# The format whose headers hold the length of a stream; of others FFmpeg may estimate it, or they
# tell the end of it.
_TELLS_LENGTH = "mov"
# Gives the video streams of an open container to try, the best first; None stands for sound alone.
Choose = Callable[[InputContainer], list[int | None]]


def probe(
    path: str,
    limits: DecodeLimits,
    video_stream: int | None = None,
    picture: PictureRules = AS_PLAYERS,
) -> MediaInfo:
    """Read the container: its streams and, for video, one row per presentable frame.

    Streams that hold no frame do not count: of a file with sound and such streams, the sound alone
    is described.

    Args:
        path: A local file; ``/proc/self/fd/N`` works too.
        limits: Of these, ``max_pixels`` and ``max_duration_s`` apply.
        video_stream: Number of the video stream to read, among the file's video streams; None for
            the one that a player shows.
        picture: How pictures are shown, which decides the displayed size.

    Raises:
        UnreadableMediaError: The file is no media, or has no readable audio or video packet, or
            none in the stream ``video_stream``.
        UnsupportedFormatError: FFmpeg knows the format, but the plugin does not accept it.
        MediaTooLargeError: A frame has more than ``max_pixels`` pixels, or there are more than
            ``MAX_PACKETS`` packets.
        MediaTooLongError: The video is longer than ``max_duration_s``.
        NoSuchStreamError: There is no video stream of that number.
    """

    def choose(container: InputContainer) -> list[int | None]:
        streams = video_streams(container, video_stream)
        return [*(s.index for s in streams), *([None] if video_stream is None else [])]

    info = _first(path, limits, choose)
    doubtful = info is not None and info.packets is not None and not info.packets.exact
    if info is None or doubtful:
        # FFmpeg learns the parameters of some raw formats (ADTS, MP3, elementary streams) only by
        # decoding a few frames, and the reordering of frames, by which it fills in timestamps that
        # program streams leave out.
        index = None if info is None or info.video is None else info.video.index
        info = (
            _first(path, limits, choose if index is None else lambda _: [index], guess=True) or info
        )
    if info is None:
        raise UnreadableMediaError("The media holds no readable audio or video stream.")
    if doubtful and info.packets is not None:
        # A decoder that opens the file without decoding would see other timestamps.
        info = replace(info, packets=replace(info.packets, exact=False))
    return displayed(path, info, limits.max_pixels, picture)


def _first(
    path: str, limits: DecodeLimits, choose: Choose, *, guess: bool = False
) -> MediaInfo | None:
    """What was read of the first choice that has frames; a still picture comes after moving ones.

    Args:
        path, limits: As for ``probe``.
        choose: What to try.
        guess: Let FFmpeg decode a few frames first: what is not known then will not be.

    Returns:
        None if what is left out by the headers hides what a choice is.

    Raises:
        UnreadableMediaError: No choice has frames or sound.
    """
    left: list[int | None] | None = None
    still: MediaInfo | None = None
    refusal = ""
    while left is None or left:
        with open_container(path, max_pixels=limits.max_pixels, guess=guess) as container:
            left = choose(container) if left is None else left
            try:
                info = _read(container, path, limits, left.pop(0), guessed=guess)
            except UnreadableMediaError as error:
                refusal = refusal or str(error)
                continue
        if info is not None and (info.video is None or info.video.num_frames > 1):
            return info
        if info is None and still is None and not guess:
            return None
        still = still or info
        if still is not None:
            left = [index for index in left if index is not None]
    if still is None and refusal:
        raise UnreadableMediaError(refusal)
    return still


def _read(
    container: InputContainer,
    path: str,
    limits: DecodeLimits,
    choice: int | None,
    *,
    guessed: bool,
) -> MediaInfo | None:
    """Read an open container.

    Args:
        container: The container.
        path: Its file.
        limits: As for ``probe``.
        choice: Index of the video stream to read; None for none.
        guessed: A few frames have been decoded: what is not known will not be.

    Returns:
        None if the headers leave out what decoding a few frames may show.
    """
    if is_unknown(container) and not guessed:
        return None
    if choice is None:
        info = sound_alone(container, path)
        return info if info.audio else None
    video = container.streams[choice]
    if not isinstance(video, AvVideoStream):
        raise UnreadableMediaError("The media's video stream turned out to be none.")
    width, height = video.codec_context.width, video.codec_context.height
    if width <= 0 or height <= 0:
        if guessed:
            raise UnreadableMediaError("The video stream holds no frame.")
        return None
    check_pixels(width, height, limits.max_pixels)
    if container.format.name.startswith(_TELLS_LENGTH):
        # A live fragment tells the time at which it ends.
        begin = max(0.0, stream_start(video))
        _check_duration(claimed_length(container, video, 0.0) - begin, limits)
    rows = read_packets(container, video)
    if container.format.name == "gif":
        rows.duration[:] = array("q", players_delays(np.array(rows.duration)).tolist())
    clock, shown = _clock(container, video, rows, path, limits)
    repeats = repeats_at_end(container, video, len(rows.pts), path)
    described, packets = _describe(container, video, rows, clock, shown, repeats=repeats)
    _check_duration(described.duration, limits)
    sounds = describe_audio(container, described.start, video)
    if described.num_frames == 1 and sounds:
        # A picture to look at while something is heard, as a talk with its cover.
        streams = [sound.index for sound in sounds]
        heard = sound_end(path, limits.max_pixels, streams, guess=guessed) - described.start
        stands = min(heard, limits.max_duration_s or heard)
        if stands > described.duration:
            described = replace(described, duration=stands, fps=1 / stands, is_vfr=True)
    return MediaInfo(
        container=container.format.name,
        num_bytes=os.stat(path).st_size,
        duration=max([described.duration, *(s.duration for s in sounds if not s.estimated)]),
        video=described,
        audio=sounds,
        packets=packets,
        unsupported_audio=bool(container.streams.audio) and not sounds,
    )


def _clock(
    container: InputContainer, stream: AvVideoStream, rows: Packets, path: str, limits: DecodeLimits
) -> tuple[Clock, npt.NDArray[np.int64]]:
    """Times of the shown pictures, and their positions among the packets in decoding order."""
    flags = np.array(rows.flags, np.int8)
    shown = (flags & (HIDDEN | SECOND_FIELD)) == 0
    is_key = (flags & 1) == 1
    if is_key.any():
        # Decoders output no frame that is decoded before the first keyframe, which may be hidden
        # itself: an edit list that begins in the middle of a GOP hides the first part of it.
        shown[: int(is_key.argmax())] = False
    if not shown.any():
        raise UnreadableMediaError("The video stream holds no frame.")
    places = np.flatnonzero(shown)
    rates = _rates(stream)
    sound = next(iter(audio_streams(container, stream)), None)

    def beside() -> Beside:
        assert sound is not None
        before, seconds, _ = read_beside(path, limits.max_pixels, stream.index, sound.index)
        return Beside(np.searchsorted(places, np.array(before, np.int64)), np.array(seconds))

    clock = read_clock(
        _presented(stream, rows, path, limits)[places],
        np.array(rows.dts, np.int64)[places],
        _unit(stream),
        float(rates[0]) if rates else 0.0,
        rates,
        from_key=bool(is_key[places[0]]),
        may_jump=bool(container.format.flags & TIMES_RESTART),
        beside=None if sound is None else beside,
    )
    order = places[clock.order]
    if container.format.name == "gif":
        clock = paced(clock, np.array(rows.duration, np.int64)[order], _unit(stream))
    return clock, order


def _presented(
    stream: AvVideoStream, rows: Packets, path: str, limits: DecodeLimits
) -> npt.NDArray[np.int64]:
    """Presentation times of packets, where the container has decoding times in their place too."""
    pts = np.array(rows.pts, np.int64)
    is_h264 = stream.codec_context.codec.canonical_name == "h264"
    if is_h264 and pts[0] != NO_TICKS and bool((pts[1:] > pts[:-1]).all()):
        order = shown_order(path, limits.max_pixels, stream.index)
        if order is not None and len(order) == len(pts):
            pts[order] = pts.copy()
    return pts


def _describe(
    container: InputContainer,
    stream: AvVideoStream,
    rows: Packets,
    clock: Clock,
    order: npt.NDArray[np.int64],
    *,
    repeats: bool,
) -> tuple[VideoStream, PacketTable]:
    """The stream and its packet table.

    Args:
        container: The stream's container.
        stream: The stream.
        rows: Its packets.
        clock: Times of its pictures.
        order: Positions of the pictures among the packets, in presentation order.
        repeats: See ``repeats_at_end``.
    """
    unit, flags = _unit(stream), np.array(rows.flags, np.int8)
    pts, dts = np.array(rows.pts, np.int64)[order], np.array(rows.dts, np.int64)[order]
    size = np.array(rows.size, np.int64)
    seconds_at = np.flatnonzero(flags & SECOND_FIELD)
    size[seconds_at - 1] += size[seconds_at]
    known = [int(ticks[0]) for ticks in (pts, dts) if ticks[0] != NO_TICKS]
    start = known[0] * unit if known else 0.0
    times, own = clock.time, rows.duration[order[-1]] * unit
    if len(order) < len(flags):
        # What a packet lasts that is half a picture, or among packets that are none, is a guess.
        own = max(own, clock.usual)
    last = _last(container, stream, clock, own, start, repeats=repeats)
    duration = float(times[-1]) + last
    is_vfr = _uneven(np.diff(times), clock.unit) or last > 2 * clock.usual
    guessed = float(next(iter(_rates(stream)), 0.0))
    fps = len(order) / duration if duration > 0 else guessed or DEFAULT_FPS
    # For an evenly spaced stream the declared rate is exact (30000/1001), the computed one nearly.
    if guessed > 0 and not is_vfr and abs(guessed / fps - 1) < 0.01:
        drift = abs((len(order) - 1) / guessed - float(times[-1]))
        fps = guessed if drift <= max(clock.unit, clock.usual / 2) else fps
    table = PacketTable(
        pts=pts if clock.exact else np.round(times / unit).astype(np.int64),
        time=times,
        size=size[order].astype(np.int32),
        is_key=(flags[order] & 1).astype(bool),
        time_base=unit,
        order=order,
        exact=clock.exact,
        seekable=not rows.renewed,
    )
    described = VideoStream(
        index=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        rotation=0,
        fps=fps,
        is_vfr=is_vfr,
        num_frames=len(order),
        num_keyframes=int(table.is_key.sum()),
        duration=duration,
        pixel_format=stream.codec_context.pix_fmt or "",
        start=start,
        origins=clock_origins(np.asarray(pts * unit, np.float64), times) if clock.has_jumps else (),
    )
    return described, table


def _last(
    container: InputContainer,
    stream: AvVideoStream,
    clock: Clock,
    own: float,
    start: float,
    *,
    repeats: bool,
) -> float:
    """Seconds for which the last picture is shown.

    A screen recording's last picture may stand for a minute. A damaged file may claim that of any
    picture, so a long one needs the agreement of the headers.

    Args:
        container, stream: What the picture is in.
        clock: Times of all pictures.
        own: Seconds that the picture's packet lasts; 0 if not known.
        start: Seconds on the container's clock at which the first picture is shown.
        repeats: See ``repeats_at_end``.
    """
    usual = clock.usual
    if abs(own - usual) <= min(clock.unit, usual / 2):
        own = usual  # The picture's own duration is rounded.
    claimed = claimed_length(container, stream, start) - float(clock.time[-1])
    if not 0 < own <= max(10 * usual, 1.0, claimed + usual):
        own = usual
    # Of these formats only the header tells the end of the last picture. With sound, it tells the
    # later of two ends.
    tells = container.format.name in TELL_END and not container.streams.audio
    if repeats:
        tells, claimed = True, claimed - start
    if tells and not clock.has_jumps and claimed > own + usual:
        return claimed
    return own


def _rates(stream: AvVideoStream) -> list[Fraction]:
    """Frame rates that the container names, in pictures per second; a header may claim any."""
    rates = (stream.guessed_rate, stream.average_rate)
    return [Fraction(rate) for rate in rates if rate is not None and rate > 0]


def _unit(stream: AvVideoStream) -> float:
    """Seconds per unit of the stream's timestamps."""
    return float(stream.time_base) if stream.time_base else 1.0 / DEFAULT_FPS


def _uneven(gaps: npt.NDArray[np.float64], unit: float) -> bool:
    """Whether gaps differ by more than rounding times to ``unit`` seconds explains (plus 2 %)."""
    if len(gaps) < 2:
        return False
    usual = float(np.median(gaps))
    # A clock whose unit is about the distance of frames counts frames, and rounds nothing.
    rounding = 1.5 * unit if 4 * unit < usual else 0.0
    return bool(np.abs(gaps - usual).max() > 0.02 * usual + rounding)


def _check_duration(seconds: float, limits: DecodeLimits) -> None:
    if limits.max_duration_s and seconds > limits.max_duration_s:
        raise MediaTooLongError(
            f"The video lasts {seconds:.1f} s, past the limit of {limits.max_duration_s:g} s "
            "(mm_ext.media.decode.max_duration_s).",
            parameter="video_url",
            value=round(seconds, 3),
        )
