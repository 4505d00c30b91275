"""Which earlier pictures an H.264 picture may refer to, from slice headers alone.

FFmpeg leaves out pictures that nothing refers to. Of pyramids of B pictures it still decodes the
upper levels, which others refer to, though mostly none that is wanted. The lists of references in
the slice headers (ITU-T H.264, 8.2.4 and 8.2.5) tell which ones can be left out as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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

# Bytes of a slice that hold its header, unless that has many weights.
_LONGEST_HEADER = 160
# Most references that the standard allows (A.3.1), parameter sets of each kind (7.4.2), and slices
# of a picture that are looked at: a hostile stream may claim any number.
_MOST_REFS, _MOST_SPS, _MOST_PPS, _MOST_SLICES = 16, 32, 256, 1024
# Types of slices, modulo 5.
_P, _B, _I = 0, 1, 2
# Commands that change a list of references (7.4.3.1) and the marking of references (7.4.3.3).
_BACK, _AHEAD, _END_OF_LIST = 0, 1, 3
_UNUSED, _END_OF_MARKING = 1, 0


class _Pps(NamedTuple):
    """What slice headers need of a picture parameter set (7.3.2.2)."""

    sps: int
    order_present: bool
    num_refs: tuple[int, int]
    weighted: bool
    weighted_b: int
    redundant: bool


class Held(NamedTuple):
    """A picture that is kept for reference."""

    number: int
    frame_num: int
    order: int


class _Header(NamedTuple):
    """A slice header; ``changes`` are the commands per list, ``unused`` those of the marking."""

    kind: int
    is_idr: bool
    is_ref: bool
    frame_num: int
    order: tuple[int, int]
    active: tuple[int, int]
    changes: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    unused: list[int] | None
    sps: Sps


class Picture(NamedTuple):
    """What a packet holds.

    Attributes:
        number: Its number.
        is_b: It is a B picture, which need not be decoded for itself.
        order: Its place in presentation order.
        slices: Its slice headers; none of one that is not wanted and that no other refers to.
        lists: Numbers of the pictures in each list of references of each of ``slices``.
        held: Numbers of all pictures that are kept for reference when it is decoded; of a B picture
            alone.
    """

    number: int
    is_b: bool
    order: int = 0
    slices: tuple[_Header, ...] = ()
    lists: tuple[tuple[int, ...], ...] = ()
    held: frozenset[int] = frozenset()


class UnusualError(Exception):
    """Something that is left to the decoder."""


class References:
    """Reads the packets of a stream in decoding order, none left out, and numbers them from 0.

    Only progressive pictures with short-term references are understood.

    Args:
        extradata: What the container has for the decoder before the first packet.

    Attributes:
        held: Numbers of the pictures that a later picture may refer to.
    """

    def __init__(self, extradata: bytes) -> None:
        self._sps: dict[int, Sps] = {}
        self._pps: dict[int, _Pps] = {}
        self.learn(extradata)
        self.restart()

    def learn(self, extradata: bytes) -> None:
        """Read what the container has for the decoder, before the first packet or later."""
        self._length = 0  # bytes of the length before each unit; 0: start codes
        if extradata[:1] == b"\1" and len(extradata) > 6:
            self._length = (extradata[4] & 3) + 1
            units = avcc_units(extradata)
        else:
            units = start_code_units(extradata)
        for unit in units:
            self._parameters(unit)

    def restart(self) -> None:
        """Begin anew: the next packet is the first that the decoder gets."""
        self._held: list[Held] = []  # in decoding order, by which frame numbers rise
        self._known = False  # whether all references are, since an IDR picture
        self._number = -1
        self._frame_num = 0
        self._order = (0, 0)  # of the reference before: high and low part

    @property
    def held(self) -> frozenset[int]:
        return frozenset(held.number for held in self._held)

    def read(self, packet: memoryview, *, wanted: bool) -> Picture | None:
        """Read the next packet.

        Args:
            packet: Its bytes.
            wanted: Whether the picture is wanted for itself.

        Returns:
            None if it is not known what the picture refers to. Of one that is not wanted and that
            no other refers to, nothing is told.
        """
        self._number += 1
        try:
            slices = self._slices(packet)
            if not wanted and not slices[0][0] & 0x60:
                return Picture(self._number, True)
            return self._picture(self._headers(slices))
        except (IndexError, KeyError, ValueError, UnusualError):
            self._known, self._held = False, []
            return None

    def _slices(self, packet: memoryview) -> list[bytes]:
        if self._length:
            units = length_units(packet, self._length)
        else:
            units = start_code_units(bytes(packet))
        slices: list[bytes] = []
        for unit in units:
            kind = unit[0] & 31
            if kind in (1, 5):
                slices.append(unit)
                if len(slices) > _MOST_SLICES:
                    raise UnusualError
            elif kind in (7, 8):
                self._parameters(unit)
            elif 2 <= kind <= 4:
                raise UnusualError
        return slices

    def _parameters(self, unit: bytes) -> None:
        try:
            if unit[0] & 31 == 7:
                number, sps = read_sps(unit)
                if number >= _MOST_SPS or sps.num_refs > _MOST_REFS:
                    raise UnusualError
                self._sps[number] = sps
            elif unit[0] & 31 == 8:
                number, pps = _read_pps(unit)
                self._pps[number] = pps
        except (IndexError, ValueError, UnusualError):
            # What refers to these parameters is not known then.
            self._sps.clear()
            self._pps.clear()

    def _headers(self, slices: Sequence[bytes]) -> list[_Header]:
        """The slice headers of a picture that differ in more than the slice's place."""
        headers: list[_Header] = []
        first = ""
        for unit in slices:
            bits = Bits(payload(unit[1:_LONGEST_HEADER]))
            bits.ue()
            begin = bits.at
            if not first or not bits.text.startswith(first, begin):
                headers.append(self._header(unit[0], bits))
                first = first or bits.text[begin : bits.at]
        return headers

    def _header(self, unit_type: int, bits: Bits) -> _Header:
        """Slice header after the slice's place (7.3.3)."""
        is_ref, is_idr = bool(unit_type & 0x60), unit_type & 31 == 5
        kind = bits.ue() % 5
        pps = self._pps[bits.ue()]
        sps = self._sps[pps.sps]
        if kind > _I or not sps.frames_only or sps.colour_planes or sps.order_type:
            raise UnusualError
        if sps.may_have_gaps:
            raise UnusualError
        frame_num = bits.u(sps.frame_num_bits)
        if is_idr:
            bits.ue()
        low = bits.u(sps.order_bits)
        order = (low, bits.se() if pps.order_present else 0)
        if pps.redundant and bits.ue():
            raise UnusualError
        active, lists = pps.num_refs, (1 if kind == _P else 2 if kind == _B else 0)
        if kind == _B:
            bits.u(1)
        if lists and bits.u(1):
            first = bits.ue() + 1
            active = (first, bits.ue() + 1 if kind == _B else 0)
        changes: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for number in range(lists):
            if bits.u(1):
                while (command := bits.ue()) != _END_OF_LIST:
                    if command not in (_BACK, _AHEAD):
                        raise UnusualError
                    changes[number].append((command, bits.ue() + 1))
        unused: list[int] | None = None
        if is_ref:
            if (kind == _P and pps.weighted) or (kind == _B and pps.weighted_b == 1):
                _skip_weights(bits, active[:lists], sps.chroma)
            if is_idr:
                bits.u(1)
                if bits.u(1):
                    raise UnusualError
            elif bits.u(1):
                unused = []
                while (command := bits.ue()) != _END_OF_MARKING:
                    if command != _UNUSED:
                        raise UnusualError
                    unused.append(bits.ue() + 1)
        return _Header(kind, is_idr, is_ref, frame_num, order, active, changes, unused, sps)

    def _picture(self, slices: Sequence[_Header]) -> Picture:
        """The picture of these slices, which may have lists of their own."""
        header = slices[0]
        modulus = 1 << header.sps.frame_num_bits
        if header.is_idr:
            self._held, self._known = [], True
            self._frame_num, self._order = header.frame_num, (0, 0)
        if not self._known or (header.frame_num - self._frame_num) % modulus > 1:
            raise UnusualError
        high, order = self._place(header)
        is_b = all(each.kind == _B for each in slices)
        held = self.held if is_b else frozenset()
        lists: list[tuple[int, ...]] = []
        for each in slices:
            if each.frame_num != header.frame_num or each.order != header.order:
                raise UnusualError
            lists += lists_of(self._held, each, order)
        if header.is_ref:
            mark(self._held, header)
            self._held.append(Held(self._number, header.frame_num, order))
            if len(self._held) > max(1, header.sps.num_refs):
                raise UnusualError
            self._frame_num, self._order = header.frame_num, (high, header.order[0])
        return Picture(self._number, is_b, order, tuple(slices), tuple(lists), held)

    def _place(self, header: _Header) -> tuple[int, int]:
        """High part of the place in presentation order, and the place (8.2.1.1)."""
        high, before = self._order
        (low, delta), size = header.order, 1 << header.sps.order_bits
        if low < before and before - low >= size // 2:
            high += size
        elif low > before and low - before > size // 2:
            high -= size
        return high, high + low + min(0, delta)


