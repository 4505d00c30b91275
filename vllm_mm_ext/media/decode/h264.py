"""Reads the headers of H.264 (ITU-T H.264, 7.3): bits, units, sequence parameter sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Parameter sets and slice headers are within so many bytes of a packet, unless much side
# information comes first.
HEAD = 512
# Profiles whose sequence parameter sets tell the chroma format (7.3.2.1.1).
_CHROMA_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


class Sps(NamedTuple):
    """What slice headers need of a sequence parameter set.

    Attributes:
        frames_only: There are no fields.
        frame_num_bits: Length of ``frame_num``.
        colour_planes: Slices name their colour plane.
        chroma: There are chroma planes.
        order_type: How slices tell the place of a picture in presentation order: 0 in so many bits
            as ``order_bits`` says; 1 and 2 in other ways.
        order_bits: See ``order_type``; 0 for types 1 and 2.
        num_refs: Most pictures that are kept for reference.
        may_have_gaps: Frame numbers may be left out.
    """

    frames_only: bool
    frame_num_bits: int
    colour_planes: bool
    chroma: bool
    order_type: int
    order_bits: int
    num_refs: int
    may_have_gaps: bool


class Bits:
    """Reads bits, the highest of each byte first; raises IndexError past the end.

    Attributes:
        text: All bits, as characters "0" and "1".
        at: Position of the next bit.
    """

    def __init__(self, data: bytes) -> None:
        self.text, self.at = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}", 0
        self._size = len(self.text)

    def u(self, count: int) -> int:
        """The next ``count`` bits as an unsigned number."""
        begin = self.at
        self.at = end = begin + count
        if end > self._size:
            raise IndexError
        return int(self.text[begin:end], 2) if count else 0

    def ue(self) -> int:
        """An Exp-Golomb code (9.1)."""
        begin = self.text.find("1", self.at)
        end = 2 * begin - self.at + 1
        if begin < 0 or end > self._size:
            raise IndexError
        self.at = end
        return int(self.text[begin:end], 2) - 1

    def se(self) -> int:
        """A signed Exp-Golomb code (9.1.1)."""
        code = self.ue()
        return (code + 1) // 2 if code & 1 else -(code // 2)


def payload(data: bytes) -> bytes:
    """Contents of a unit without the bytes that prevent start codes in it (7.4.1)."""
    return data.replace(b"\0\0\3", b"\0\0")


def read_sps(unit: bytes) -> tuple[int, Sps]:
    """Number and contents of a sequence parameter set (7.3.2.1.1)."""
    bits = Bits(payload(unit[1:HEAD]))
    profile = bits.u(8)
    bits.u(16)
    number, chroma, colour_planes = bits.ue(), 1, False
    if profile in _CHROMA_PROFILES:
        chroma = bits.ue()
        colour_planes = chroma == 3 and bool(bits.u(1))
        bits.ue()
        bits.ue()
        bits.u(1)
        if bits.u(1):
            for matrix in range(8 if chroma != 3 else 12):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if matrix < 6 else 64)
    frame_num_bits = bits.ue() + 4
    order, order_bits = bits.ue(), 0
    if order == 0:
        order_bits = bits.ue() + 4
    elif order == 1:
        bits.u(1)
        bits.se()
        bits.se()
        for _ in range(min(bits.ue(), 255)):
            bits.se()
    num_refs, gaps = bits.ue(), bool(bits.u(1))
    bits.ue()
    bits.ue()
    frames_only = bool(bits.u(1))
    has_chroma = chroma > 0 and not colour_planes
    return number, Sps(
        frames_only, frame_num_bits, colour_planes, has_chroma, order, order_bits, num_refs, gaps
    )


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def avcc_units(extradata: bytes) -> Iterator[bytes]:
    """Parameter sets of an ``AVCDecoderConfigurationRecord`` (ISO/IEC 14496-15, 5.3.3.1)."""
    at = 5
    for mask in (31, 255):
        if at >= len(extradata):
            return
        count, at = extradata[at] & mask, at + 1
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            unit = extradata[at + 2 : at + 2 + size]
            at += 2 + size
            if unit:
                yield unit


def length_units(packet: memoryview, width: int) -> Iterator[bytes]:
    """First bytes of the units of a packet, where each has its length before it."""
    at = 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        at += width
        if size:
            yield bytes(packet[at : at + min(size, HEAD)])
        at += size


def start_code_units(data: bytes) -> Iterator[bytes]:
    """Units of a byte stream with start codes (annex B)."""
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        following = data.find(b"\0\0\1", at + 3)
        unit = data[at + 3 : following if following >= 0 else len(data)]
        if unit:
            yield unit
        at = following
