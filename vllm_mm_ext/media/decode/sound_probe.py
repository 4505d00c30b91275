"""Reads from a media file's container what the file holds of sound."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection
from dataclasses import replace

import av
from av.audio.stream import AudioStream as AvAudioStream
from av.container import InputContainer

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.media.audio.audio_decoder import codec_of
from vllm_mm_ext.media.audio.audio_streams import describe_audio, is_unknown
from vllm_mm_ext.media.audio.sound_placement import STEP_AHEAD_S
from vllm_mm_ext.media.decode.container import NO_INDEX, open_container
from vllm_mm_ext.media.decode.packets import MAX_PACKETS, demux
from vllm_mm_ext.media.decode.streams import container_start, video_streams
from vllm_mm_ext.media.types import DecodeLimits, MediaInfo

# How pages of Ogg begin: the first one of a stream, and one that goes on with it.
_OGG_BEGIN, _OGG_DATA = b"OggS\0\2", b"OggS\0\0"
_BLOCK = 1 << 20
# A stream that begins later than this, in seconds, was joined midway. Encoder delay is less.
_BEGINS_S = 0.1
# The sampling rates in kHz that a packet of ADTS may name (ISO/IEC 14496-3).
_ADTS_KHZ = (96, 88.2, 64, 48, 44.1, 32, 24, 22.05, 16, 12, 11.025, 8, 7.35)


def probe_sound(path: str, limits: DecodeLimits) -> MediaInfo:
    """Read the container for its sound alone: no limit or defect of its pictures refuses a file.

    Args:
        path: As for ``probe``.
        limits: Of these, ``max_pixels`` bounds what FFmpeg decodes to learn parameters.

    Returns:
        A description without video; without audio if the file holds pictures alone.

    Raises:
        UnreadableMediaError: The file is no media, or holds neither sound nor pictures.
        UnsupportedFormatError: FFmpeg knows the format, but the plugin does not accept it.
    """
    for guess in (False, True):
        with open_container(path, max_pixels=limits.max_pixels, guess=guess) as container:
            if guess or not is_unknown(container):
                info = sound_alone(container, path)
                if info.audio or container.streams.video:
                    return info
    raise UnreadableMediaError("The media holds no readable audio or video stream.")


def sound_alone(container: InputContainer, path: str) -> MediaInfo:
    """Describe an open file as if it had no pictures; the sound is that of the film all the same.

    Args:
        container: The file, of which nothing has been read.
        path: Its path.
    """
    film = next(iter(video_streams(container)), None)
    sounds = describe_audio(container, container_start(container), film)
    if sounds and sounds[0].estimated and container.format.flags & NO_INDEX:
        # The format has no index, so FFmpeg estimates the length from the bit rate; to read the
        # packets tells it. Of Ogg FFmpeg knows the end of the last file, which is the length of one
        # that begins at 0.
        seconds, start = sounds[0].duration, sounds[0].start
        is_whole = container.format.name == "ogg" and seconds > 0 and abs(start) <= _BEGINS_S
        if not is_whole or _is_joined(path):
            seconds = _measured(container, container.streams.audio[sounds[0].number])
        sounds = (replace(sounds[0], duration=seconds, estimated=False), *sounds[1:])
    return MediaInfo(
        container=container.format.name,
        num_bytes=os.stat(path).st_size,
        duration=max((sound.duration for sound in sounds), default=0.0),
        video=None,
        audio=sounds,
        unsupported_audio=bool(container.streams.audio) and not sounds,
    )


def sound_end(path: str, max_pixels: int, streams: Collection[int], *, guess: bool) -> float:
    """Seconds on the container's clock at which the last of some streams ends, by its packets.

    Args:
        path: The file.
        max_pixels, guess: See ``open_container``.
        streams: Indices of streams of the file.
    """
    ends: dict[int, float] = {}
    with (
        open_container(path, max_pixels=max_pixels, guess=guess) as container,
        contextlib.suppress(av.FFmpegError),
    ):
        wanted = [stream for stream in container.streams if stream.index in streams]
        for count, packet in enumerate(demux(container, *wanted)):
            if count > MAX_PACKETS:
                break
            if packet.size and packet.stream_index in streams:
                before = ends.get(packet.stream_index, -math.inf)
                begin = before if packet.pts is None else float(packet.pts * packet.time_base)
                lasts = float((packet.duration or 0) * packet.time_base)
                ends[packet.stream_index] = max(before, begin + lasts)
    return max(ends.values(), default=-math.inf)


def _is_joined(path: str) -> bool:
    """Whether an Ogg file holds others behind the first one: streams begin behind the first data.

    FFmpeg tells the length of the last one.
    """
    with open(path, "rb") as file:
        tail, is_data = b"", False
        while more := file.read(_BLOCK):
            block = tail + more
            at = 0 if is_data else block.find(_OGG_DATA)
            is_data = at >= 0
            if is_data and block.find(_OGG_BEGIN, at) >= 0:
                return True
            tail = block[1 - len(_OGG_BEGIN) :]
    return False


def _measured(container: InputContainer, stream: AvAudioStream) -> float:
    """Seconds that the packets of a stream last together, and holes between them.

    FFmpeg does not know how long some packets of Vorbis last: the next timestamp tells. It takes
    the rate of the first packet of ADTS for that of all.
    """
    unit = float(stream.time_base or 0)
    is_adts = container.format.name == "aac"
    total, lasts, before = 0.0, 0.0, None
    with contextlib.suppress(av.FFmpegError):
        for count, packet in enumerate(demux(container, stream)):
            if count > MAX_PACKETS:
                break
            if packet.size:
                own = _adts_seconds(bytes(memoryview(packet)[:7])) if is_adts else 0.0
                pts = None if own else packet.pts
                step = -1.0 if pts is None or before is None else (pts - before) * unit
                total += step if 0 <= step <= STEP_AHEAD_S else lasts
                lasts, before = own or max(0, packet.duration or 0) * unit, pts
    return total + lasts


def _adts_seconds(head: bytes) -> float:
    """Seconds that a packet of ADTS lasts, by its first 7 bytes; 0 for other packets."""
    if len(head) < 7 or codec_of(head) != "aac":
        return 0.0
    rate, blocks = head[2] >> 2 & 0xF, 1 + head[6] % 4
    return 1.024 * blocks / _ADTS_KHZ[rate] if rate < len(_ADTS_KHZ) else 0.0
