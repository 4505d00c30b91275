"""Tells packets that are pictures from those that are not, by the first bytes of each packet.

Most codecs put one shown picture into each packet. These do not always:

- H.264 may code the two fields of an interlaced picture on their own; the demuxer then gives a
  packet for each (ITU-T H.264, 7.3.3 and 7.4.1.2.4).
- VP8 has packets whose picture is only referred to, never shown (RFC 6386, 9.1: ``show_frame``).
- VP9 has them too, and puts several pictures into one packet, a superframe (VP9 bitstream
  specification, 6.2 and annex B).
- MPEG-4 part 2 has packets that say "nothing changed" (ISO/IEC 14496-2, 6.2.5: ``vop_coded``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from vllm_mm_ext.media.decode.h264 import (
    HEAD,
    Bits,
    Sps,
    avcc_units,
    length_units,
    payload,
    read_sps,
    start_code_units,
)

PICTURE: Final = 0
HIDDEN: Final = 2
SECOND_FIELD: Final = 4

# Tells what a packet is, PICTURE, HIDDEN, or SECOND_FIELD of the packet before it. Packets must be
# given in decoding order, none left out.
Reader = Callable[[memoryview], int]

# Units of a packet that are looked at before its first slice.
_MAX_UNITS = 64
# MPEG-4 packets without a picture hold a start code, a time and a bit.
_LONGEST_EMPTY_VOP = 32
# Start code of a video object layer; what DivX writes into packed streams.
_LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f]", re.DOTALL)
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")


def reader_for(codec: str, extradata: bytes | None) -> Reader | None:
    """A reader for the packets of a stream; None where each packet is a shown picture.

    Args:
        codec: FFmpeg codec name.
        extradata: What the container has for the decoder before the first packet.
    """
    if codec == "vp8":
        return _vp8
    if codec == "vp9":
        return _vp9
    if codec == "mpeg4":
        return _Vops(extradata or b"")
    if codec == "h264":
        fields = _Fields(extradata or b"")
        return fields if fields.possible else None
    return None


def _vp8(packet: memoryview) -> int:
    return PICTURE if packet[0] & 0x10 else HIDDEN


def _vp9(packet: memoryview) -> int:
    last = packet[-1]
    if last & 0xE0 != 0xC0:
        return PICTURE if _vp9_shown(packet[0]) else HIDDEN
    # A superframe: at its end are the sizes of its pictures, between two equal bytes.
    count, width = (last & 7) + 1, (last >> 3 & 3) + 1
    index = len(packet) - 2 - count * width
    if index < 0 or packet[index] != last:
        return PICTURE if _vp9_shown(packet[0]) else HIDDEN
    at = 0
    for picture in range(count):
        if at >= index:
            break
        if _vp9_shown(packet[at]):
            return PICTURE
        place = index + 1 + picture * width
        at += int.from_bytes(packet[place : place + width], "little")
    return HIDDEN


def _vp9_shown(first: int) -> bool:
    """``show_existing_frame`` or ``show_frame`` of a picture, from its first byte."""
    if first & 0x30 == 0x30:  # Profile 3 has a reserved bit more.
        return bool(first & 0x04) or bool(first & 0x01)
    return bool(first & 0x08) or bool(first & 0x02)


class _Vops:
    """Finds the packets of MPEG-4 part 2 that have no picture in them (``vop_coded`` is 0)."""

    def __init__(self, extradata: bytes) -> None:
        self._time_bits = _time_bits(extradata)
        self._packed = _PACKED.search(extradata) is not None
        self._is_first = True

    def __call__(self, packet: memoryview) -> int:
        if self._is_first:
            self._is_first = False
            head = bytes(packet[:HEAD])
            self._time_bits = self._time_bits or _time_bits(head)
            self._packed = self._packed or _PACKED.search(head) is not None
        # Of DivX's packed streams, an empty packet stands for a picture of the packet before it.
        if len(packet) > _LONGEST_EMPTY_VOP or self._packed or not self._time_bits:
            return PICTURE
        data = bytes(packet)
        at = data.find(b"\0\0\1\xb6")
        if at < 0:
            return PICTURE
        bits = Bits(data[at + 4 :])
        try:
            bits.u(2)
            while bits.u(1):  # modulo_time_base
                pass
            bits.u(1 + self._time_bits + 1)
            return PICTURE if bits.u(1) else HIDDEN
        except IndexError:
            return PICTURE


def _time_bits(headers: bytes) -> int:
    """Bits of ``vop_time_increment`` (ISO/IEC 14496-2, 6.2.3); 0 if it is not to be found."""
    layer = _LAYER.search(headers)
    if layer is None:
        return 0
    bits = Bits(headers[layer.end() : layer.end() + 64])
    try:
        bits.u(1 + 8)
        version = 1
        if bits.u(1):
            version = bits.u(4)
            bits.u(3)
        if bits.u(4) == 15:
            bits.u(16)
        if bits.u(1):
            bits.u(2 + 1)
            if bits.u(1):
                bits.u(79)
        if bits.u(2) == 3 and version != 1:
            bits.u(4)
        bits.u(1)
        return max(1, (bits.u(16) - 1).bit_length())
    except IndexError:
        return 0


class _Slice(NamedTuple):
    """A slice header; ``field`` is 0 for a frame, 1 for a top field and 2 for a bottom field."""

    frame_num: int
    field: int
    is_idr: bool

    def completes(self, first: _Slice) -> bool:
        """Whether this is the second field of the picture that ``first`` is a field of.

        As in FFmpeg's decoder. The second field of an IDR picture is no IDR picture itself.
        """
        return self.field != first.field and self.frame_num == first.frame_num and not self.is_idr


class _Fields:
    """Reads slice headers of H.264, to find the two fields of a picture in two packets.

    Attributes:
        possible: Fields may occur, as far as the parameter sets seen so far tell.
    """

    def __init__(self, extradata: bytes) -> None:
        self._sps: dict[int, Sps] = {}
        self._pps: dict[int, int] = {}
        self._first: _Slice | None = None  # a field whose other field may come next
        self._length = 0  # bytes of the length before each unit; 0: start codes
        if extradata[:1] == b"\1" and len(extradata) > 6:
            self._length = (extradata[4] & 3) + 1
            for unit in avcc_units(extradata):
                self._parameters(unit)
        else:
            for unit in start_code_units(extradata):
                self._parameters(unit)

    @property
    def possible(self) -> bool:
        return not self._sps or not all(sps.frames_only for sps in self._sps.values())

    def __call__(self, packet: memoryview) -> int:
        if not self.possible:
            return PICTURE
        header = self._slice(packet)
        first, self._first = self._first, None
        if header is None or not header.field:
            return PICTURE
        if first is not None and header.completes(first):
            return SECOND_FIELD
        self._first = header
        return PICTURE

    def _slice(self, packet: memoryview) -> _Slice | None:
        """The first slice header of a packet; parameter sets before it are remembered."""
        if self._length:
            return self._search(length_units(packet, self._length))
        found = self._search(start_code_units(bytes(packet[:HEAD])))
        if found is None and len(packet) > HEAD:
            found = self._search(start_code_units(bytes(packet)))
        return found

    def _search(self, units: Iterable[bytes]) -> _Slice | None:
        for unit in itertools.islice(units, _MAX_UNITS):
            if unit[0] & 31 in (1, 2, 5):
                try:
                    return self._header(unit)
                except (IndexError, KeyError):
                    return None
            self._parameters(unit)
        return None

    def _parameters(self, unit: bytes) -> None:
        try:
            if unit[0] & 31 == 7:
                number, sps = read_sps(unit)
                if number < 32:
                    self._sps[number] = sps
            elif unit[0] & 31 == 8:
                bits = Bits(payload(unit[1:16]))
                number = bits.ue()
                if number < 256:
                    self._pps[number] = bits.ue()
        except (IndexError, ValueError):
            return

    def _header(self, unit: bytes) -> _Slice:
        bits = Bits(payload(unit[1:24]))
        bits.ue()
        bits.ue()
        sps = self._sps[self._pps[bits.ue()]]
        if sps.colour_planes:
            bits.u(2)
        frame_num = bits.u(sps.frame_num_bits)
        field = 0
        if not sps.frames_only and bits.u(1):
            field = 1 + bits.u(1)
        return _Slice(frame_num, field, unit[0] & 31 == 5)
