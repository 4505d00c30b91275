"""Reads the packets of an audio stream, of the whole file or from a moment on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Self

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream as AvAudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.packets import demux

# Seconds of sound decoded before the first that is wanted. Decoders need some packets to come to
# what they make of the whole stream: MP3 at a low bit rate 0.3 s, HE-AAC up to its next header.
PRE_ROLL_S = 1.0
# A seek in a container without an index may land behind its aim: seconds by which further tries aim
# earlier.
_EARLIER_S = (0.0, 2.0, 10.0, 60.0)
# Codecs whose decoders need to know nothing but what ``_new_decoder`` tells them.
_SIMPLE = frozenset(
    ("aac", "aac_latm", "ac3", "alac", "eac3", "flac", "mp1", "mp2", "mp3", "opus", "vorbis")
)


class SoundReader:
    """One open file, for its sound. For one thread.

    Args:
        path: The file.
        number: Number of the audio stream among those of the file.
        max_pixels: See ``open_container``.

    Raises:
        UnreadableMediaError: There is no such stream (any more).
    """

    def __init__(self, path: str, number: int, max_pixels: int) -> None:
        self._path = path
        self._number = number
        self._max_pixels = max_pixels
        self._open()

    def _open(self) -> None:
        self._opened = open_container(self._path, max_pixels=self._max_pixels)
        self.container: InputContainer = self._opened.__enter__()
        sources = self.container.streams.audio
        if self._number >= len(sources):
            self.close()
            # FFmpeg finds the streams of some formats only by decoding.
            raise UnreadableMediaError(
                "The audio stream could not be found again.", parameter="input_audio"
            )
        self.source: AvAudioStream = sources[self._number]
        self.decoder = self.source.codec_context
        self._moved = False

    def close(self) -> None:
        """Close the file."""
        self._opened.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def packets(self, begin: float | None) -> Iterator[Packet[Any]]:
        """Packets in decoding order, for ``decoder``, which is at its start.

        Neither depends on what was read before: decoders carry something over (the noise with
        which AAC fills bands) even where they are flushed. ``container``, ``source`` and
        ``decoder`` may be others afterwards.

        Args:
            begin: Seconds on the container's clock from which on sound is wanted: the packets
                begin ``PRE_ROLL_S`` before. None for all packets.
        """
        start, base = self.source.start_time, float(self.source.time_base or 0)
        if begin is not None and base:
            begin -= PRE_ROLL_S
            if start is None or begin > start * base:
                self._renew()
                for earlier in _EARLIER_S:
                    found = self._sought(begin, begin - earlier, base)
                    if found is not None:
                        return found
        if self._moved:
            # What a seek to the start would leave out differs from format to format.
            self.close()
            self._open()
        self._moved = True
        wanted = demux(self.container, self.source)
        return wanted if begin is None or not base else _from(wanted, begin, base)

    def _renew(self) -> None:
        """Make a new decoder, and leave the other streams unread."""
        codec = self.source.codec_context
        if codec.codec.canonical_name in _SIMPLE:
            made = av.CodecContext.create(codec.codec.name, "r")
            assert isinstance(made, AudioCodecContext)
            made.extradata = codec.extradata
            if codec.sample_rate > 0:
                made.sample_rate, made.layout = codec.sample_rate, codec.layout
            self.decoder = made
        elif self._moved:
            self.close()
            self._open()
        for stream in self.container.streams:
            if stream.index != self.source.index:
                stream.discard = Discard.all

    def _sought(self, begin: float, aim: float, base: float) -> Iterator[Packet[Any]] | None:
        """The packets from ``begin`` on; None where a seek to ``aim`` lands behind it."""
        self._moved = True
        try:
            self.container.seek(round(aim / base), stream=self.source, backward=True)
            packets = demux(self.container, self.source)
            first = next((p for p in packets if p.pts is not None), None)
        except av.FFmpegError:
            return None
        if first is None or first.pts is None or first.pts * base > begin:
            return None
        return _from(chain([first], packets), begin, base)


def _from(packets: Iterator[Packet[Any]], begin: float, base: float) -> Iterator[Packet[Any]]:
    """Packets from the first one at or after a moment on."""
    for packet in packets:
        if packet.pts is not None and packet.pts * base >= begin:
            yield packet
            break
    yield from packets
