"""Which audio streams a file has, and which of them is heard."""

from __future__ import annotations

import math
import re

from av.audio.stream import AudioStream as AvAudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.media.decode.container import dumped
from vllm_mm_ext.media.decode.streams import claimed_length, stream_start
from vllm_mm_ext.media.types import AudioStream

# Streams that a viewer chooses to hear beside or instead of the programme's own sound.
_BESIDE = (
    Disposition.comment
    | Disposition.visual_impaired
    | Disposition.hearing_impaired
    | Disposition.karaoke
    | Disposition.lyrics
    | Disposition.clean_effects
    | Disposition.dependent
    | Disposition.attached_pic
)
# Containers that count the samples of a whole stream. Others claim a length by the bit rate of the
# first packets (MP3 too, if files were joined, whatever the first one counts), by timestamps that
# may jump, by a number that a live writer made up, or (Ogg) by that of the last of several files
# that were joined.
_COUNTING = frozenset(
    ("mov", "matroska", "avi", "asf", "nut", "wav", "w64", "aiff", "caf", "au", "flac")
)
# FLAC of fewer bits a sample than this is silence, or its header counts samples that are not there.
_FEWEST_BITS = 0.1


def audio_streams(
    container: InputContainer, video: AvVideoStream | None = None
) -> list[AvAudioStream]:
    """Audio streams that this FFmpeg can decode; the stream that a player plays comes first.

    In a transport stream of several programmes, sound of the picture's own programme comes before
    that of others. Commentary, sound for the impaired and the like come last, whether or not they
    are marked as the default (Matroska marks every stream unless told otherwise). Among the others,
    streams marked as the default come first, then those that are no dub, then those of more
    channels, then in file order.

    Args:
        container: An open file.
        video: The stream of it whose pictures are shown; None for none.
    """
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    own = _programme(container, video) if video is not None and len(streams) > 1 else set()
    return sorted(
        streams,
        key=lambda stream: (
            stream.index not in own,
            bool(stream.disposition & _BESIDE),
            not stream.disposition & Disposition.default,
            bool(stream.disposition & Disposition.dub),
            -stream.codec_context.channels,
        ),
    )


def _programme(container: InputContainer, video: AvVideoStream) -> set[int]:
    """Indices of the streams in the programmes of a video stream; empty for a file without any."""
    own: set[int] = set()
    if container.format.name == "mpegts":
        for section in re.split(r"^  (?:No )?Program\b", dumped(container), flags=re.MULTILINE)[1:]:
            found = re.findall(r"^  Stream #0:(\d+)", section, re.MULTILINE)
            streams = {int(index) for index in found}
            own |= streams if video.index in streams else set()
    return own


def is_unknown(container: InputContainer) -> bool:
    """Whether headers leave out parameters of sound that decoding a few frames may show."""
    return any(stream.codec_context.sample_rate <= 0 for stream in audio_streams(container))


def describe_audio(
    container: InputContainer, start: float, video: AvVideoStream | None
) -> tuple[AudioStream, ...]:
    """The audio streams that can be decoded, the one that a player plays first.

    Streams whose parameters are not known are left out.

    Args:
        container: An open file.
        start: Seconds on the container's clock at which the file begins.
        video: As for ``audio_streams``.
    """
    numbers = {stream.index: number for number, stream in enumerate(container.streams.audio)}
    names = set(container.format.name.split(","))
    found = []
    for stream in audio_streams(container, video):
        context, claimed = stream.codec_context, claimed_length(container, stream, start)
        if context.sample_rate <= 0:
            continue
        longest = _longest(container, stream)
        sound = AudioStream(
            index=stream.index,
            codec=context.codec.canonical_name,
            sample_rate=context.sample_rate,
            channels=context.channels,
            duration=min(claimed, longest),
            number=numbers[stream.index],
            start=stream_start(stream),
            estimated=claimed > longest or not _counts_samples(names, stream),
        )
        found.append(sound)
    return tuple(found)


def _longest(container: InputContainer, stream: AvAudioStream) -> float:
    """Seconds of a stream for which the file has bytes enough; infinite where nothing tells."""
    context = stream.codec_context
    bits = 0.0
    if context.codec.canonical_name.startswith("pcm_"):
        bits = float(context.bit_rate or 0)
    elif container.format.name == "flac":
        bits = _FEWEST_BITS * context.sample_rate
    return 8 * container.size / bits if bits > 0 else math.inf


def _counts_samples(container: set[str], stream: AvAudioStream) -> bool:
    # The header of a live fragment may tell the time at which it ends instead of its length.
    if "mov" in container and stream_start(stream) > 0:
        return False
    return bool(container & _COUNTING)