def lists_of(held: list[Held], header: _Header, order: int) -> list[tuple[int, ...]]:
    """Numbers of the pictures in a slice's lists of references (8.2.4)."""
    if header.kind == _I:
        return []
    if header.kind == _P:
        # The one decoded last comes first.
        initial = [held[: -header.active[0] - 1 : -1]]
        if not header.changes[0]:
            return [tuple([each.number for each in initial[0]])]
    else:
        earlier = sorted((h for h in held if h.order < order), key=lambda h: -h.order)
        later = sorted((h for h in held if h.order > order), key=lambda h: h.order)
        forward, backward = earlier + later, later + earlier
        if len(backward) > 1 and backward == forward:
            backward = [backward[1], backward[0], *backward[2:]]
        initial = [forward, backward]
    lists: list[tuple[int, ...]] = []
    for rest, active, changes in zip(initial, header.active, header.changes, strict=False):
        first: list[Held] = []
        rest, at = rest[:active], header.frame_num
        for command, distance in changes:
            at += distance if command == _AHEAD else -distance
            first.append(_by_number(held, at % (1 << header.sps.frame_num_bits)))
            rest = [other for other in rest if other is not first[-1]]
        lists.append(tuple(each.number for each in (first + rest)[:active]))
    return lists


def mark(held: list[Held], header: _Header) -> None:
    """Let go of references (8.2.5); the picture itself is no part of them yet."""
    if header.is_idr:
        held.clear()
    elif header.unused is not None:
        for distance in header.unused:
            at = (header.frame_num - distance) % (1 << header.sps.frame_num_bits)
            for place, each in enumerate(held):
                if each.frame_num == at:
                    del held[place]
                    break
    elif len(held) >= max(1, header.sps.num_refs):
        del held[0]


