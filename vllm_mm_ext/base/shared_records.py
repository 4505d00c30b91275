"""Records in a file that processes map, read without a lock; a checksum shows half-written ones."""

from __future__ import annotations

import mmap
import struct
import zlib

# How often a reader reads a record that fails its checksum. A write is shorter than a read, so a
# reader that meets a writer finds the record whole the next time.
_LOOKS = 3
_CRC = struct.Struct("<I")


class Region:
    """Consecutive records of one layout, each followed by its checksum; an empty one is zeros.

    Args:
        layout: Layout of a record.
        count: Number of records.
        start: Offset of the first record in the file, in bytes.

    Attributes:
        end: Offset of the first byte after the region.
    """

    def __init__(self, layout: struct.Struct, count: int, start: int) -> None:
        self._layout = layout
        self._stride = layout.size + _CRC.size
        self._start = start
        self.end = start + count * self._stride

    def read(self, view: mmap.mmap, place: int) -> tuple[object, ...] | None:
        """The values of a record; None if the record is empty or half written."""
        begin = self._start + place * self._stride
        for _ in range(_LOOKS):
            raw = view[begin : begin + self._stride]
            body, checksum = raw[: self._layout.size], raw[self._layout.size :]
            if _CRC.unpack(checksum)[0] == _checksum(body):
                return self._layout.unpack(body)
        return None

    def write(self, view: mmap.mmap, place: int, *values: object) -> None:
        """Write a record. The caller sees to it that no one else writes the record meanwhile."""
        body = self._layout.pack(*values)
        begin = self._start + place * self._stride
        view[begin : begin + self._stride] = body + _CRC.pack(_checksum(body))

    def clear(self, view: mmap.mmap, place: int) -> None:
        """Make a record empty."""
        begin = self._start + place * self._stride
        view[begin : begin + self._stride] = bytes(self._stride)


def _checksum(body: bytes) -> int:
    # Inverted, so that a record of zeros fails its checksum.
    return zlib.crc32(body) ^ 0xFFFFFFFF
