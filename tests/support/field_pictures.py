"""Writes field-coded H.264 (PAFF), which no encoder of FFmpeg makes.

Each picture is two fields of even gray, macroblocks stored as they are (I_PCM). Every other
picture is one that no other refers to, so that decoders may leave it out. Clauses are those of
ITU-T H.264.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av

SIDE = 32
FPS = 25
_GOP = 12


def gray(number: int, bottom: int) -> int:
    """Luma of a field."""
    return 16 + number * 7 % 180 + 20 * bottom


def write_fields(path: Path, count: int, packets: int) -> Path:
    """Write ``count`` pictures of 32x32, 25 a second.

    Args:
        path: An MPEG-TS file.
        count: Number of pictures.
        packets: Packets of the transport stream for each: 1, or 2, one for each field.
    """
    delimiter = _unit(0, 9, b"\xf0")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)  # For the stream's parameters.
        stream.width = stream.height = SIDE
        for number in range(count):
            head = _parameter_sets() if number % _GOP == 0 else b""
            top = delimiter + head + _field(number, 0)
            bottom = delimiter + _field(number, 1)
            for part, data in enumerate([top + bottom] if packets == 1 else [top, bottom]):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, 90_000)
                packet.pts = packet.dts = 90_000 + 3600 * number + 1800 * part
                container.mux(packet)
    return path


def _ue(value: int) -> str:
    """Exp-Golomb code (9.1)."""
    code = f"{value + 1:b}"
    return "0" * (len(code) - 1) + code


def _unit(importance: int, kind: int, payload: bytes) -> bytes:
    """A NAL unit after a start code, with emulation prevention (7.4.1)."""
    escaped = bytearray()
    for byte in payload:
        if byte <= 3 and escaped[-2:] == b"\0\0":
            escaped.append(3)
        escaped.append(byte)
    return b"\0\0\0\1" + bytes([importance << 5 | kind]) + bytes(escaped)


def _bytes(bits: str) -> bytes:
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def _parameter_sets() -> bytes:
    main_profile = f"{77:08b}{0:08b}{30:08b}"
    # Number 0, frame numbers of 4 bits, order counts of 8 bits, one reference, 2 x 1 macroblocks a
    # field, fields allowed but not within a frame picture.
    sps = main_profile + "".join(_ue(v) for v in (0, 0, 0, 4, 1)) + "0" + _ue(1) + _ue(0)
    sps += "0" + "0" + "1" + "0" + "0"
    pps = _ue(0) + _ue(0) + "00" + _ue(0) + _ue(0) + _ue(0) + "000" + _ue(0) * 3 + "100"
    return _unit(3, 7, _bytes(sps)) + _unit(3, 8, _bytes(pps))


def _field(number: int, bottom: int) -> bytes:
    """One field as a slice of macroblocks that hold their samples (7.3.3, 7.3.5)."""
    at = number % _GOP
    refresh, reference = at == 0 and not bottom, at % 2 == 0
    bits = _ue(0) + _ue(7) + _ue(0) + f"{(at + 1) // 2:04b}" + f"1{bottom}"
    if refresh:
        bits += _ue(number // _GOP % 2)
    bits += f"{2 * at + bottom:08b}"
    if reference:
        bits += "00" if refresh else "0"
    bits += _ue(0) + _ue(1)
    samples = "".join(f"{v:08b}" for v in [gray(number, bottom)] * 256 + [128] * 128)
    for _ in range(SIDE // 16):
        bits += _ue(25)
        bits += "0" * (-len(bits) % 8) + samples
    return _unit(2 * reference, 5 if refresh else 1, _bytes(bits))