def _by_number(held: list[Held], frame_num: int) -> Held:
    for each in held:
        if each.frame_num == frame_num:
            return each
    raise UnusualError


def _read_pps(unit: bytes) -> tuple[int, _Pps]:
    """Number and contents of a picture parameter set (7.3.2.2)."""
    bits = Bits(payload(unit[1:HEAD]))
    number, sps = bits.ue(), bits.ue()
    if number >= _MOST_PPS:
        raise UnusualError
    bits.u(1)
    order_present = bool(bits.u(1))
    if bits.ue():
        raise UnusualError
    num_refs = (bits.ue() + 1, bits.ue() + 1)
    weighted, weighted_b = bool(bits.u(1)), bits.u(2)
    for _ in range(3):
        bits.se()
    bits.u(2)
    return number, _Pps(sps, order_present, num_refs, weighted, weighted_b, bool(bits.u(1)))


def _skip_weights(bits: Bits, active: tuple[int, ...], has_chroma: bool) -> None:
    """Weights of references (7.3.3.2)."""
    bits.ue()
    if has_chroma:
        bits.ue()
    for count in active:
        for _ in range(count):
            if bits.u(1):
                bits.se()
                bits.se()
            if has_chroma and bits.u(1):
                for _ in range(4):
                    bits.se()
