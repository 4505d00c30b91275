"""Decodes the packets of an audio stream whose codec may change where recordings were joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.packet import Packet

# Decoders between which a transport stream may change. That of MP3 decodes all MPEG audio.
_JOINABLE = {"aac": "aac", "aac_latm": "aac_latm", "ac3": "ac3", "eac3": "eac3"}
_JOINABLE |= dict.fromkeys(("mp1", "mp2", "mp3"), "mp3")


def decoded_frames(
    container: InputContainer, current: AudioCodecContext, packets: Iterator[Packet[Any]]
) -> Iterator[AudioFrame]:
    """Decode a stream; packets that cannot be decoded are left out.

    Args:
        container: An open file.
        current: Decoder of one of its audio streams, at its start.
        packets: Packets of the stream.
    """
    name = _JOINABLE.get(current.codec.canonical_name, "")
    may_change = bool(name) and container.format.name == "mpegts"
    decoders: dict[str, AudioCodecContext] = {name: current}
    draining = False
    while not draining:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            packet = None
        draining = packet is None or packet.size == 0
        found = codec_of(bytes(memoryview(packet)[:6])) if packet and may_change else ""
        if found and found != name:
            yield from _decoded(current, None)
            name = found
            if name in decoders:
                decoders[name].flush_buffers()
            else:
                created = av.CodecContext.create(name, "r")
                assert isinstance(created, AudioCodecContext)
                decoders[name] = created
            current = decoders[name]
        yield from _decoded(current, None if draining else packet)


def codec_of(data: bytes) -> str:
    """The decoder for a packet of a transport stream, by the word that each begins with.

    The words are those of ISO/IEC 13818-7 (ADTS), 14496-3 (LOAS), 11172-3 (MPEG audio), and ETSI TS
    102 366 (AC-3, whose ``bsid`` tells the enhanced one).

    Args:
        data: The first 6 bytes.

    Returns:
        FFmpeg's name; empty for none of these.
    """
    if len(data) < 6:
        return ""
    if data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return "aac"
    if data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06:
        return "mp3"
    if data[0] == 0x56 and data[1] & 0xE0 == 0xE0:
        return "aac_latm"
    if data[:2] == b"\x0b\x77":
        return "ac3" if data[5] >> 3 <= 10 else "eac3"
    return ""


def _decoded(context: AudioCodecContext, packet: Packet[Any] | None) -> Iterator[AudioFrame]:
    try:
        yield from context.decode(packet)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
