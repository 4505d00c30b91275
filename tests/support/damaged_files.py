"""Damages chosen packets of video files."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import av


def damage(source: Path, target: Path, packets: Container[int]) -> None:
    """Copy an MP4 file with the packets at these decode positions filled with zeros."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as reader:
        for number, packet in enumerate(reader.demux(video=0)):
            if number in packets:
                assert packet.pos is not None
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    target.write_bytes(data)
