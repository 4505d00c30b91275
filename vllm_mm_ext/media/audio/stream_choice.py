"""Which of a file's audio streams is decoded."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mm_ext.errors import NoSuchStreamError
from vllm_mm_ext.media.types import AudioStream


def chosen_audio(streams: Sequence[AudioStream], number: int | None) -> AudioStream | None:
    """The stream to decode; None where there is none.

    Args:
        streams: From ``describe_audio``.
        number: Number of the wanted stream among the file's audio streams, from 0 in file order;
            None for the one that a player plays.

    Raises:
        NoSuchStreamError: The file has audio streams, but not this one.
    """
    if number is None or not streams:
        return streams[0] if streams else None
    for stream in streams:
        if stream.number == number:
            return stream
    known = ", ".join(str(n) for n in sorted(stream.number for stream in streams))
    raise NoSuchStreamError(
        f"The media has no audio stream {number} that can be decoded; it has {known}.",
        parameter="mm_ext.audio_stream",
        value=number,
    )
