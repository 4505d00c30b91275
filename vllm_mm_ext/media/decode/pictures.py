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
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

PICTURE: Final = 0
HIDDEN: Final = 2
SECOND_FIELD: Final = 4

# Tells what a packet is, PICTURE, HIDDEN, or SECOND_FIELD of the packet before it. Packets must be
# given in decoding order, none left out.
Reader = Callable[[memoryview], int]

# Parameter sets and slice headers are within so many bytes of a packet, unless much side
# information comes first.
_HEAD = 512
# Units of a packet that are looked at before its first slice.
_MAX_UNITS = 64
# MPEG-4 packets without a picture hold a start code, a time and a bit.
_LONGEST_EMPTY_VOP = 32
# Start code of a video object layer; what DivX writes into packed streams.
_LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f]", re.DOTALL)
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")
# Profiles whose sequence parameter sets tell the chroma format (7.3.2.1.1).
_CHROMA_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


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
            head = bytes(packet[:_HEAD])
            self._time_bits = self._time_bits or _time_bits(head)
            self._packed = self._packed or _PACKED.search(head) is not None
        # Of DivX's packed streams, an empty packet stands for a picture of the packet before it.
        if len(packet) > _LONGEST_EMPTY_VOP or self._packed or not self._time_bits:
            return PICTURE
        data = bytes(packet)
        at = data.find(b"\0\0\1\xb6")
        if at < 0:
            return PICTURE
        bits = _Bits(data[at + 4 :])
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
    bits = _Bits(headers[layer.end() : layer.end() + 64])
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


class _Sps(NamedTuple):
    """What slice headers need of a sequence parameter set."""

    frames_only: bool
    frame_num_bits: int
    colour_planes: bool


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
        self._sps: dict[int, _Sps] = {}
        self._pps: dict[int, int] = {}
        self._first: _Slice | None = None  # a field whose other field may come next
        self._length = 0  # bytes of the length before each unit; 0: start codes
        if extradata[:1] == b"\1" and len(extradata) > 6:
            self._length = (extradata[4] & 3) + 1
            for unit in _avcc_units(extradata):
                self._parameters(unit)
        else:
            for unit in _start_code_units(extradata):
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
            return self._search(_length_units(packet, self._length))
        found = self._search(_start_code_units(bytes(packet[:_HEAD])))
        if found is None and len(packet) > _HEAD:
            found = self._search(_start_code_units(bytes(packet)))
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
                number, sps = _read_sps(unit)
                if number < 32:
                    self._sps[number] = sps
            elif unit[0] & 31 == 8:
                bits = _Bits(_payload(unit[1:16]))
                number = bits.ue()
                if number < 256:
                    self._pps[number] = bits.ue()
        except (IndexError, ValueError):
            return

    def _header(self, unit: bytes) -> _Slice:
        bits = _Bits(_payload(unit[1:24]))
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


class _Bits:
    """Reads bits, the highest of each byte first; raises IndexError past the end."""

    def __init__(self, data: bytes) -> None:
        self._text, self._at = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}", 0

    def u(self, count: int) -> int:
        """The next ``count`` bits as an unsigned number."""
        begin, self._at = self._at, self._at + count
        if self._at > len(self._text):
            raise IndexError
        return int(self._text[begin : self._at], 2) if count else 0

    def ue(self) -> int:
        """An Exp-Golomb code (9.1)."""
        zeros = self._text.find("1", self._at) - self._at
        if zeros < 0:
            raise IndexError
        self._at += zeros
        return self.u(zeros + 1) - 1

    def se(self) -> int:
        """A signed Exp-Golomb code (9.1.1)."""
        code = self.ue()
        return (code + 1) // 2 if code & 1 else -(code // 2)


def _payload(data: bytes) -> bytes:
    """Contents of a unit without the bytes that prevent start codes in it (7.4.1)."""
    return data.replace(b"\0\0\3", b"\0\0")


def _read_sps(unit: bytes) -> tuple[int, _Sps]:
    """Number and contents of a sequence parameter set (7.3.2.1.1)."""
    bits = _Bits(_payload(unit[1:_HEAD]))
    profile = bits.u(8)
    bits.u(16)
    number, colour_planes = bits.ue(), False
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
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1)
        bits.se()
        bits.se()
        for _ in range(min(bits.ue(), 255)):
            bits.se()
    bits.ue()
    bits.u(1)
    bits.ue()
    bits.ue()
    return number, _Sps(bool(bits.u(1)), frame_num_bits, colour_planes)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def _avcc_units(extradata: bytes) -> Iterator[bytes]:
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


def _length_units(packet: memoryview, width: int) -> Iterator[bytes]:
    """First bytes of the units of a packet, where each has its length before it."""
    at = 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        at += width
        if size:
            yield bytes(packet[at : at + min(size, _HEAD)])
        at += size


def _start_code_units(data: bytes) -> Iterator[bytes]:
    """Units of a byte stream with start codes (annex B)."""
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        following = data.find(b"\0\0\1", at + 3)
        unit = data[at + 3 : following if following >= 0 else len(data)]
        if unit:
            yield unit
        at = following
