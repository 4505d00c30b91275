"""Copies media into other files: with packets left out, later, or several into one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av

_PACKET = 188
# Packet identifiers of the tables that name all programmes and services.
_PAT, _SDT = 0x00, 0x11


def copied(
    source: Path,
    path: Path,
    *,
    wanted: Callable[[str, float], bool] | None = None,
    shift: float = 0.0,
    moved: Callable[[str, float], float] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A copy of a file that declares all its streams, but holds only some of their packets.

    Args:
        source: The file.
        path: The copy; the suffix decides the format.
        wanted: Whether a packet is kept, of its stream's kind and its time in seconds; None
            for all.
        shift: Seconds by which the copy is later on its clock.
        moved: Seconds by which a packet is later, told as ``wanted`` is.
        options: Of FFmpeg's muxer.
    """
    with av.open(str(source)) as reader, av.open(str(path), "w", options=options or {}) as writer:
        outs = {s.index: writer.add_stream_from_template(s) for s in reader.streams}
        for packet in reader.demux():
            seconds = 0.0 if packet.pts is None else float(packet.pts * packet.time_base)
            if packet.dts is None or (wanted and not wanted(packet.stream.type, seconds)):
                continue
            late = shift + (moved(packet.stream.type, seconds) if moved else 0.0)
            ticks = round(late / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) + ticks, packet.dts + ticks
            out: Any = outs[packet.stream.index]
            packet.stream = out
            writer.mux(packet)
    return path


def gathered(path: Path, sources: Sequence[Path]) -> Path:
    """All streams of several files in one."""
    with av.open(str(path), "w") as writer:
        readers = [av.open(str(source)) for source in sources]
        outs = [
            {s.index: writer.add_stream_from_template(s) for s in reader.streams}
            for reader in readers
        ]
        for reader, made in zip(readers, outs, strict=True):
            with reader:
                for packet in reader.demux():
                    if packet.dts is not None:
                        out: Any = made[packet.stream.index]
                        packet.stream = out
                        writer.mux(packet)
    return path


def programmes(path: Path, parts: Sequence[Path]) -> Path:
    """A transport stream of several programmes, broadcast at the same time.

    Args:
        path: The file to write.
        parts: The streams of each programme.
    """
    tables, packets = {}, []
    for number, part in enumerate(parts, 1):
        tables[number] = 0x100 * number
        alone = copied(
            part,
            path.with_name(f"programme-{number}.ts"),
            options={
                "mpegts_service_id": str(number),
                "mpegts_pmt_start_pid": str(tables[number]),
                "mpegts_start_pid": str(tables[number] + 1),
            },
        ).read_bytes()
        own = [alone[at : at + _PACKET] for at in range(0, len(alone), _PACKET)]
        own = [packet for packet in own if _identifier(packet) not in (_PAT, _SDT)]
        packets += [(place / len(own), packet) for place, packet in enumerate(own)]
    packets.sort(key=lambda placed: placed[0])
    path.write_bytes(_table(tables) + b"".join(packet for _, packet in packets))
    return path


def _identifier(packet: bytes) -> int:
    return int.from_bytes(packet[1:3], "big") & 0x1FFF


def _table(programmes: dict[int, int]) -> bytes:
    """The packet that tells where each programme's own table is (ISO/IEC 13818-1, 2.4.4.3)."""
    entries = b"".join(struct.pack(">HH", n, 0xE000 | at) for n, at in programmes.items())
    length = 0xB000 | 5 + len(entries) + 4
    section = struct.pack(">BHHBBB", 0, length, 1, 0xC1, 0, 0) + entries
    section += struct.pack(">I", _crc(section))
    return (b"\x47\x40\x00\x10\x00" + section).ljust(_PACKET, b"\xff")


def _crc(data: bytes) -> int:
    """Of ISO/IEC 13818-1, annex A."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    return register
